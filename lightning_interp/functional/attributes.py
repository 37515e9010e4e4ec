"""What modules keep beside parameters and buffers, and what a forward may change: counters, generators, lists."""

from __future__ import annotations

import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Cleanup = Callable[[], None]

_EVERY_MODULE = frozenset(vars(nn.Module()))
_NEVER_CHANGES = frozenset((bool, int, float, complex, str, bytes, tuple, type(None)))
_SEQUENCES = (list, deque)
_TABLES = (dict, OrderedDict, defaultdict, Counter)
_DEPTH = 3  # lists in lists in lists
_GENERATORS = (torch.Generator, np.random.RandomState, np.random.Generator, random.Random)
_LARGE = 1 << 23  # values: data, and no state that a forward changes
_MANY = 1000  # entries of a list beyond which only the list itself is kept, not what is in it


def keep_attributes(model: nn.Module) -> Cleanup:
    """Remembers the attributes of all modules; the returned function puts them back.

    Numbers, strings and references as they were; tensors and arrays with their values; generators with their states;
    lists, dictionaries and sets with their entries. New attributes are taken away. Generators that are global in the
    files of the modules' classes are kept too. Left alone is what lies inside objects of other classes or elsewhere
    outside of the modules, and tensors and arrays of more than eight million values.
    """
    kept = [(vars(module), dict(vars(module))) for module in model.modules()]
    cleanups = [
        cleanup
        for _, before in kept
        for name, value in before.items()
        if type(value) not in _NEVER_CHANGES and name not in _EVERY_MODULE
        for cleanup in _keep(value, _DEPTH)
    ]
    cleanups += [cleanup for value in _generators_beside(model) for cleanup in _keep_numbers(value)]

    def put_back() -> None:
        for attributes, before in kept:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for cleanup in cleanups:
            cleanup()

    return put_back


def write_back(tensor: Tensor, value: Tensor) -> None:
    """Puts values back where they were.

    Through `.data`, which does not count `_version` up: autograd may have saved the tensor for a backward to come. An
    expanded tensor can't be written to, by the model as little as by us.
    """
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return
    with torch.inference_mode(tensor.is_inference()):
        tensor.data.copy_(value)


def _generators_beside(model: nn.Module) -> list[Any]:
    """Generators that are global in the files in which the classes of the modules are defined."""
    files = {base.__module__ for kind in {type(module) for module in model.modules()} for base in kind.__mro__}
    tables = [vars(sys.modules[name]) for name in files if name in sys.modules]
    return [value for table in tables for value in list(table.values()) if type(value) in _GENERATORS]


def _keep(value: Any, depth: int) -> Iterator[Cleanup]:
    """What puts one attribute back into the state that it is in."""
    kind = type(value)
    if kind in _SEQUENCES:
        entries = list(value)
        yield partial(_refill, value, entries)
        yield from _keep_all(entries, depth)
    elif kind in _TABLES:
        table = dict(value)
        yield partial(_refill_table, value, table)
        yield from _keep_all(list(table.values()), depth)
    elif kind is set:
        yield partial(_refill_set, value, set(value))
    else:
        yield from _keep_numbers(value)


def _keep_numbers(value: Any) -> Iterator[Cleanup]:
    """Those of a tensor or an array, or the state of a generator."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.layout is torch.strided and value.numel() <= _LARGE:
            yield partial(write_back, value, value.detach().clone())
    elif isinstance(value, np.ndarray):
        if value.flags.writeable and value.size <= _LARGE:
            yield partial(np.copyto, value, value.copy())
    elif isinstance(value, torch.Generator | np.random.RandomState):
        put: Callable[[Any], Any] = value.set_state
        yield partial(put, value.get_state())
    elif isinstance(value, np.random.Generator):
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())


def _keep_all(values: list[Any], depth: int) -> Iterator[Cleanup]:
    if depth and len(values) <= _MANY:
        for value in values:
            if type(value) not in _NEVER_CHANGES:
                yield from _keep(value, depth - 1)


def _refill(sequence: Any, entries: list[Any]) -> None:
    if len(sequence) != len(entries) or any(map(operator.is_not, sequence, entries)):
        sequence.clear()
        sequence.extend(entries)


def _refill_table(table: Any, entries: dict[Any, Any]) -> None:
    same = len(table) == len(entries) and not any(map(operator.is_not, table.values(), entries.values()))
    if not same or any(map(operator.is_not, table, entries)):
        table.clear()
        table.update(entries)


def _refill_set(members: set[Any], before: set[Any]) -> None:
    members.clear()
    members.update(before)
