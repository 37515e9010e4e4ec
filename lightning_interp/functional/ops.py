"""How each operation treats the channels of a tensor, by its name.

Every spelling of an operation (`F.relu`, `torch.relu`, `x.relu()`, `x.relu_()`, `nn.ReLU`) reaches a
`TorchFunctionMode` under one base name, so the tables hold names, not functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

OWNERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
"""Modules whose output channels are filters (or units)."""

NON_NEGATIVE = frozenset({"relu", "relu6", "hardsigmoid", "sigmoid", "softplus", "square", "exp", "abs"})
"""Non-linearities whose output is never below zero: one maximum tells whether a channel is zero."""

EXACT_ZERO = frozenset({"relu", "relu6", "hardsigmoid", "hardswish", "hardshrink", "softshrink"})
"""Non-linearities that map a whole region to exactly zero."""

NON_LINEARITIES = EXACT_ZERO | NON_NEGATIVE | frozenset({
    "hardtanh", "threshold", "clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "leaky_relu", "prelu",
    "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "softsign", "tanhshrink", "logsigmoid", "pow",
    "sin", "cos", "erf", "log1p", "sinc", "atan",
})  # fmt: skip
"""Element-wise non-linearities."""

KEEP = frozenset({
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "local_response_norm",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d", "lp_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices",
    "pad", "constant_pad_nd", "interpolate", "upsample", "contiguous", "clone", "to", "float", "half",
    "bfloat16", "double", "type", "type_as", "cuda", "cpu", "neg", "negative",
})  # fmt: skip
"""Normalisation, pooling, dropout, padding, resizing, copies: the channel axis stays where it is."""

OVERHEARD = frozenset({"get", "detach", "numpy", "register_hook", "retain_grad", "requires_grad"})
"""Reads that are no part of the network: attributes, copies for a log."""

RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"})
POOLING_REDUCTIONS = frozenset({"mean", "amax", "sum"})
SUMS = frozenset({"add", "radd", "iadd", "sub", "rsub", "isub", "subtract"})
PRODUCTS = frozenset({"mul", "rmul", "imul", "div", "truediv", "itruediv", "multiply", "divide", "true_divide"})
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})


COMBINATIONS = SUMS | PRODUCTS


@functools.lru_cache(maxsize=2048)
def base_name(func: Any) -> str:
    """Name of an operation without the marks of its spelling.

    Example:
        >>> import torch
        >>> base_name(torch.relu_), base_name(torch.Tensor.__iadd__), base_name(torch.nn.functional.relu)
        ('relu', 'iadd', 'relu')
    """
    return str(getattr(func, "__name__", "")).strip("_")


def activation_name(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """`relu` for what is a ReLU in disguise (`clamp(min=0)`, `hardtanh(0, 6)`, `threshold(0, 0)`), else the name."""
    if name in {"clamp", "clip", "clamp_min"}:
        low = args[1] if len(args) > 1 else kwargs.get("min")
        return "relu" if isinstance(low, int | float) and low == 0 else name
    if name == "hardtanh":
        low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
        return "relu6" if low == 0 else name
    if name == "threshold":
        values = [*args[1:3], *(kwargs[key] for key in ("threshold", "value") if key in kwargs)]
        return "relu" if all(value == 0 for value in values) else name
    return name


def writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes over its input: `add_`, `__iadd__`, `inplace=True`, `out=`."""
    return _is_in_place(func) or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


@functools.lru_cache(maxsize=2048)
def _is_in_place(func: Any) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")
