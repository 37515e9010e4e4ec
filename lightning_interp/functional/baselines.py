"""Checks that the attribution methods share, and what an absent pixel looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_interp._options import expected

Baseline = float | Literal["mean"] | Tensor
"""`"mean"`: the mean colour of the images; a number; or a tensor that broadcasts to the images."""


def check_images(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Copies fit for autograd (not inference tensors, no graph), after a check of their shapes.

    Args:
        images: (N, C, H, W), floating.
        targets: (N,), integers.

    Raises:
        ArgumentError: If a shape or a type is wrong.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        found = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise expected("images", "a floating tensor (N, C, H, W)", found)
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    if not whole or targets.shape != images.shape[:1]:
        found = f"{tuple(targets.shape)} {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise expected("targets", f"a tensor of {len(images)} class indices, one for each image", found)
    return images.detach().clone(), targets.detach().clone().to(images.device, torch.int64)


def check_scores(scores: Tensor, targets: Tensor) -> None:
    """Checks what the model returned.

    Raises:
        ValueError: If it is not (N, classes).
        ArgumentError: If a target is no class.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(targets):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"Expected `model(images)` to be (N, classes) with N = {len(targets)}, but got {found}.")
    if not bool(((targets >= 0) & (targets < scores.shape[1])).all()):
        raise expected("targets", f"class indices in [0, {scores.shape[1]})", targets.tolist())


def target_scores(scores: Tensor, targets: Tensor) -> Tensor:
    """The score of each image's own target, (N,)."""
    return scores.gather(1, targets[:, None])[:, 0]


def baseline_of(images: Tensor, baseline: Baseline) -> Tensor:
    """What stands for an absent pixel, in the shape of the images.

    Args:
        images: (N, C, H, W).
        baseline: `"mean"` takes the mean of each channel over all images and positions.

    Returns:
        (N, C, H, W), a view where that is enough.

    Raises:
        ArgumentError: If it is something else, or does not broadcast.

    Example:
        >>> baseline_of(torch.tensor([[[[1.0, 3.0]]]]), "mean")
        tensor([[[[2., 2.]]]])
    """
    if isinstance(baseline, str) and baseline == "mean":
        return images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)
    if isinstance(baseline, Tensor):
        try:
            return baseline.detach().to(images).expand_as(images)
        except RuntimeError:
            shapes = f"a tensor of shape {tuple(baseline.shape)}"
            raise expected("baseline", f"a tensor that broadcasts to {tuple(images.shape)}", shapes) from None
    if isinstance(baseline, int | float) and not isinstance(baseline, bool):
        return torch.full_like(images[:1, :1, :1, :1], baseline).expand_as(images)
    raise expected("baseline", '"mean", a number or a tensor', baseline)


def pairs(copies: int, images: int, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of a copy and an image, in batches: what bounds the memory of every method that repeats images.

    Yields:
        (B,) copies in [0, copies), ascending, and (B,) images in [0, images), with B <= `batch_size`.

    Example:
        >>> [copy.tolist() for copy, image in pairs(3, 2, 4, torch.device("cpu"))]
        [[0, 0, 1, 1], [2, 2]]
    """
    for flat in torch.split(torch.arange(copies * images, device=device), batch_size):
        yield flat // images, flat % images
