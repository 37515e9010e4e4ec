"""Remembers how the loss of a training step came about, so that it can be computed again after the update.

The tape holds the calls of whole modules and the few functions between and behind them (`squeeze`, `log_softmax`, the
loss, sums of losses). Tensors are followed by identity: what can't be traced to recorded calls is not replayed, so a
replay is exact or does not happen. `training_step` itself is never called again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lightning_interp.functional.hooks import in_backward
from lightning_interp.functional.losses import LOSSES, LossCapture
from lightning_interp.functional.ops import PRODUCTS, RESHAPES, SUMS, base_name

# Deterministic functions without state of their own: all that stands between a network, its head and its loss.
_FUNCTIONS = RESHAPES | SUMS | PRODUCTS | frozenset({
    "permute", "transpose", "getitem", "stack", "cat", "contiguous", "clone", "to", "float", "double", "half",
    "bfloat16", "log_softmax", "softmax", "logsigmoid", "sigmoid", "tanh", "relu", "gelu", "silu", "exp", "log", "neg",
    "clamp", "mean", "sum", "pow", "sqrt", "adaptive_avg_pool2d", "avg_pool2d", "normalize",
})  # fmt: skip
_MOST_ENTRIES = 256
_SUM_TO_ONE = 1e-3  # how near the sums of probabilities are, in 16 bits too


class Slot(NamedTuple):
    """A tensor that the tape can make again: one leaf of the output of one entry."""

    entry: int
    leaf: int


class UntraceableError(Exception):
    """A tensor depends on the weights in a way that was not recorded."""


@dataclass
class Entry:
    """One recorded call.

    Attributes:
        function: A module, or a function of `_FUNCTIONS` or `LOSSES`.
        leaves: Its arguments, flattened, with a `Slot` for each tensor that the tape makes.
        spec: How to put the arguments together again.
        versions: Tensors among the arguments that must not have been written to since.
        loss: Whether a recognised loss function took part in it or in what it depends on.
        modes: Train/eval flags of all modules inside, as they were.
        generators: States of the generators as they were, None for functions.
        autocast: Whether autocast was on, and its dtype.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    versions: list[tuple[Tensor, int]]
    loss: bool
    modes: list[tuple[nn.Module, bool]]
    generators: tuple[Any, ...] | None
    autocast: tuple[bool, torch.dtype] | None

    @property
    def parents(self) -> set[int]:
        """Entries whose outputs it reads."""
        return {leaf.entry for leaf in self.leaves if isinstance(leaf, Slot)}

    @property
    def stale(self) -> bool:
        """Whether something wrote over its arguments."""
        return any(tensor._version != version for tensor, version in self.versions)


