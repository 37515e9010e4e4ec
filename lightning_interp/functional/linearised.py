"""A network with everything taken out of it but what reaches what: each operation lets everything through, positively.

Under this mode a gradient is non-zero exactly where the output depends on the input by construction of the network,
whatever its weights: no dead ReLU, no maximum that hides its neighbours, no weights that cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_interp.functional import ops

_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "local_response_norm"})
_DROPOUTS = frozenset({
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
})  # fmt: skip
_IDENTITIES = (
    _NORMS | _DROPOUTS | ops.NON_LINEARITIES | {"softmax", "log_softmax", "normalize", "nan_to_num", "softmin"}
) - {"maximum", "minimum"}
_MAXIMA = {f"max_pool{n}d{tail}" for n in (1, 2, 3) for tail in ("", "_with_indices")} | {
    f"lp_pool{n}d" for n in (1, 2, 3)
}
_CONVOLUTIONS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_TRANSPOSED = {
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
_ADAPTIVE = {f"adaptive_{kind}_pool{n}d{tail}": n for kind in ("avg", "max") for n in (1, 2, 3)
             for tail in ("", "_with_indices")}  # fmt: skip
_ADDS = {"iadd", "isub", "sub", "subtract", "rsub", "maximum", "minimum"}

Replacement = Callable[..., Any]


class IrregularError(RuntimeError):
    """Positions see regions of different size, so there is no one receptive field."""


class Linearised(TorchFunctionMode):
    """Replaces operations while a model runs on positive float64 numbers.

    | operation | becomes |
    |---|---|
    | convolution, also transposed, grouped | each output channel is the mean of its group's inputs and taps |
    | linear layer | each output is the mean of the inputs |
    | activation, normalisation, dropout, softmax | the identity |
    | maximum pooling, also over a whole axis | average pooling |
    | adaptive pooling to a size | the pooling with a fixed window that it is for the real image |
    | difference, larger or smaller of two | sum |

    The statistics of normalisation layers are left out: by them alone every position would see the whole image.

    Args:
        pools: Sizes before and after each adaptive pooling, in the order of the calls, as seen with the real image;
            None takes note of them in `pools`.
    """

    def __init__(self, pools: list[tuple[tuple[int, ...], tuple[int, ...]]] | None = None) -> None:
        super().__init__()
        self._known = pools
        self.pools: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the replacement, or the function itself where it has none."""
        kwargs = dict(kwargs or {})
        replacement = self._replacement(ops.base_name(func), args)
        return func(*args, **kwargs) if replacement is None else replacement(func, args, kwargs)

    def _replacement(self, name: str, args: tuple[Any, ...]) -> Replacement | None:
        if name in _ADAPTIVE:
            return lambda func, args, kwargs: self._adaptive(_ADAPTIVE[name], func, args, kwargs)
        both = len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)
        if both and name in _ADDS:
            return lambda func, args, kwargs: args[0] + args[1]
        if not both and name in {"amax", "max"}:
            return _mean
        return _REPLACEMENTS.get(name)

    def _adaptive(self, axes: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The window is that for the real image; how many of them there are depends on the canvas."""
        images = args[0]
        call = len(self.pools)
        before = tuple(images.shape[-axes:])
        if self._known is None:
            wanted = args[1] if len(args) > 1 else kwargs["output_size"]
            after = tuple(wanted) if isinstance(wanted, Sequence) else (wanted,) * axes
            after = tuple(b if a is None else int(a) for a, b in zip(after, before, strict=True))
            self.pools.append((before, after))
        else:
            self.pools.append(self._known[call])
        result = images
        for axis, (real, count) in enumerate(zip(*self.pools[call], strict=True), start=images.ndim - axes):
            result = _pooled(result, axis, real, count)
        return (result, None) if ops.base_name(func).endswith("with_indices") else result


def positive_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers in float64, parameters positive: matrices and kernels small, biases zero, scales one.

    What has a replacement above does not read them; what a model multiplies by itself does.
    """
    return {name: _positive(name, value) for name, value in state.items()}


def _positive(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    if not isinstance(value, torch.nn.Parameter):
        return value.double()
    fill = 0.0 if name.endswith("bias") else 1.0
    if value.ndim > 1:
        fill = 1.0 / max(1, math.prod(value.shape[1:]))
    return torch.full(value.shape, fill, dtype=torch.float64, device=value.device)


def _identity(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A copy, unless the operation writes over its input: who reads that later must find the same numbers."""
    return args[0] if ops.writes(func, kwargs) else args[0].clone()


def _mean(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A maximum over axes; with one axis `max` gives indices too."""
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    keep = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    mean = args[0].mean() if axes is None else args[0].mean(axes, keepdim=keep)
    if ops.base_name(func) == "amax" or axes is None:
        return mean
    return torch.return_types.max((mean, torch.zeros_like(mean, dtype=torch.long)))


def _average(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Maximum pooling as a mean over the same windows, dilation and incomplete windows included."""
    images, *rest = args
    name = ops.base_name(func)
    axes = int(name.split("pool")[1][0])
    names = ("norm_type", "kernel_size", "stride", "ceil_mode") if name.startswith("lp") else (
        "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
    )  # fmt: skip
    options = {**dict(zip(names, rest, strict=False)), **kwargs}
    kernel = _per_axis(options["kernel_size"], axes)
    stride = _per_axis(options.get("stride") or kernel, axes)
    padding, dilation = _per_axis(options.get("padding", 0), axes), _per_axis(options.get("dilation", 1), axes)
    with torch.no_grad():
        out = func(images.detach(), *rest, **kwargs)
        size = (out[0] if isinstance(out, tuple) else out).shape[-axes:]
    sides = [side for p, s in zip(reversed(padding), reversed(stride), strict=True) for side in (p, p + s - 1)]
    flat = F.pad(images, sides).flatten(0, -axes - 1)[:, None]
    weight = torch.full((1, 1, *kernel), 1 / math.prod(kernel), dtype=images.dtype, device=images.device)
    summed = _CONVOLUTIONS[f"conv{axes}d"](flat, weight, None, stride, 0, dilation)
    for axis, length in enumerate(size, start=2):
        summed = summed.narrow(axis, 0, length)
    cut = summed.reshape(*images.shape[:-axes], *size)
    return (cut, None) if isinstance(out, tuple) else cut


def _pooled(images: Tensor, axis: int, real: int, count: int) -> Tensor:
    if count == real:
        return images
    if real % count:
        raise IrregularError(f"adaptive pooling from {real} to {count} positions has windows of different sizes")
    if count == 1:
        return images.mean(axis, keepdim=True)
    window = real // count
    return images.unfold(axis, window, window).mean(-1)


def _convolution(  # noqa: PLR0913, PLR0917 - the signature of the function it replaces
    function: Callable[..., Tensor],
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    means, ones = _grouped(images, weight, groups)
    out = function(means, ones, None, stride, padding, dilation, groups)
    return out.repeat_interleave(weight.shape[0] // groups, dim=-weight.ndim + 1)


def _transposed(  # noqa: PLR0913, PLR0917 - the signature of the function it replaces
    function: Callable[..., Tensor],
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    means, ones = _grouped(images, weight, groups)
    out = function(means, ones, None, stride, padding, output_padding, groups, dilation)
    return out.repeat_interleave(weight.shape[1], dim=-weight.ndim + 1)


def _grouped(images: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The mean of each group's channels, and one kernel of ones over its size for each: channels need no more."""
    axis = images.ndim - weight.ndim + 1
    shape = images.shape
    means = images.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]).mean(axis + 1)
    kernel = weight.shape[2:]
    return means, torch.full((groups, 1, *kernel), 1 / math.prod(kernel), dtype=images.dtype, device=images.device)


def _linear(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return images.mean(-1, keepdim=True).repeat_interleave(weight.shape[0], dim=-1)


def _calling(replacement: Callable[..., Tensor], *first: Any) -> Replacement:
    return lambda func, args, kwargs: replacement(*first, *args, **kwargs)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(v) for v in (values if len(values) == axes else values * axes))


_REPLACEMENTS: dict[str, Replacement] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_MAXIMA, _average),
    **{name: _calling(_convolution, function) for name, function in _CONVOLUTIONS.items()},
    **{name: _calling(_transposed, function) for name, function in _TRANSPOSED.items()},
    "linear": _calling(_linear),
}
