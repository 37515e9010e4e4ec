"""Keeps what `Interp` costs within a share of the training time: its samplers are shown less often."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks._lightning import fits
from lightning_interp.callbacks.base import InterpCallback

log = logging.getLogger("lightning_interp")

# A sampler's event ends in the hook in which it began, but for one that watches a validation run.
_ENDS = {"on_validation_start": "on_validation_epoch_end"}
_DECIDING = frozenset({"on_train_batch_end", "on_train_epoch_end", "on_validation_start"})
_FIRST_AND_LAST = frozenset({"on_train_start", "on_train_end"})
_HOOKS = _DECIDING | _FIRST_AND_LAST | frozenset(_ENDS.values())
_ROUNDING = 1e-9  # of the share: sums of seconds are not exact


@dataclass
class Account:
    """What one sampler has cost.

    Attributes:
        spent: Seconds of all that it has shown.
        price: Seconds of the last time that it was due and shown; what the next time is expected to cost.
        due: How often it was due, after the first step and before the end.
        shown: How often of these it was shown.
    """

    spent: float = 0.0
    price: float = 0.0
    due: int = 0
    shown: int = 0

    @property
    def low(self) -> float:
        """What it will have spent at the end if it is shown no more before: the last state always is."""
        return self.spent + self.price

    @property
    def high(self) -> float:
        """The same if it is shown once more before."""
        return self.spent + 2 * self.price


def affordable(accounts: Mapping[str, Account], seconds: float) -> set[str]:
    """Which samplers may be shown now: fair shares, and what one does not use goes to the others.

    One may, if the seconds would also do if each of the others had spent as much as this one then will have, though
    never more than its own next time costs. So those that cost little come first, and none can be kept waiting for
    ever: the others stop when they have had as much.

    Args:
        accounts: Of all samplers.
        seconds: That all of them together may have spent by now.

    Returns:
        Keys of `accounts`. If all of these are shown, and cost what they last did, the seconds suffice.

    Example:
        >>> cheap, dear = Account(spent=3.0, price=1.0), Account(spent=10.0, price=10.0)
        >>> sorted(affordable({"cheap": cheap, "dear": dear}, 25.0)), sorted(affordable({"cheap": cheap}, 4.5))
        (['cheap'], [])
    """

    def needs(high: float) -> float:
        return sum(min(max(high, each.low), each.high) for each in accounts.values())

    return {key for key, account in accounts.items() if needs(account.high) <= seconds * (1 + _ROUNDING)}


class Budget:
    """Decides, on rank zero and for all ranks, what a family leaves out.

    The *training time* is the time since the fit began without what the family takes itself; over a resume it goes on.
    What can't be left out (`DeadFilters`, `TrainingDynamics`, `Alerts`, and the bookkeeping of the samplers) is paid
    first; the samplers share the rest, see `affordable`. Each is shown before the first step, the first time it is
    due, at the end of the last planned epoch, and when the training ends.

    Args:
        share: In (0, 1].
        family: The callback that holds the samplers; its clock counts.
    """

    def __init__(self, share: float, family: Family) -> None:
        self.share = share
        self._family = family
        self.begin()

    def begin(self) -> None:
        """Begins a run."""
        self.accounts: dict[str, Account] = {}
        self._began = self._family.clock()
        self._before = (0.0, 0.0)  # seconds of training, and of ours, before a resume
        self._open: dict[str, tuple[str, float, bool]] = {}  # the hook that ends it, seconds before, whether decided on
        self._told: set[str] = set()
        for child in self._family.children:
            child.spared = False

    # ------------------------------------------------------------------ time

    @property
    def spent(self) -> float:
        """Seconds that the family has taken, before a resume too."""
        return self._before[1] + self._family.cost

    @property
    def trained(self) -> float:
        """Seconds of training."""
        passed = self._family.clock() - self._began
        return self._before[0] + max(0.0, passed - self._family.cost)

    @property
    def spent_share(self) -> float:
        """What the family has taken as a share of the training time."""
        return self.spent / self.trained if self.trained > 0 else 0.0

    def _left_for_samplers(self) -> float:
        own = sum(account.spent for account in self.accounts.values())
        return self.share * self.trained - (self.spent - own)

    # ------------------------------------------------------------------ around the hooks of the children

    @contextlib.contextmanager
    def around(self, hook: str, trainer: Any) -> Iterator[None]:
        """To be entered while a hook goes to the children; decides before, and books what it took after.

        On all ranks, whatever has failed on them.
        """
        if hook not in _HOOKS or not fits(trainer) or trainer.sanity_checking:
            yield
            return
        if hook in _DECIDING:
            self._decide(hook, trainer)
        elif hook in _FIRST_AND_LAST:
            for child in self._samplers():
                child.spared = False
                self._open_event(child, hook, decided=False)
        try:
            yield
        finally:
            self._book(hook)

    def _samplers(self) -> list[InterpCallback]:
        return [child for child in self._family.children if child.can_be_spared]

    def _decide(self, hook: str, trainer: Any) -> None:
        """Sets `spared` of all samplers that are due. What the ranks meet for depends on the schedule alone."""
        due = [child for child in self._samplers() if child.scheduled(hook, trainer)]
        if not due:
            return
        spared = [False] * len(due)
        if trainer.is_global_zero:
            spared = self._choose(due, hook, trainer)
        spared = [bool(value) for value in _ranks.from_zero(trainer, torch.tensor(spared, dtype=torch.int64))]
        for child, left_out in zip(due, spared, strict=True):
            child.spared = left_out
        if trainer.is_global_zero:
            self._note(due, hook, trainer)

    def _choose(self, due: Iterable[InterpCallback], hook: str, trainer: Any) -> list[bool]:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        at_end = hook == "on_train_epoch_end" or (hook == "on_validation_start" and trainer.is_last_batch)
        ending = last and at_end
        allowed = affordable(self.accounts, self._left_for_samplers())
        return [
            not ending and self._shown_before(child) and child.shows_in(hook) and child.state_key not in allowed
            for child in due
        ]

    def _shown_before(self, child: InterpCallback) -> bool:
        account = self.accounts.get(child.state_key)
        return account is not None and account.shown > 0

    def _note(self, due: Iterable[InterpCallback], hook: str, trainer: Any) -> None:
        """Books who was due, and says who is left out for the first time."""
        news = []
        for child in due:
            if child.resting or not child.shows_in(hook):
                continue
            account = self._account(child)
            account.due += 1
            if child.spared:
                news += [child.state_key] * (child.state_key not in self._told)
            else:
                account.shown += 1
                self._open_event(child, hook, decided=True)
        if news:
            self._told.update(news)
            named = ", ".join(f"{key} ({self.accounts[key].price:.2g} s each time)" for key in news)
            log.warning(
                f"Interp keeps to {_percent(self.share)} of the training time ({_percent(self.spent_share)} so far): "
                f"from step {self._family.step_of(trainer)} on it shows less often: {named}."
            )

    # ------------------------------------------------------------------ accounts

    def _account(self, child: InterpCallback) -> Account:
        return self.accounts.setdefault(child.state_key, Account())

    def _open_event(self, child: InterpCallback, hook: str, *, decided: bool) -> None:
        self._open[child.state_key] = (_ENDS.get(hook, hook), child.cost, decided)

    def _book(self, hook: str) -> None:
        for child in self._samplers():
            end, before, decided = self._open.get(child.state_key, ("", 0.0, False))
            if end != hook:
                continue
            del self._open[child.state_key]
            took = child.cost - before
            account = self._account(child)
            account.spent += took
            if decided:
                account.price = took

    # ------------------------------------------------------------------ what it did

    def summary(self) -> str:
        """One sentence, for the end of the training."""
        own = sum(account.spent for account in self.accounts.values())
        fixed = (self.spent - own) / self.trained if self.trained > 0 else 0.0
        shown = "; ".join(
            f"{key} shown {account.shown} of {account.due} times"
            for key, account in sorted(self.accounts.items())
            if account.due
        )
        return (
            f"Interp's budget is {_percent(self.share)} of the training time; it took {_percent(self.spent_share)} "
            f"({self.spent:.3g} s), of which {_percent(fixed)} can't be left out{': ' if shown else ''}{shown}."
        )

    @property
    def left_out(self) -> bool:
        """Whether anything was."""
        return any(account.shown < account.due for account in self.accounts.values())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Times and accounts: after a resume they go on."""
        accounts = {key: asdict(account) for key, account in self.accounts.items()}
        return {"trained": self.trained, "spent": self.spent, "accounts": accounts, "told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._before = (float(state["trained"]), float(state["spent"]))
        self.accounts = {key: Account(**account) for key, account in state["accounts"].items()}
        self._told = set(state["told"])


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
