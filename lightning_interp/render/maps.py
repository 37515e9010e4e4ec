"""The activation maps of one sample as one picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_interp.render.color import BACKGROUND, Pixels, diverging, sequential, symmetric_scale
from lightning_interp.render.grid import tile

# Longest side of one map: 64 of them and the image share a card of 320 pixels, and shrinking loses the outlines.
_MAP_SIDE = 26
_IMAGE_SHARE = 0.4


def activation_grid(maps: NDArray[Any], image: Pixels | None = None, *, max_channels: int = 64) -> Pixels:
    """The maps of one layer for one sample, with one scale for all of them, those that are zero everywhere outlined.

    Maps without negative values go from black (zero) to pale yellow; others from blue (negative) over light grey (zero)
    to red. The half percent of largest magnitudes is clipped. Maps longer than 26 pixels are averaged over squares.

    Args:
        maps: (C, h, w); of sequences (C, length).
        image: (H, W, 3), the input, shown to the left: as large as a map, or 0.4 of the grid where that is more.
        max_channels: Most maps that are shown, the first ones.

    Returns:
        (H, W, 3); NaN and infinities are magenta.

    Raises:
        ValueError: If a shape is wrong or `max_channels` is not positive.

    Example:
        >>> activation_grid(np.zeros((16, 8, 8))).shape
        (40, 40, 3)
    """
    if maps.ndim == 2:
        maps = maps[:, None]
    if maps.ndim != 3 or 0 in maps.shape:
        raise ValueError(f"Expected `maps` to be (C, h, w) and not empty, but got shape {maps.shape}.")
    if max_channels < 1:
        raise ValueError(f"Expected `max_channels` to be positive, but got {max_channels}.")
    shown = maps[:max_channels]
    silent: NDArray[np.bool_] = np.logical_not(np.any(shown, axis=(1, 2)))
    finite = shown[np.isfinite(shown)]
    signed = bool(finite.size and finite.min() < 0)
    scale = symmetric_scale(shown)
    small = _reduced(shown)
    grid = tile(diverging(small, scale) if signed else sequential(small, 0.0, scale), outlined=silent)
    if image is None:
        return grid
    return _beside(image, grid, max(_IMAGE_SHARE * max(grid.shape), max(small.shape[1:]) + 2))


def _reduced(maps: NDArray[Any]) -> NDArray[np.float64]:
    """Means over squares, so that no side exceeds `_MAP_SIDE`; incomplete squares at the far edges count too."""
    numbers = maps.astype(np.float64)
    for axis in (1, 2):
        factor = math.ceil(max(maps.shape[1:]) / _MAP_SIDE)
        starts = np.arange(0, numbers.shape[axis], factor)
        counts = np.diff(np.append(starts, numbers.shape[axis]))
        shape = [-1 if i == axis else 1 for i in range(3)]
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is shown as such
            numbers = np.add.reduceat(numbers, starts, axis=axis) / counts.reshape(shape)
    return numbers


def _beside(image: Pixels, grid: Pixels, side: float) -> Pixels:
    """The image at the left, its longer side `side` pixels but no higher than the grid."""
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"Expected `image` to be (H, W, 3) and not empty, but got shape {image.shape}.")
    height, width = image.shape[:2]
    factor = min(side / max(height, width), grid.shape[0] / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # Enlarged without smoothing, so that the pixels of a small image stay what the network saw.
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    resized = np.asarray(Image.fromarray(image).resize(size, method))
    canvas = np.empty((grid.shape[0], size[0] + 2 + grid.shape[1], 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    canvas[: size[1], : size[0]] = resized
    canvas[:, size[0] + 2 :] = grid
    return canvas
