"""Counts the time spent inside hooks, ours and those of other tools alike.

What Python and torch take to call a hook is not in it, nor is the look that our function modes take at each torch
function; both are in the paired ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.overhead.timing import Stopwatch
from lightning_interp.callbacks._tape import Tape
from lightning_interp.functional.tracing import ActivationTracer

_REGISTERS: tuple[tuple[Any, str], ...] = (
    (nn.Module, "register_forward_hook"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_full_backward_hook"),
    (torch.Tensor, "register_hook"),
)
# All that our function modes do within a forward goes through these.
_GUARDS: tuple[tuple[Any, str], ...] = ((ActivationTracer, "_guard"), (Tape, "guarded"))


@contextmanager
def listening(stopwatch: Stopwatch) -> Iterator[None]:
    """Hooks that are registered meanwhile are counted whenever they run."""
    with ExitStack() as stack:
        for owner, name in _REGISTERS:
            stack.enter_context(patch.object(owner, name, _registering(getattr(owner, name), stopwatch)))
        for owner, name in _GUARDS:
            stack.enter_context(patch.object(owner, name, stopwatch.wrap(getattr(owner, name))))
        yield


def _registering(register: Callable[..., Any], stopwatch: Stopwatch) -> Callable[..., Any]:
    def registering(self: Any, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return register(self, stopwatch.wrap(hook), *args, **kwargs)

    return registering
