"""Gradients of target scores with respect to images and feature maps.

Shapes: N images, C channels, H x W pixels, K feature maps of h x w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.functional.baselines import check_scores, target_scores
from lightning_interp.functional.spatial import FeatureMaps, NoFeatureMapsError

Choose = Callable[[Tensor], Tensor]
"""Scores (N, classes) to targets (N,)."""


class CheckpointedError(RuntimeError):
    """The model is checkpointed in the way in which autograd gives no gradient of images."""


NO_PIXEL_GRADIENT = (
    "no gradient reaches the pixels; something on the way is detached, quantised, checkpointed with "
    "use_reentrant=True, or runs under torch.no_grad()"
)


def gradients_of(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of a single number; None for inputs that it does not depend on.

    Raises:
        CheckpointedError: If activation checkpointing with `use_reentrant=True` is on the way.
    """
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(output, inputs, allow_unused=True)
    except RuntimeError as error:
        if "compatible with .grad()" not in str(error):  # "incompatible" now, "not compatible" before
            raise
        raise CheckpointedError(
            "Expected a model that autograd can take gradients of images of, but it has activation checkpointing with "
            "`use_reentrant=True`. Call torch.utils.checkpoint.checkpoint with `use_reentrant=False`, which trains the "
            "same."
        ) from error
    return found


class PlainPass(NamedTuple):
    """One forward and one backward through the model as it is.

    Attributes:
        scores: (N, classes).
        targets: (N,).
        gradients: d score / d pixel, (N, C, H, W), or None if they were not asked for.
        maps: (N, K, h, w), or None if they were not asked for.
        map_gradients: d score / d maps, (N, K, h, w), or None.
    """

    scores: Tensor
    targets: Tensor
    gradients: Tensor | None
    maps: Tensor | None
    map_gradients: Tensor | None


def plain_pass(  # noqa: PLR0913 - what is wanted, by keyword
    model: nn.Module,
    images: Tensor,
    choose: Choose,
    *,
    pixels: bool = True,
    maps: bool = False,
    layer: str | None = None,
) -> PlainPass:
    """Runs the model once forward and once backward, as far back as is needed; all results are detached.

    Args:
        model: `model(images) -> (N, classes)`, in eval mode.
        images: (N, C, H, W).
        choose: Which class each gradient is of, given the scores.
        pixels: Whether gradients of the pixels are wanted.
        maps: Whether feature maps and their gradients are wanted.
        layer: Whose; None finds the last one, see `FeatureMaps`.

    Raises:
        NoFeatureMapsError: If they are wanted and there are none.
        CheckpointedError: As in `gradients_of`.
    """
    leaf = images.clone().requires_grad_()
    listener = FeatureMaps(model, layer) if maps else None
    if listener is None:
        scores = model(leaf.clone())  # a copy: the model may write over it
    else:
        with listener:
            scores = model(leaf.clone())
    targets = choose(scores.detach())
    check_scores(scores, targets)
    found = None if listener is None else listener.maps
    if listener is not None and (found is None or not found.requires_grad):
        raise NoFeatureMapsError(
            "Grad-CAM needs feature maps with more than one position, but no convolution of the model makes any for "
            "these images; give `layer`, or leave this method out."
        )
    wanted = [tensor for tensor in (leaf if pixels else None, found) if tensor is not None]
    parts = gradients_of(target_scores(scores, targets).sum(), wanted)
    gradients = [torch.zeros_like(x) if part is None else part for x, part in zip(wanted, parts, strict=True)]
    return PlainPass(
        scores.detach(),
        targets,
        gradients[0] if pixels else None,
        None if found is None else found.detach(),
        None if found is None else gradients[-1],
    )


def input_gradients(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Derivatives of the scores by the pixels, (N, C, H, W), of one forward and one backward."""
    leaf = images.clone().requires_grad_()
    scores = model(leaf.clone())  # a copy: the model may write over it
    check_scores(scores, targets)
    (gradients,) = gradients_of(target_scores(scores, targets).sum(), [leaf])
    return torch.zeros_like(leaf) if gradients is None else gradients
