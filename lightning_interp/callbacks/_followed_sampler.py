"""Samplers that note what they yield, for as long as somebody follows them; nothing else about them changes."""

from __future__ import annotations

import copyreg
import functools
from abc import ABCMeta
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic

import torch
from torch import Tensor


class Draws:
    """An iterator of a sampler that remembers the last things it has yielded."""

    def __init__(self, inner: Iterator[Any], kept: int) -> None:
        self._inner = inner
        self._numbers: deque[Tensor | None] = deque(maxlen=kept)
        self._count = 0

    def __iter__(self) -> Draws:
        return self

    def __next__(self) -> Any:
        drawn = next(self._inner)
        self._numbers.append(_numbers(drawn))  # at once: whoever gets a list may change it
        self._count += 1
        return drawn

    def at(self, number: int) -> Tensor | None:
        """The indices of the batch of that number, from 0; None if they are no integers.

        Raises:
            IndexError: If that batch was not handed out, or too long ago.
        """
        place = number - (self._count - len(self._numbers))
        if place < 0:
            raise IndexError(f"batch {number} of {self._count} is not remembered")
        return self._numbers[place]


def _numbers(drawn: Any) -> Tensor | None:
    """One index or a batch of them as int64 (n,); None for anything else."""
    try:
        if isinstance(drawn, Tensor):
            numbers = drawn.detach().to("cpu", copy=True)
        else:
            numbers = torch.tensor(drawn, device="cpu")
    except Exception:  # whatever a sampler yields: it is the user's
        return None
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype is torch.bool)
    return numbers.reshape(-1).long() if numbers.ndim <= 1 and (whole or not numbers.numel()) else None


class _Followed:
    """A sampler whose class is exchanged, and for how many."""

    def __init__(self, sampler: Any, kept: int) -> None:
        self.sampler, self.plain, self.followers = sampler, type(sampler), 0
        self.own = _noting_class(self.plain, kept)
        object.__setattr__(sampler, "__class__", self.own)  # past a `__setattr__` of the user's


_followed: dict[int, _Followed] = {}  # by id, which the strong reference keeps from being given away


def plain_class(sampler: object) -> type:
    """The class that a sampler has when nobody follows it."""
    entry = _followed.get(id(sampler))
    return type(sampler) if entry is None else entry.plain


def follow(sampler: Any, kept: int) -> str | None:
    """Makes a sampler note what it yields, until as many calls of `unfollow`.

    Args:
        sampler: Of a loader: its batch sampler, or its sampler where it has no other.
        kept: How many of the last batches each of its iterators remembers.

    Returns:
        Why that is impossible and what to do, or None.
    """
    if id(sampler) not in _followed:
        plain = type(sampler)
        # A registry of classes must not see ours.
        told = any("__init_subclass__" in vars(base) for base in plain.__mro__ if base not in (object, Generic))
        try:
            if told or type(plain) not in (type, ABCMeta) or not hasattr(plain, "__iter__"):
                raise TypeError
            _followed[id(sampler)] = _Followed(sampler, kept)
        except TypeError:
            return (
                f"a sampler of type {plain.__name__} can't be followed; use a subclass of torch.utils.data.Sampler "
                "with a method `__iter__`"
            )
    _followed[id(sampler)].followers += 1
    return None


def unfollow(sampler: Any) -> None:
    """The inverse of `follow`; its iterators that are in use go on as before. Leaves alone what nobody follows."""
    entry = _followed.get(id(sampler))
    if entry is None:
        return
    entry.followers -= 1
    if not entry.followers:
        del _followed[id(sampler)]
        if type(sampler) is entry.own:
            object.__setattr__(sampler, "__class__", entry.plain)


def _noting_class(plain: Any, kept: int) -> type:
    """A subclass that looks the same, notes what is yielded, and whose copies and pickles are of the plain class."""

    def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
        return Draws(plain.__iter__(self), kept)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        return _reduced_as(plain, own, plain.__reduce_ex__(self, protocol))

    same = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**same, "__slots__": (), "__iter__": __iter__, "__reduce_ex__": __reduce_ex__}
    own: type = type(plain)(plain.__name__, (plain,), body)
    return own


def _reduced_as(plain: type, own: type, reduced: Any) -> Any:
    """The result of `__reduce_ex__` with another class; pickle checks the class that `copyreg`'s makers get."""
    if not isinstance(reduced, tuple):
        return reduced
    make, arguments, *rest = reduced
    make = plain if make is own else make
    arguments = tuple(plain if argument is own else argument for argument in arguments)
    if make in (copyreg.__newobj__, copyreg.__newobj_ex__):  # type: ignore[attr-defined]
        make, arguments = functools.partial(make, arguments[0]), arguments[1:]
    return make, arguments, *rest
