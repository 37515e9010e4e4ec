"""Remembers which tensors hold the output of a filter layer, and which of them nobody has read yet."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_interp.functional.units import End, Reader, Strand, Unit

Strands = tuple[Strand, ...]


class StrandBook:
    """The strands of one forward, by tensor.

    Tensors are known by identity and held weakly, but for those that only a loss, or a number for a log, has read.

    Args:
        units: By name; looked up only.
        reader: Called with each `End`, under no_grad.
    """

    def __init__(self, units: dict[str, Unit], reader: Reader) -> None:
        self._units = units
        self._reader = reader
        self._strands: dict[int, tuple[weakref.ref[Tensor], Strands]] = {}
        self._unread: set[int] = set()
        self._postponed: list[tuple[weakref.ref[Tensor], Tensor, Strands]] = []
        self._ended: set[int] = set()
        self._calls = 0

    @property
    def empty(self) -> bool:
        """Whether nothing is followed at the moment."""
        return not self._strands

    def next_call(self) -> int:
        """A number for a call of a layer: a layer that is used twice has two ends."""
        self._calls += 1
        return self._calls

    def of(self, tensor: Tensor) -> Strands:
        """The strands of a tensor, none if it is not followed."""
        entry = self._strands.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else ()

    def among(self, args: tuple[Any, ...]) -> list[Tensor]:
        """Those of an argument list, one level of lists deep, that are followed."""
        found = []
        for value in args:
            if isinstance(value, Tensor):
                if self.of(value):
                    found.append(value)
            elif isinstance(value, list | tuple):
                found += [each for each in tensors_in(value) if self.of(each)]
        return found

    def put(self, tensor: Tensor, strands: Strands) -> None:
        """Follows a tensor from now on."""
        self._strands[id(tensor)] = (weakref.ref(tensor), strands)
        self._unread.add(id(tensor))

    def forget(self, tensor: Tensor) -> None:
        """Follows a tensor no more: it has become something else."""
        self._strands.pop(id(tensor), None)

    def clear(self) -> None:
        """Forgets all; the forward is over."""
        self._strands.clear()
        self._unread.clear()
        self._postponed.clear()
        self._ended.clear()

    def read(self, *tensors: Tensor) -> None:
        """Something that goes on with these tensors has read them."""
        self._unread.difference_update(map(id, tensors))
        if self._postponed:
            read_now = set(map(id, tensors))
            self._postponed = [entry for entry in self._postponed if id(entry[0]()) not in read_now]

    def end(self, *tensors: Tensor) -> None:
        """Something that is not the filter's alone reads these tensors: they are what counts."""
        for tensor in tensors:
            for strand in self.of(tensor):
                self.end_strand(strand, tensor)
            self.read(tensor)

    def postpone(self, tensors: list[Tensor]) -> None:
        """A single number was made of these tensors: a loss, or a number for a log.

        If nothing else reads them until the forward is over it was a loss, and by then they may be gone.
        """
        for tensor in tensors:
            if id(tensor) in self._unread and any(strand.unit is not None for strand in self.of(tensor)):
                self._unread.discard(id(tensor))
                self._postponed.append((weakref.ref(tensor), tensor.detach(), self.of(tensor)))

    def finish(self) -> None:
        """Ends the outputs of the last layers, which nothing has read; not the copies that somebody's hook keeps."""
        ended = set(self._ended)
        unread = [self._strands[key] for key in self._unread if key in self._strands]
        waiting = [(tensor, strands) for reference, strands in unread if (tensor := reference()) is not None]
        for tensor, strands in [*waiting, *((tensor, strands) for _, tensor, strands in self._postponed)]:
            for strand in strands:
                if strand.call not in ended:
                    self.end_strand(strand, tensor)

    def end_strand(self, strand: Strand, tensor: Tensor) -> None:
        """Ends one unit without a non-linearity. A sum without one is no unit."""
        if strand.unit is not None and self._units[strand.unit].kind != "sum":
            self.hand_over(strand, None, tensor)

    def hand_over(self, strand: Strand, activation: str | None, tensor: Tensor) -> None:
        """Gives the reader an activation."""
        if strand.unit is not None and strand.layout.fits(tensor.shape) and tensor.numel():
            self._ended.add(strand.call)
            with torch.no_grad():
                self._reader(End(strand.unit, activation, tensor.detach(), strand.layout))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument list, one level of lists deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, list | tuple):
                yield from (tensor for tensor in item if isinstance(tensor, Tensor))
