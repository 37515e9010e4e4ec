"""Keeps the model and the generators undisturbed while something runs a forward of its own."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_interp.functional.attributes import Cleanup, keep_attributes, write_back


@contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the states of the generators of torch, CUDA, MPS, numpy and python back, also after an exception."""
    numpy_state, python_state, cpu_state = np.random.get_state(), random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


def _keep_modules(model: nn.Module) -> Cleanup:
    """Remembers train/eval flag, buffers, gradients and `requires_grad`; the returned function puts them back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    parameters = [(each, each.grad, each.requires_grad) for each in model.parameters() if not is_lazy(each)]

    def put_back() -> None:
        for module, training in modes:
            module.training = training  # not .train(): that would thaw a frozen child
        for parameter, gradient, requires_grad in parameters:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            # Always: batch normalisation updates its statistics without counting `_version` up.
            write_back(buffer, value)

    return put_back


def shapeless(model: nn.Module) -> list[str]:
    """Names of the lazy layers that no forward has given a shape yet; the first one does, and draws their weights."""
    return [
        name
        for name, module in model.named_modules()
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()))
    ]


def _mute(model: nn.Module) -> Cleanup:
    """Silences `self.log` and `self.log_dict`: a user's forward may call them, and that is allowed in few hooks."""
    names = [name for name in ("log", "log_dict") if callable(getattr(model, name, None))]
    shadowed = {name: model.__dict__[name] for name in names if name in model.__dict__}
    for name in names:
        model.__dict__[name] = _nothing

    def unmute() -> None:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(shadowed)

    return unmute


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log`."""


_level = threading.local()


def nesting() -> int:
    """How many `undisturbed` regions this thread is in: who listens to the user's forward must not hear ours."""
    return getattr(_level, "value", 0)


@contextmanager
def _own_forward() -> Iterator[None]:
    _level.value = nesting() + 1
    try:
        yield
    finally:
        _level.value = nesting() - 1


@contextmanager
def undisturbed(model: nn.Module, *, training: bool | None = False, gradients: bool = False) -> Iterator[None]:
    """A region in which the model may be called, after which it is as it was, also after an exception.

    Kept and put back: generator states of torch, CUDA, numpy and python, the train/eval flag of each module, buffers
    (BatchNorm statistics), `.grad`, `requires_grad`, and what modules keep in attributes (`attributes.py` says what).
    Inside, inference mode and autocast are off, compiled modules run eagerly, and the module's `log` is mute.

    Args:
        model: Any module; hooks on it stay on.
        training: Mode to set on all modules; None leaves each as it is.
        gradients: Whether autograd records.
    """
    with ExitStack() as stack:
        stack.enter_context(_own_forward())
        stack.enter_context(generators_kept())
        stack.callback(keep_attributes(model))
        stack.callback(_keep_modules(model))
        stack.callback(_mute(model))
        if training is not None:
            for module in model.modules():
                module.training = training
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        if "torch._dynamo" in sys.modules:  # importing it costs a second, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def tensors_to(value: Any, device: torch.device) -> Any:
    """A copy of a nested batch with its tensors on `device`, fit for autograd (no inference tensors)."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: tensors_to(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tensors_to(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(tensors_to(item, device) for item in value)
    return value
