"""Sparsity of activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_interp.errors import ArgumentError


def sparsity(activations: Tensor, *, channel_axis: int = 1) -> Tensor:
    """Fraction of exact zeros of each channel.

    s_c = mean over batch and positions of [a = 0]. A high value is no fault: a healthy ReLU layer is often more than
    half zero, while none of its filters is dead.

    Args:
        activations: (N, C, ...), output of a non-linearity.
        channel_axis: Axis of the channels; negative values count from the end.

    Returns:
        (C,), float32, in [0, 1]; 1 is a channel that never fired on these inputs.

    Raises:
        ArgumentError: If there are fewer than two axes, no values, or no such axis.

    Cost: one pass over `activations`.
    Source: Glorot, Bordes, Bengio 2011, section 3.

    Example:
        >>> sparsity(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        tensor([1.0000, 0.5000])
    """
    if activations.ndim < 2 or not activations.numel():
        raise ArgumentError(
            f"Expected argument `activations` to be a non-empty tensor (N, C, ...), but got {tuple(activations.shape)}."
        )
    if not -activations.ndim <= channel_axis < activations.ndim:
        raise ArgumentError(
            f"Expected argument `channel_axis` to be an axis of {tuple(activations.shape)}, but got {channel_axis}."
        )
    axis = channel_axis % activations.ndim
    shape = activations.shape
    return zero_fraction(activations.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])))


def zero_fraction(channels: Tensor) -> Tensor:
    """(P, C, Q) -> (C,), fraction of exact zeros, without a wait for the device; NaN where a channel holds NaN."""
    if channels.is_cuda:
        # Without a copy: on an H200 under half the time of what is best on a CPU, a quarter of a sum of booleans.
        wide = torch.promote_types(channels.dtype, torch.float32)
        nonzero: Tensor = torch.linalg.vector_norm(channels, 0, dim=2, dtype=wide).sum(dim=0).float()
    else:
        # On a CPU sign and sum take a fifth of the time of a comparison and a sum of booleans.
        nonzero = channels.sign().abs_().sum(dim=2, dtype=torch.float32).sum(dim=0)
    fraction = 1 - nonzero / (channels.shape[0] * channels.shape[2])
    # The sign of NaN is 0: without this a broken network would look perfectly sparse.
    return fraction.where(~channels.amax(dim=2).amax(dim=0).isnan(), torch.nan)
