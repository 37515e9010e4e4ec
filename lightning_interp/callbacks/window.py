"""The evidence of one window of `DeadFilters`: who fired, and how strongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks.observer import Observer
from lightning_interp.functional.dead import MeanMagnitude, dormancy_scores
from lightning_interp.functional.liveness import Liveness
from lightning_interp.functional.ops import EXACT_ZERO, OWNERS
from lightning_interp.functional.tracing import End, Unit

Units = dict[str, Unit]

# Batches of a window in which all is followed, as long as there are layers that have never run: some run rarely.
_SEARCH = 8


class Window:
    """Reads activations from an observer, batch by batch.

    Attributes:
        forwards: Batches for which the window was open.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self._known: frozenset[str] | None = None
        self._proven = False  # all are: that can't be taken back
        self._liveness = Liveness()
        self._magnitude = MeanMagnitude()
        self._observer: Observer | None = None

    # ------------------------------------------------------------------ reading

    def open(
        self,
        observer: Observer,
        choose: Callable[[Units], Iterable[str]],
        count: Callable[[float], None] | None = None,
    ) -> None:
        """Follows what can still prove something in the coming forward: suspects, and units without an exact zero.

        In the first batch of the window that is everything, so that layers which have not run before are found; one
        that turns up later may have run unseen, and is not judged before the next window.
        """
        self.forwards += 1
        if self._proven:
            return
        units: set[str] | None = None
        if not self._searches(observer):
            if self._known is None:
                self._known = frozenset(observer.units)
            self._liveness.narrow()
            chosen = self._known.intersection(choose(observer.units))
            unseen = chosen - self._liveness.seen()
            graded = {name for name in chosen if _is_graded(observer.units[name])}
            units = (self._liveness.suspects() & chosen) | unseen | graded
            self._proven = not units
        if units is None or units:
            observer.open(self._read, units, count=count)
            self._observer = observer

    def _searches(self, observer: Observer) -> bool:
        if not observer.units or self.forwards == 1:
            return True
        return (
            self._known is None
            and self.forwards <= _SEARCH
            and any(
                isinstance(module, OWNERS) and name not in observer.units
                for name, module in observer.model.named_modules()
            )
        )

    def _read(self, end: End) -> None:
        self._liveness.read(end)
        if end.activation is not None and end.activation not in EXACT_ZERO:
            self._magnitude.read(end)

    @property
    def reading(self) -> bool:
        """Whether it is open on a batch."""
        return self._observer is not None

    def stop_reading(self) -> None:
        """Takes the reader off the model.

        Raises:
            Exception: What went wrong in the forward.
        """
        if self._observer is not None:
            observer, self._observer = self._observer, None
            observer.close_reader(self._read)

    def close(self) -> None:
        """Like `stop_reading`, and never raises."""
        if self._observer is not None:
            observer, self._observer = self._observer, None
            observer.discard(self._read)

    def feed(self, end: End) -> None:
        """Takes an activation from elsewhere: an eager pass."""
        self._read(end)

    def feed_life(self, end: End) -> None:
        """Takes an activation as evidence of life only; of a unit that the window has not seen, none."""
        if end.unit in self._liveness.seen():
            self._liveness.read(end)

    def doubtful(self) -> set[str]:
        """Units that have been seen, and not all of whose filters have fired. Waits for the device."""
        return {name for name, alive in self._liveness.alive().items() if not bool(alive.all())}

    # ------------------------------------------------------------------ over ranks

    def pack(self, names: list[str], units: Units) -> Tensor:
        """All evidence as one flat float64 vector, the same length on all ranks: a rank may have seen no batch."""
        alive, sums = self._liveness.alive(), self._magnitude.sums()
        parts = []
        for name in names:
            count = units[name].num_filters
            judged = self._known is None or name in self._known
            total, values = sums.get(name, (torch.empty(0), 0))
            if len(total) != count:
                total, values = torch.zeros(count, dtype=torch.float64), 0
            mask = alive.get(name, torch.empty(0))
            seen = judged and len(mask) == count  # else it was not read, or is of a layer that has been replaced
            mask = mask if seen else torch.zeros(count)
            parts += [torch.tensor([seen, judged and values]), mask.double(), total]
        return torch.cat([part.double() for part in parts]) if parts else torch.empty(0, dtype=torch.float64)

    def unpack(
        self, packed: Tensor, names: list[str], units: Units, trainer: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Reduces over ranks: dead masks and dormancy scores by unit. Collective; after `agree` only."""
        alive, sums = _ranks.highest(trainer, packed), _ranks.total(trainer, packed)
        dead: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        start = 0
        for name in names:
            count = units[name].num_filters
            seen, values = bool(alive[start]), float(sums[start + 1])
            mask = alive[start + 2 : start + 2 + count] > 0
            magnitudes = sums[start + 2 + count : start + 2 + 2 * count]
            start += 2 + 2 * count
            if seen:
                dead[name] = ~mask
            if values:
                scores[name] = dormancy_scores(magnitudes / values)
        return dead, scores

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, safe in a checkpoint."""
        return {
            "forwards": self.forwards,
            "known": None if self._known is None else sorted(self._known),
            "alive": self._liveness.alive(),
            "sums": self._magnitude.sums(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with evidence from before a resume."""
        self.forwards = state["forwards"]
        self._known = None if state["known"] is None else frozenset(state["known"])
        self._liveness.absorb(state["alive"])
        self._magnitude.absorb(state["sums"])


def _is_graded(unit: Unit) -> bool:
    """Whether dormancy is worth a look: a non-linearity follows, and it has no exact zero."""
    return bool(unit.activations) and not unit.exact_zero
