"""A callback that holds other callbacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from lightning_interp.callbacks._guarding import CLEANING, HOOKS, IN_BATCH, stop
from lightning_interp.callbacks._lightning import CallbackBase, LightningModule, Trainer, accumulates, axis_step, fits
from lightning_interp.callbacks.base import InterpCallback, Note, OnError
from lightning_interp.callbacks.schedule import ALWAYS, BatchHooks

_NONE = range(0)
_END = "on_train_batch_end"
# The family goes first: it makes its children in `setup`, and puts the restored history in place before they write.
_OWN_FIRST = frozenset({"setup", "on_fit_start"})


def _forwarding(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a (guarded) hook so that the children get it too, whether or not the family itself is resting."""
    name = hook.__name__
    own_first, in_batch, empty = name in _OWN_FIRST, name in IN_BATCH, hook is getattr(CallbackBase, name)

    @functools.wraps(hook)
    def forwarded(self: Family, *args: Any, **kwargs: Any) -> None:
        if self._forwarded == name:  # the hook of a parent class, called through super()
            hook(self, *args, **kwargs)
            return
        asked: Sequence[InterpCallback] | None = None
        if not in_batch:
            self._same = _NONE
            self._wake()
        else:
            if name == "on_train_batch_start":
                self._ask(args[0], args[3] if len(args) > 3 else kwargs["batch_idx"])
            if self._asked is not None:
                asked = self._asked.get(name, ())
                if not asked and (empty or name not in self._due):
                    return
        before, self._forwarded = self._forwarded, name
        try:
            if own_first:
                hook(self, *args, **kwargs)
            self.pass_on(self.children if asked is None else asked, name, *args, **kwargs)
            if not own_first:
                hook(self, *args, **kwargs)
        finally:
            self._forwarded = before

    return forwarded


def _call_each(children: Iterable[InterpCallback], name: str, *args: Any, **kwargs: Any) -> None:
    """Calls a hook of all; those that clean up are called on all of them even if one raises."""
    first: BaseException | None = None
    for child in children:
        try:
            getattr(child, name)(*args, **kwargs)
        except BaseException as error:
            if name not in CLEANING:
                raise
            first = first or error
    if first is not None:
        raise first


