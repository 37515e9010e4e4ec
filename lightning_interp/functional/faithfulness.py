"""How concentrated a map is, and whether what it marks matters to the model.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp._options import check_number, check_positive_int, expected
from lightning_interp.functional.baselines import (
    Baseline,
    baseline_of,
    check_images,
    check_scores,
    pairs,
    target_scores,
)
from lightning_interp.functional.undisturbed import undisturbed


class Faithfulness(NamedTuple):
    """Areas under the curves of the target's probability, each (N,) in [0, 1].

    Attributes:
        deletion: While the most important pixels are taken away first; low is good.
        insertion: While the most important pixels are put in first; high is good.
    """

    deletion: Tensor
    insertion: Tensor


def concentration(maps: Tensor, *, fraction: float = 0.1) -> Tensor:
    """Share of the (positive part of the) map that lies in its most important pixels.

    Args:
        maps: (N, H, W); negative values count as 0.
        fraction: Share of the pixels, rounded up to whole ones.

    Returns:
        (N,), unitless, from about `fraction` (even) to 1 (all in one place); NaN for a map without positive values.

    Raises:
        ArgumentError: If an argument is wrong.

    Example:
        >>> concentration(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), fraction=0.25)
        tensor([0.7500])
    """
    check_number("fraction", fraction, low=0.0, high=1.0)
    values = _flat(maps).clamp(min=0)
    count = max(1, -int(-fraction * values.shape[1] // 1))
    return values.topk(count, dim=1).values.sum(dim=1) / values.sum(dim=1)


def inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the (positive part of the) map that lies inside an object.

    Args:
        maps: (N, H, W); negative values count as 0.
        masks: (N, H, W) bool.

    Returns:
        (N,) in [0, 1], to be compared with the share of the pixels that are inside; NaN for a map without positive
        values.

    Example:
        >>> inside(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.7500])
    """
    if masks.shape != maps.shape:
        raise expected("masks", f"a tensor of shape {tuple(maps.shape)}", tuple(masks.shape))
    values = _flat(maps).clamp(min=0)
    return (values * masks.flatten(1)).sum(dim=1) / values.sum(dim=1)


def faithfulness(  # noqa: PLR0913 - what defines the curves, by keyword
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    *,
    steps: int = 10,
    baseline: Baseline = "mean",
    seed: int = 0,
    batch_size: int = 64,
) -> Faithfulness:
    """Deletion and insertion curves with `steps` equal steps, by the trapezoid rule.

    Pixels of equal importance go in random order, so a map that says nothing scores like chance.

    Args:
        model: `model(images) -> (N, classes)`, scores before the softmax.
        images: (N, C, H, W).
        targets: (N,).
        maps: (N, H, W), how much each pixel matters.
        steps: Points of the curve after the first one.
        baseline: What stands for an absent pixel: `"mean"` (the mean colour of the images), a number or a tensor.
        seed: Of the generator that orders equal pixels.
        batch_size: Most images in a forward.

    Raises:
        ArgumentError: If an argument is wrong.

    Cost: 2 * `steps` forwards for each image.
    Source: Petsiuk, Das and Saenko 2018, section 4.2.
    """
    check_positive_int("steps", steps)
    check_positive_int("batch_size", batch_size)
    with undisturbed(model, training=False):
        images, targets = check_images(images, targets)
        if maps.shape != (len(images), *images.shape[2:]):
            raise expected("maps", f"a tensor of shape {(len(images), *images.shape[2:])}", tuple(maps.shape))
        absent = baseline_of(images, baseline)
        ranks_NHW = importance_ranks(maps, seed=seed)
        pixels = ranks_NHW[0].numel()
        levels = torch.arange(steps, device=images.device) * pixels // steps
        # Taking away nothing is putting in everything and the other way round: the ends are run once for both curves.
        runs = images.new_zeros(2 * steps, len(images))
        for run, image in pairs(2 * steps, len(images), batch_size, images.device):
            first = ranks_NHW[image] < levels[run % steps][:, None, None]
            shown = first == (run >= steps)[:, None, None]
            scores = model(torch.where(shown[:, None], images[image], absent[image]))
            check_scores(scores, targets[image])
            runs[run, image] = target_scores(scores.softmax(dim=1), targets[image]).to(runs.dtype)
    less, more = runs[:steps], runs[steps:]
    return Faithfulness(_area(torch.cat((less, more[:1]))), _area(torch.cat((more, less[:1]))))


def importance_ranks(maps: Tensor, *, seed: int = 0) -> Tensor:
    """Place of each pixel in the order of importance, equal ones in random order.

    Args:
        maps: (N, H, W).
        seed: Of a generator of its own.

    Returns:
        (N, H, W) integers: 0 is the most important pixel of its image.

    Example:
        >>> importance_ranks(torch.tensor([[[5.0, 7.0, 6.0]]]))
        tensor([[[2, 0, 1]]])
    """
    values = _flat(maps)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(values.shape, generator=generator).argsort(dim=1).to(values.device)
    order = shuffled.gather(1, values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
    ranks = torch.empty_like(order)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return ranks.scatter_(1, order, places).reshape(maps.shape)


def _flat(maps: Tensor) -> Tensor:
    if not isinstance(maps, Tensor) or maps.ndim != 3 or maps.numel() == 0:
        found = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise expected("maps", "a tensor (N, H, W)", found)
    return maps.detach().flatten(1)


def _area(curve: Tensor) -> Tensor:
    """(P, N) values at equal distances to (N,): trapezoids over a width of 1."""
    return torch.trapezoid(curve, dim=0) / (len(curve) - 1)
