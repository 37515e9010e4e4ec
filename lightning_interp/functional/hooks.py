"""Hooks that do no harm: copies of a model do not carry them along, and they know whose calls to ignore."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""In eval mode these take a fast path, which rounds differently, only if no mode is on and no hook inside them."""
_CALLS = ("forward", "training_step", "validation_step")


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
        """Calls the function; returns nothing, since a result would replace the module's output.

        Not while a compiler traces the call: it would break the graph, or stay in it after the hook is gone.
        """
        if not torch.compiler.is_compiling():
            self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return functools.partial(sys.audit, "lightning_interp.inert_hook")

    def __reduce__(self) -> Any:
        # A partial of a builtin: it returns None, and a checkpoint that holds it loads without this package.
        return functools.partial, (sys.audit, "lightning_interp.inert_hook")


def enter_mode(mode: TorchFunctionMode, above: Sequence[TorchFunctionMode]) -> None:
    """Puts a mode on as if it had been entered when those in `above` were on, and nothing else.

    What has been entered since stays on top of it: whoever takes the topmost off must find their own. A default device
    stays at the very bottom.
    """
    stack = function_stack()
    default = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    depth = 0
    while depth < len(stack) and (stack[depth] in above or stack[depth] is default):
        depth += 1
    for _ in stack[depth:]:
        torch._C._pop_torch_function_stack()
    for other in (mode, *stack[depth:]):
        torch._C._push_on_torch_function_stack(other)


def function_stack() -> list[TorchFunctionMode]:
    """The modes that are on, the topmost last."""
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def leave_mode(mode: TorchFunctionMode) -> None:
    """Takes a mode off the stack wherever it is, a user's mode above it included; does nothing if it is not on."""
    stack = function_stack()
    if mode not in stack:
        return
    above = stack[stack.index(mode) + 1 :]
    for _ in range(len(above) + 1):
        torch._C._pop_torch_function_stack()
    for other in above:
        torch._C._push_on_torch_function_stack(other)


def is_compiled(module: nn.Module) -> bool:
    """Whether calling it runs compiled code: hooks put inside it now would never be called, silently."""
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return True
    if getattr(module, "_compiler_ctx", None) is not None:  # Lightning's, of `fit(torch.compile(model))`
        return True
    calls = [vars(module).get(name, getattr(type(module), name, None)) for name in _CALLS]
    return any(hasattr(call, "_torchdynamo_orig_callable") for call in calls)


def anything_compiled() -> bool:
    """Whether a compiler has been at work in this process: if not, a module that is silent was not called."""
    return bool(work_of_compiler())


def work_of_compiler() -> int:
    """A number that changes with everything that is compiled in this process; 0 if nothing was."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return 0
    # The second counts functions in one graph too, which the first does not.
    return int(utils.counters["frames"]["total"] + utils.counters["stats"]["unique_graphs"])


def in_backward() -> bool:
    """Whether autograd is running: activation checkpointing repeats forwards there."""
    return torch._C._current_graph_task_id() != -1
