"""How a training image would have to change to move the loss of a test image, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.render.color import Pixels, denormalise, diverging, symmetric_scale
from lightning_interp.render.gallery import filled
from lightning_interp.render.influence import SUSPICIOUS
from lightning_interp.render.sheets import heat, sheet
from lightning_interp.render.text import INK, Segment, text_lines

MAX_PAIRS = 4  # more rows than that are too small to see
_STEP = 0.25  # of the range of the image: a change that can be seen and leaves the image what it is


@dataclass(frozen=True)
class Perturbed:
    """A training image, and how changing it moves the loss of a test image.

    Attributes:
        image: (C, H, W), the training image.
        direction: (C, H, W), gradient of the loss of the test image, in nats, with respect to `image`.
        test_image: (C, H, W).
        index: Of the training image, in its set.
        label: Name of the class of the training image.
        test_index: Of the test image, in its set.
        test_label: Name of the class of the test image.
    """

    image: NDArray[Any]
    direction: NDArray[Any]
    test_image: NDArray[Any]
    index: int
    label: str
    test_index: int
    test_label: str


def perturbation_sheet(
    pairs: Sequence[Perturbed], *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Pixels:
    """A row for each pair: training image, where changing it raises the loss of the test image, a step, the test image.

    Red pixels raise the loss when they are made brighter (all channels by the same amount), blue ones when darker; the
    scale is each picture's own. The step is that of `take_step`, channel by channel; the caption has the rise of the
    loss by it. What is drawn is the gradient of Koh and Liang 2017, equation 5, for one test image.

    Args:
        pairs: At least one; the first four are shown.
        mean: As in `denormalise`.
        std: As in `denormalise`.

    Returns:
        (height, 320, 3), no side more than twice the other.

    Raises:
        ValueError: If there is no pair, or the direction has not the shape of its image.
    """
    if not pairs or any(each.image.shape != each.direction.shape for each in pairs):
        shapes = [(each.image.shape, each.direction.shape) for each in pairs]
        raise ValueError(f"Expected at least one pair, with directions of the images' shapes, but got {shapes}.")
    rows, captions = [], []
    for each in pairs[:MAX_PAIRS]:
        stepped, rise = take_step(each.image.astype(np.float64), each.direction.astype(np.float64))
        image, changed = denormalise(np.stack((each.image, stepped.astype(each.image.dtype))), mean, std)
        test = denormalise(each.test_image[None], mean, std)[0]
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is shown as such
            direction = each.direction.mean(axis=0, keepdims=True)
        rows.append((image, heat(direction, signed=True)[0], changed, test))
        captions.append(_caption(each, rise))
    height, width = (max(picture.shape[axis] for row in rows for picture in row) for axis in (0, 1))
    columns = [np.stack([filled(picture, height, width) for picture in column]) for column in zip(*rows, strict=True)]
    picture = sheet(columns, ["training", "direction", "with a step", "test"], captions)
    return np.concatenate((text_lines([_head()], picture.shape[1]), picture))


def _head() -> list[Segment]:
    blue, red = (tuple(color) for color in diverging(np.array([-0.6, 0.6]), 1.0).tolist())
    words = [("The test loss rises if ", INK), ("red", red), (" gets brighter, ", INK), ("blue", blue)]
    return [*words, (" darker", INK)]


def _caption(shown: Perturbed, rise: float) -> list[list[Segment]]:
    color = INK if shown.label == shown.test_label else SUSPICIOUS
    return [
        [(f"training #{shown.index}, ", INK), (f"label {shown.label}", color)],
        [(f"test #{shown.test_index}, label {shown.test_label}", INK)],
        [(f"this step raises the test loss by about {rise:.2g} nats", INK)],
    ]


def take_step(image: NDArray[np.float64], direction: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """A step along a direction that can be seen, and what is gained by it to first order.

    The half percent of largest magnitudes of the direction counts as equal, so a few outliers don't hide the rest.

    Args:
        image: (...).
        direction: (...), gradient of what is to rise with respect to the image.

    Returns:
        The image, each value moved by at most a quarter of the image's range and kept within that range, and not at all
        where it or its direction is not finite; and the sum of move times gradient, never negative.

    Example:
        >>> take_step(np.array([0.0, 0.5, 1.0]), np.array([2.0, -1.0, 1.0]))
        (array([0.25 , 0.375, 1.   ]), 0.625)
    """
    known = np.isfinite(image) & np.isfinite(direction)
    gradient, start = np.where(known, direction, 0.0), np.where(known, image, 0.0)
    low, high = (start[known].min(), start[known].max()) if known.any() else (0.0, 0.0)
    with np.errstate(over="ignore"):  # an outlier beyond all others
        share = np.clip(gradient / symmetric_scale(gradient), -1.0, 1.0)
    stepped = np.clip(start + _STEP * (high - low) * share, low, high)
    return np.where(known, stepped, image), float(((stepped - start) * gradient)[known].sum())
