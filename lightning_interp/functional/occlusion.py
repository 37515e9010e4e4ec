"""Occlusion maps: what a class score loses when a window of the image is covered.

Shapes: N images, C channels, H x W pixels, P = p x q positions of the window, K feature maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp._options import check_positive_int
from lightning_interp.functional.baselines import (
    Baseline,
    baseline_of,
    check_images,
    check_scores,
    pairs,
    target_scores,
)
from lightning_interp.functional.covering import CoveredImages, FastestCaller
from lightning_interp.functional.spatial import FeatureMaps
from lightning_interp.functional.undisturbed import undisturbed
from lightning_interp.functional.windows import Grid

Progress = Callable[[int, int], None]
"""Called after each batch with the images done so far and those in all."""


class Occlusion(NamedTuple):
    """What a window over a pixel does. All but `top_class` are means over the windows that cover the pixel.

    Attributes:
        drop: (N, H, W), score of the target without the window minus score with it.
        probability: (N, H, W) in [0, 1], of the target while covered.
        top_class: (N, H, W) integers, the most probable class while the window nearest to the pixel is there.
        feature_drop: (N, H, W), share of the sum of the strongest feature map that is lost; None if the model makes
            no feature maps. The map is the one with the largest sum for the whole image, see `FeatureMaps`.
    """

    drop: Tensor
    probability: Tensor
    top_class: Tensor
    feature_drop: Tensor | None


def occlusion_map(  # noqa: PLR0913 - the window, by keyword
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    baseline: Baseline = "mean",
    batch_size: int = 64,
) -> Tensor:
    """Mean drop of the target score over the windows that cover a pixel.

    Arguments, errors, cost and source: see `occlusion`.

    Returns:
        (N, H, W), in units of the score; positive where the image speaks for the target. Detached, on the device of
        `images`.

    Example:
        >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
        >>> _ = linear[1].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> occlusion_map(linear, torch.tensor([[[[3.0, 5.0]]]]), torch.tensor([0]), window=1, baseline=0.0)
        tensor([[[ 6., -5.]]])
    """
    found = occlusion(
        model,
        images,
        targets,
        window=window,
        stride=stride,
        baseline=baseline,
        batch_size=batch_size,
        feature_maps=False,
    )
    return found.drop


def occlusion(  # noqa: PLR0913 - the window, by keyword
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    baseline: Baseline = "mean",
    batch_size: int = 64,
    feature_maps: bool = True,
    progress: Progress | None = None,
) -> Occlusion:
    """Slides a window over each image and asks the model each time.

    Windows start at multiples of the stride; where they don't divide the image, the last one is cut off at the edge.

    Args:
        model: `model(images) -> (N, classes)`; the scores should be those before the softmax.
        images: (N, C, H, W), floating.
        targets: (N,), the class of each image.
        window: Pixels, one number or (height, width); at most the image.
        stride: Pixels between windows, at most the window; None is half the window.
        baseline: What the window shows: `"mean"` (the mean colour of the images), a number or a tensor.
        batch_size: Most images in a forward.
        feature_maps: Whether the strongest feature map is looked at too; costs no forward.
        progress: Called after each forward.

    Raises:
        ArgumentError: If an argument is wrong.

    Cost: one forward for each window and one for the whole image; no backward. On a CPU a layer computes only what the
    window changes, as long as that is no more than 60 % of its maps: see `functional/incremental.py`.
    Source: Zeiler and Fergus 2013, section 4.2 and figure 6 (b: `feature_drop`, d: `probability`, e: `top_class`).
    """
    check_positive_int("batch_size", batch_size)
    with undisturbed(model, training=False):
        images, targets = check_images(images, targets)
        grid = Grid.of((images.shape[2], images.shape[3]), window, stride)
        cover = baseline_of(images, baseline)
        strongest = torch.zeros_like(targets) if feature_maps else None
        call = FastestCaller(model, images.device)
        whole = _Readings(1, images, strongest)
        for _, image in pairs(1, len(images), batch_size, images.device):
            whole.read(
                call, CoveredImages(images, cover, grid, image, None), targets[image], torch.zeros_like(image), image
            )
        covered = _Readings(len(grid), images, whole.strongest)
        done, total = 0, len(grid) * len(images)
        batches = pairs(len(grid), len(images), batch_size, images.device)
        if call.patched:  # one image after another: few are whole in a batch, and these are computed besides
            batches = ((place, image) for image, place in pairs(len(images), len(grid), batch_size, images.device))
        for position, image in batches:
            covered.read(call, CoveredImages(images, cover, grid, image, position), targets[image], position, image)
            done += len(image)
            if progress is not None:
                progress(done, total)
    lost = None
    if covered.features is not None and whole.features is not None:
        lost = grid.mean(torch.where(whole.features > 0, 1 - covered.features / whole.features, 0.0))
    return Occlusion(
        grid.mean(whole.scores - covered.scores), grid.mean(covered.probability), grid.nearest(covered.top_class), lost
    )


class _Readings:
    """What forwards of P versions of N images give; each (P, N).

    Attributes:
        scores: Of the target.
        probability: Of the target.
        top_class: Most probable class.
        features: Sum of the positive part of the strongest feature map; None if there is none.
        strongest: (N,), index of that map; None if none are wanted, or there are none.
    """

    def __init__(self, versions: int, images: Tensor, strongest: Tensor | None) -> None:
        size = (versions, len(images))
        self.scores, self.probability = images.new_zeros(size), images.new_zeros(size)
        self.top_class = torch.zeros(size, dtype=torch.int64, device=images.device)
        self.strongest = strongest
        self.features = None if strongest is None else images.new_zeros(size)
        self._whole = versions == 1  # the uncovered images decide which map is the strongest

    def read(self, call: FastestCaller, batch: CoveredImages, targets: Tensor, version: Tensor, image: Tensor) -> None:
        """Runs one batch and files what it gives under its versions and images."""
        sums, scores = self._run(call, batch)
        check_scores(scores, targets)
        self.scores[version, image] = target_scores(scores, targets).to(self.scores.dtype)
        probabilities = scores.softmax(dim=1)
        self.probability[version, image] = target_scores(probabilities, targets).to(self.scores.dtype)
        self.top_class[version, image] = scores.argmax(dim=1)
        if sums is None or self.strongest is None or self.features is None:
            self.strongest = self.features = None
            return
        if self._whole:
            self.strongest[image] = sums.argmax(dim=1)
        self.features[version, image] = target_scores(sums, self.strongest[image]).to(self.features.dtype)

    def _run(self, call: FastestCaller, batch: CoveredImages) -> tuple[Tensor | None, Tensor]:
        if self.strongest is None:
            return None, call(batch)
        with FeatureMaps(call.model) as listener:
            scores = call(batch)
        return None if listener.maps is None else listener.maps.relu().sum(dim=(2, 3)), scores
