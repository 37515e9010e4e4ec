"""Other rules for the backward pass through activations: guided backpropagation and the deconvnet.

Every spelling of an activation is caught where torch dispatches functions, so `nn.ReLU`, `nn.ReLU(inplace=True)`, one
module used twice, `F.relu`, `torch.relu` and `x.relu_()` are all the same; no hook is put on any module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_interp.functional import ops

Rule = Literal["guided_backprop", "deconvnet"]

RECTIFIERS = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish",
    "softplus",
})  # fmt: skip
"""Activations that let large inputs through and hold small ones back; gates (sigmoid, tanh) are none."""


class Rectifiers(TorchFunctionMode):
    """While it is entered, the gradient through each activation follows another rule than the chain rule.

    | rule | gradient R behind an activation f, input x | source |
    |---|---|---|
    | `guided_backprop` | f'(x) * max(R, 0) | Springenberg et al. 2014, section 3.4 |
    | `deconvnet` | max(R, 0) | Zeiler and Fergus 2013, section 2.1 |

    For ReLU f'(x) is [x > 0], as in the paper; for others (ReLU6, GELU, SiLU, ...) it is their own derivative. The
    values of the forward do not change. Enter it around the forward; the backward may run later.

    Not seen: a ReLU written as a product (`x * (x > 0)`), as a maximum of two tensors, or inside TorchScript.

    Attributes:
        count: Activations seen so far; 0 means that the result is the plain gradient.
    """

    def __init__(self, rule: Rule) -> None:
        """Takes the rule."""
        super().__init__()
        self.rule = rule
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function; where it is an activation, its gradient gets the rule."""
        kwargs = dict(kwargs or {})
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        name = ops.activation_name(ops.base_name(func), args, kwargs)
        if name not in RECTIFIERS or not args or not isinstance(args[0], Tensor) or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0]
        if self.rule == "deconvnet" and x.requires_grad and torch.is_grad_enabled():
            in_place = ops.writes(func, kwargs)
            # Activation checkpointing compares what is saved for the backward with what a forward without us saves. So
            # it is saved here too; the result is let go.
            func(x.clone() if in_place else x, *args[1:], **kwargs)
            return _PassPositive.apply(x, lambda tensor: func(tensor, *args[1:], **kwargs), in_place)
        result = func(*args, **kwargs)
        if result.requires_grad:
            result.register_hook(_positive)
        return result


def _positive(gradient: Tensor) -> Tensor:
    return gradient.clamp(min=0)


class _PassPositive(torch.autograd.Function):
    """The activation going forward; going back, whatever of the gradient is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor], in_place: bool) -> Tensor:
        result = activation(x)
        if in_place:
            ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _positive(gradients[0]), None, None
