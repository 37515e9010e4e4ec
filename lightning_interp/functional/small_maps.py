"""Convolutions of small maps with many weights, on a CPU: with the channels first, whatever the layout of the maps.

With the channels last PyTorch brings the weights into that order for each call. Where they are more numbers than the
maps, this takes longer than the convolution itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_interp.functional.hooks import anything_compiled


def convolve(func: Callable[..., Tensor], maps: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `func` gives, up to rounding, and in the layout in which it gives it.

    Args:
        func: A convolution in two dimensions.
        maps: (N, C, H, W), the input.
        weight: (K, C / groups, h, w).
        args: What else it takes.
        kwargs: The same, by name.
    """
    if not _outweighed(maps, weight):
        return func(maps, weight, *args, **kwargs)
    return func(maps.contiguous(), weight, *args, **kwargs).contiguous(memory_format=torch.channels_last)


def _outweighed(maps: Tensor, weight: Tensor) -> bool:
    if maps.ndim != 4 or maps.device.type != "cpu" or weight.numel() <= maps.numel():
        return False
    maps_last, weight_last = map(_channels_are_last, (maps, weight))
    return maps_last and not weight_last and weight.shape[2:].numel() > 1  # of 1x1 both orders are one


def _channels_are_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def faster_small_maps() -> AbstractContextManager[Any]:
    """While it is on, `torch.nn.functional.conv2d` does as `convolve`.

    Not where something is compiled: that would be compiled anew for it.
    """
    return nullcontext() if anything_compiled() else _SmallMaps()


class _SmallMaps(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and len(args) > 1 and type(args[0]) is Tensor:
            return convolve(func, *args, **kwargs)
        return func(*args, **kwargs)
