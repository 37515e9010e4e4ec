"""Hooks that do no harm: copies of a model do not carry them along, and they know whose calls to ignore."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""In eval mode these take a fast path, which rounds differently, only if no mode is on and no hook inside them."""


class QuietHook:
    """A hook that a deep copy or a pickle of the model replaces by one that does nothing.

    Example:
        >>> import copy
        >>> copy.deepcopy(QuietHook(print))("module", "args", "output") is None
        True
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Calls the function; returns nothing, since a result would replace the module's output."""
        self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return functools.partial(sys.audit, "lightning_interp.inert_hook")

    def __reduce__(self) -> Any:
        # A partial of a builtin: it returns None, and a checkpoint that holds it loads without this package.
        return functools.partial, (sys.audit, "lightning_interp.inert_hook")


def leave_mode(mode: TorchFunctionMode) -> None:
    """Takes a mode off the stack wherever it is, a user's mode above it included; does nothing if it is not on."""
    stack = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    if mode not in stack:
        return
    above = stack[stack.index(mode) + 1 :]
    for _ in range(len(above) + 1):
        torch._C._pop_torch_function_stack()
    for other in above:
        torch._C._push_on_torch_function_stack(other)


def in_backward() -> bool:
    """Whether autograd is running: activation checkpointing repeats forwards there."""
    return torch._C._current_graph_task_id() != -1