class Family(InterpCallback):
    """Base of callbacks that hold others; not for use by itself.

    Lightning knows only the family; each hook that it calls goes to the children, in their order, and then to the
    family (before the children in `setup` and `on_fit_start`). Children guard their own hooks: one that fails rests,
    and its siblings and the family go on; a family that rests still passes hooks on, so that its children can clean
    up and take part in collectives. The state of the children is kept by their `state_key`.

    Attributes:
        children: The callbacks that are held; may be set until the end of the family's own `setup`.
    """

    _answer = "own_batch_hooks"

    def __init__(self, *, name: str | None = None, on_error: OnError = "warn") -> None:
        """Begins without children; schedules and layers are theirs."""
        super().__init__(name=name, on_error=on_error)
        self.children: list[InterpCallback] = []
        self._forwarded = ""  # the hook that is being passed on
        self._asked: dict[str, list[InterpCallback]] | None = None  # hook of this batch to the children that need it
        self._same = _NONE  # batches for which the answers hold too,
        self._same_step = 0  # up to this step: where the user takes the batches from the loader, their count may stand
        self._due: Collection[str] = ()  # hooks of this batch in which the family itself has something to do
        self._notes: list[tuple[InterpCallback, Note]] = []  # what is done while it dozes,
        self._left = self._last = 0  # for so many batches more, and up to this one
        self._dozing = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the last batch of the last run."""
        self._asked, self._same = None, _NONE
        super().setup(trainer, pl_module, stage)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, _forwarding(vars(cls)[name]))

    @property
    def cost(self) -> float:
        """Seconds that it and its children have taken since the fit began."""
        return super().cost + sum(child.cost for child in self.children)

    def pass_on(self, children: Sequence[InterpCallback], hook: str, *args: Any, **kwargs: Any) -> None:
        """Calls a hook of these children. Outside the guard of the family: on all ranks, whatever has failed."""
        _call_each(children, hook, *args, **kwargs)

    # ------------------------------------------------------------------ one batch

    def _ask(self, trainer: Trainer, batch_idx: int) -> None:
        """A batch begins. On most of them nothing is due, and then none of six hooks of each child is called."""
        if not fits(trainer):
            return
        step = axis_step(trainer)
        if batch_idx in self._same and step <= self._same_step:
            return
        started = self.clock()
        answer = self.batch_hooks(trainer, batch_idx, step, stepping=not accumulates(trainer))
        more = answer.more if trainer.accumulate_grad_batches == 1 else 0
        self._same, self._same_step = range(batch_idx + 1, batch_idx + 1 + more), step + more
        if more:
            self._doze(trainer, batch_idx, step, more)
        self.seconds += self.clock() - started

    def _doze(self, trainer: Any, batch_idx: int, step: int, more: int) -> None:
        """Puts the hooks of a batch out of Lightning's sight for as long as nothing is due but to note results.

        Lightning calls what stands under the name of a hook if it is callable. Each call costs some 3 us in a step that
        has emptied the processor's caches, and what our wrappers do in it as much again.
        """
        asked = self._asked or {}
        noting = asked.get(_END, ())
        if self._due or asked.keys() - {_END}:
            return
        # Whoever has put a hook of his own in the place of one of ours wants it to be called, and so does a callback
        # that holds this one.
        if IN_BATCH & vars(self).keys() or not any(callback is self for callback in trainer.callbacks):
            return
        notes = [(child, child.notes_from(step)) for child in noting]
        self._notes = [(child, note) for child, note in notes if note is not None]
        if len(self._notes) == len(notes):
            self._last, self._left = batch_idx + more, more
            self._dozing = True
            vars(self).update(dict.fromkeys(IN_BATCH))
            vars(self)[_END] = self._while_dozing

    def _while_dozing(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stands in for `on_train_batch_end`; awakes before a batch that may be another than this one.

        Not on the clock: looking at it would take as long as all else here.
        """
        expected = self._last - self._left
        if batch_idx != expected or not self._dozing or trainer.accumulate_grad_batches != 1:
            # Another batch than the one that was foreseen: where the user takes the batches, their count stands or
            # leaps; someone may have taken this callback away for a while, changed the Trainer, or kept this method.
            self._wake()
            type(self).on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx)
            return
        for child, note in self._notes:
            if not child.resting:
                try:
                    note(outputs)
                except Exception as error:
                    stop(child, trainer, error, _END)
        self._left -= 1
        if self._left < 0:
            self._wake()

    def _wake(self) -> None:
        """Puts back what `_doze` put away, and nothing that someone else has put in its place since.

        Also what a copy took along, and what a patch that was made while this dozed brought back later.
        """
        self._dozing, own = False, vars(self)
        for name in IN_BATCH & own.keys():
            if own[name] is None or getattr(own[name], "__func__", None) is type(self)._while_dozing:
                del own[name]

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of the family itself, and those that a child needs; which child needs which is kept."""
        asked: dict[str, list[InterpCallback]] = {}
        self._due, more = self.own_batch_hooks(step)
        for child in self.children:
            try:
                names, child_more = child.batch_hooks(trainer, batch_idx, step, stepping=stepping)
                more = min(more, child_more)
            except Exception:  # whatever is wrong will be said by the hook itself, inside its guard
                names, more = child._batch_hooks, 0
            for name in names:
                asked.setdefault(name, []).append(child)
        self._asked = asked
        return BatchHooks(asked.keys() | set(self._due), more)

    def own_batch_hooks(self, step: int) -> BatchHooks:
        """As `batch_hooks`, of the family without its children."""
        return BatchHooks(self._batch_hooks, more=ALWAYS)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The states of the children that have one, by `state_key`; a child that fails rests and is left out."""
        states = {}
        for child in self.children:
            try:
                states[child.state_key] = child.state_dict()
            except Exception as error:  # Lightning calls this outside the guarded hooks
                child._rest(error, "state_dict")
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hands each child its state; children without one begin anew."""
        for child in self.children:
            if child.state_key in state_dict:
                try:
                    child.load_state_dict(state_dict[child.state_key])
                except Exception as error:
                    child._rest(error, "load_state_dict")


for _name in HOOKS:
    setattr(Family, _name, _forwarding(getattr(Family, _name)))


def with_children(callbacks: Iterable[Any]) -> Iterator[Any]:
    """All callbacks, those inside families too."""
    for callback in callbacks:
        yield callback
        if isinstance(callback, Family):
            yield from with_children(callback.children)
