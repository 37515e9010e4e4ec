"""A callback that holds other callbacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning_interp.callbacks._guarding import CLEANING, HOOKS
from lightning_interp.callbacks.base import InterpCallback, OnError

# The family goes first: it makes its children in `setup`, and puts the restored history in place before they write.
_OWN_FIRST = frozenset({"setup", "on_fit_start"})


def _forwarding(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a (guarded) hook so that the children get it too, whether or not the family itself is resting."""
    name = hook.__name__

    @functools.wraps(hook)
    def forwarded(self: Family, *args: Any, **kwargs: Any) -> None:
        if self._forwarded == name:  # the hook of a parent class, called through super()
            hook(self, *args, **kwargs)
            return
        before, self._forwarded = self._forwarded, name
        try:
            if name in _OWN_FIRST:
                hook(self, *args, **kwargs)
            self.pass_on(name, *args, **kwargs)
            if name not in _OWN_FIRST:
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

    def __init__(self, *, name: str | None = None, on_error: OnError = "warn") -> None:
        """Begins without children; schedules and layers are theirs."""
        super().__init__(name=name, on_error=on_error)
        self.children: list[InterpCallback] = []
        self._forwarded = ""  # the hook that is being passed on

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, _forwarding(vars(cls)[name]))

    @property
    def cost(self) -> float:
        """Seconds that it and its children have taken since the fit began."""
        return super().cost + sum(child.cost for child in self.children)

    def pass_on(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Calls a hook of the children. Outside the guard of the family: on all ranks, whatever has failed."""
        _call_each(self.children, hook, *args, **kwargs)

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