class Tape(LossCapture):
    """Records a training step while it is on.

    `begin` and `finish` are called before and after each call of the modules that are recorded as a whole; functions
    outside of them are seen through the mode.

    Args:
        device: Of the model; its generator and its autocast are remembered.

    Attributes:
        seconds: What recording took, inside the user's step.
        normalised: 0-d, 1 if the scores of the last cross-entropy are probabilities already, else 0; None without one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.normalised: Tensor | None = None
        self.entries: list[Entry] = []
        self.seconds = 0.0
        self._device = device
        self._open: list[tuple[Entry | None, int]] = []
        self._made: dict[int, tuple[Tensor, int, Slot]] = {}  # strong: an identity must not be given away again

    # ------------------------------------------------------------------ recording

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, record: bool = True) -> None:
        """A module is called, to be recorded as a whole or not at all; calls inside of another one belong to that."""
        entry = None
        if record and not self._open and torch.is_grad_enabled() and not in_backward():
            entry = self.guarded(lambda: self._record(module, args, kwargs))
        self._open.append((entry, len(self.calls)))

    def finish(self, output: Any) -> None:
        """The module that began last has returned, or raised (then the output is None)."""
        entry, calls = self._open.pop() if self._open else (None, 0)
        if entry is not None:
            entry.loss |= len(self.calls) > calls
            self.guarded(lambda: self._keep(entry, output))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function as it is, and records it if it only passes recorded tensors on."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        entry = None
        if not self._open and self._made and (func in LOSSES or base_name(func) in _FUNCTIONS) and not in_backward():
            entry = self.guarded(lambda: self._record(func, args, dict(kwargs)))
        output = super().__torch_function__(func, types, args, kwargs)
        if entry is not None and entry.parents:
            self.guarded(lambda: self._keep(entry, output))
        return output

    def _note(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        known = len(self.calls)
        super()._note(func, args, kwargs, output)
        scores = self.calls[-1].scores if len(self.calls) > known else None
        if func is cross_entropy and scores is not None and scores.ndim > 1:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                rows = scores.detach()
                one = ((rows.sum(dim=1) - 1).abs() < _SUM_TO_ONE).all()
                self.normalised = ((rows >= 0).all() & one).float()

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Runs our own code inside the user's step; an error of ours is kept in `error`, not raised there."""
        if self.error is not None or len(self.entries) >= _MOST_ENTRIES:
            return None
        started = time.perf_counter()
        try:
            return work()
        except UntraceableError:
            return None
        except Exception as error:  # reported by whoever owns the tape
            self.error = error
            return None
        finally:
            self.seconds += time.perf_counter() - started

    def _record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The call as it is before it runs: it may write over its arguments."""
        leaves, spec = tree_flatten((args, kwargs))
        resolved = [self._resolve(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        slots = [leaf for leaf in resolved if isinstance(leaf, Slot)]
        modules = list(function.modules()) if isinstance(function, nn.Module) else []
        return Entry(
            function=function,
            leaves=resolved,
            spec=spec,
            versions=[(leaf, leaf._version) for leaf in resolved if isinstance(leaf, Tensor) and _is_data(leaf)],
            loss=function in LOSSES or any(self.entries[slot.entry].loss for slot in slots),
            modes=[(module, module.training) for module in modules],
            generators=generator_states(self._device) if modules else None,
            autocast=_autocast_state(self._device),
        )

    def _resolve(self, tensor: Tensor) -> Any:
        slot = self.find(tensor)
        if slot is not None:
            return slot
        if tensor.requires_grad and not tensor.is_leaf:
            raise UntraceableError
        # A single number is cheap to keep: the scale of mixed precision is written over with each step.
        return tensor.clone() if tensor.numel() == 1 and not tensor.requires_grad else tensor

    def _keep(self, entry: Entry, output: Any) -> None:
        """Follows the tensors that came out, if they lead back to the weights."""
        out = tree_leaves(output)
        tensors = [(i, leaf) for i, leaf in enumerate(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
        constants = {id(leaf) for leaf in entry.leaves if isinstance(leaf, Tensor)}
        # An operation that writes into something of the user's can't be done twice.
        if not tensors or (entry.generators is None and any(id(leaf) in constants for _, leaf in tensors)):
            return
        self.entries.append(entry)
        for index, leaf in tensors:
            self._made[id(leaf)] = leaf, leaf._version, Slot(len(self.entries) - 1, index)

    # ------------------------------------------------------------------ reading

    def find(self, tensor: Tensor) -> Slot | None:
        """Where the tensor comes from, if the tape made it and nothing wrote over it since."""
        made = self._made.get(id(tensor))
        if made is None or made[0] is not tensor or made[1] != tensor._version:
            return None
        return made[2]

    def losses(self) -> list[tuple[Slot, Tensor]]:
        """All single numbers that a recognised loss led to, oldest first, with their values."""
        return [
            (slot, tensor.detach())
            for tensor, version, slot in self._made.values()
            if tensor.numel() == 1 and tensor._version == version and self.entries[slot.entry].loss
        ]

    def strip(self) -> None:
        """Lets go of the tensors that were followed; what is needed for a replay stays."""
        self._made.clear()

    def replay(self, slot: Slot) -> Tensor | None:
        """Makes a tensor again, with the weights of now.

        To be called where the model is kept undisturbed: generators and train/eval flags are set, not put back.

        Returns:
            The tensor; None if the step wrote over something that is needed.
        """
        needed = self._ancestors(slot.entry)
        if any(self.entries[index].stale for index in needed):
            return None
        made: dict[int, list[Any]] = {}
        for index in needed:
            entry = self.entries[index]
            leaves = [made[leaf.entry][leaf.leaf] if isinstance(leaf, Slot) else leaf for leaf in entry.leaves]
            args, kwargs = tree_unflatten(leaves, entry.spec)
            for module, training in entry.modes:
                module.training = training
            if entry.generators is not None:
                set_generator_states(self._device, entry.generators)
            with _autocast(self._device, entry.autocast):
                made[index] = tree_leaves(entry.function(*args, **kwargs))
        result = made[slot.entry][slot.leaf]
        return result.detach() if isinstance(result, Tensor) else None

    def _ancestors(self, entry: int) -> list[int]:
        found, waiting = set(), [entry]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting.extend(self.entries[index].parents)
        return sorted(found)


def _is_data(tensor: Tensor) -> bool:
    """Whether a replay needs the values of then: of parameters it needs those of now."""
    return not isinstance(tensor, nn.Parameter) and not tensor.is_inference()


def generator_states(device: torch.device) -> tuple[Any, ...]:
    """States of the generators of python, numpy, torch and the device."""
    own = None
    if device.type == "cuda":
        own = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        own = torch.mps.get_rng_state()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own


def set_generator_states(device: torch.device, states: tuple[Any, ...]) -> None:
    """The inverse of `generator_states`."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[3], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[3])


def _autocast_state(device: torch.device) -> tuple[bool, torch.dtype] | None:
    if not torch.amp.is_autocast_available(device.type):
        return None
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _autocast(device: torch.device, state: tuple[bool, torch.dtype] | None) -> AbstractContextManager[Any]:
    if state is None:
        return nullcontext()
    enabled, dtype = state
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
