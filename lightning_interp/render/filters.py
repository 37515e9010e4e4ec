"""The filters of a layer as one picture.

Letters: O filters, I input channels of a filter. All weights of a picture share one symmetric scale, so that filters
can be compared and zero always looks the same; the half percent of largest magnitudes is clipped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.render.color import BACKGROUND, SIGNAL, Pixels, diverging, signed_rgb, symmetric_scale
from lightning_interp.render.grid import square_columns, tile

# Longest side of a picture whose number of channels can be chosen: on TensorBoard's card of 320 pixels a weight is then
# at least 3 x 3 screen pixels.
_SIDE = 104
_MATRIX_COLUMNS = 96

Weight = NDArray[Any]


def filter_grid(
    weight: Weight,
    *,
    dead: Collection[int] | None = None,
    max_filters: int = 64,
    channels: Sequence[int] | NDArray[np.int64] | None = None,
) -> Pixels:
    """One picture of a layer's filters, the dead ones outlined.

    | layer | picture |
    |---|---|
    | I = 3, two axes | one tile a filter, in colour: mid-grey is zero |
    | I = 1 (first layer of grey images, depthwise) | one tile a filter: blue below zero, light grey, red above |
    | more channels | one strip a filter, one kernel a channel from left to right, colours as for I = 1 |
    | 1x1 | the (O, I) matrix, a filter a row; dead rows are marked at both ends |
    | one axis | one tile a filter, a channel a row |
    | three axes | the middle slice of the first one (depth or time), then as for two axes |

    Filters are the first `max_filters`. Where not all channels are legible, those with the largest norm over these
    filters are shown, in their own order, and the same ones for all filters; `shown_channels` says how many.

    Args:
        weight: (O, I, *kernel), one to three kernel axes; a transposed convolution's must be brought into this order.
        dead: Indices of dead filters; those that are not shown are ignored.
        max_filters: Most filters that are shown.
        channels: Indices of the channels to show instead, as when pictures of several moments are to be compared.

    Returns:
        (H, W, 3). Without `channels` the size depends only on the shape of `weight` and on `max_filters`. NaN and
        infinities are magenta.

    Raises:
        ValueError: If `weight` is not (O, I, *kernel) or `max_filters` is not positive.

    Example:
        >>> filter_grid(np.zeros((64, 3, 7, 7)), dead=[2]).shape
        (72, 72, 3)
    """
    if not 3 <= weight.ndim <= 5 or 0 in weight.shape:
        raise ValueError(f"Expected `weight` to be (O, I, *kernel) with 1 to 3 kernel axes, but got {weight.shape}.")
    if max_filters < 1:
        raise ValueError(f"Expected `max_filters` to be positive, but got {max_filters}.")
    shown = weight[:max_filters]
    if channels is None:
        channels = largest_channels(shown, shown_channels(weight.shape, max_filters))
    shown = shown[:, list(channels)]
    if weight.ndim == 5:
        shown = shown[:, :, shown.shape[2] // 2]
    marks = np.isin(np.arange(len(shown)), list(dead or ()))
    scale = symmetric_scale(shown)
    kernel = shown.shape[2:]
    if max(kernel) == 1:
        return _matrix(diverging(shown.reshape(shown.shape[:2]), scale), marks)
    if len(kernel) == 1:
        return tile(diverging(shown, scale), outlined=marks)
    if shown.shape[1] == 3 and weight.shape[1] == 3:
        return tile(signed_rgb(np.moveaxis(shown, 1, -1), scale), outlined=marks)
    return tile(_strips(diverging(shown, scale)), outlined=marks)


def shown_channels(shape: tuple[int, ...], max_filters: int = 64) -> int:
    """How many input channels `filter_grid` shows of a weight of that shape: as many as are legible, at least one.

    Example:
        >>> shown_channels((64, 64, 3, 3)), shown_channels((16, 16, 3, 3)), shown_channels((64, 3, 7, 7))
        (6, 16, 3)
    """
    filters, channels, *kernel = min(shape[0], max_filters), *shape[1:]
    kernel = kernel[-2:]  # of three axes the first is cut
    if max(kernel) == 1:
        return min(channels, _MATRIX_COLUMNS)
    if channels <= 1 or (channels == 3 and len(kernel) == 2):
        return channels
    for count in range(min(channels, _SIDE), 1, -1):
        height, width = (count, kernel[0]) if len(kernel) == 1 else (kernel[0], count * (kernel[1] + 1) - 1)
        columns = square_columns(filters, height + 2, width + 2)
        if max(-(-filters // columns) * (height + 2), columns * (width + 2)) <= _SIDE:
            return count
    return 1


def largest_channels(weight: Weight, count: int) -> NDArray[np.int64]:
    """Indices, ascending, of the `count` input channels of (O, I, ...) with the largest norm; the first ones of equals.

    Example:
        >>> largest_channels(np.array([[[1.0], [3.0], [-2.0]]]), 2).tolist()
        [1, 2]
    """
    # NaN counts as nothing; an infinity comes first without making the other squares overflow.
    magnitudes = np.nan_to_num(np.abs(weight.astype(np.float64)), nan=0.0).clip(max=1e100)
    norms = np.square(magnitudes).sum(axis=(0, *range(2, weight.ndim)))
    return np.sort(np.argsort(-norms, kind="stable")[:count])


def _strips(kernels: Pixels) -> Pixels:
    """(O, I, h, w, 3) to (O, h, I * (w + 1) - 1, 3): the kernels of a filter in a row, a dark pixel between them."""
    filters, channels, height, width, _ = kernels.shape
    strips = np.empty((filters, height, channels, width + 1, 3), dtype=np.uint8)
    strips[:] = BACKGROUND
    strips[:, :, :, :width] = np.moveaxis(kernels, 1, 2)
    return strips.reshape(filters, height, channels * (width + 1), 3)[:, :, :-1]


def _matrix(cells: Pixels, marks: NDArray[np.bool_]) -> Pixels:
    """(O, I, 3) with a margin; marked rows have the signal colour in it, two pixels at either end."""
    rows, columns, _ = cells.shape
    canvas = np.empty((rows + 2, columns + 6, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    canvas[1:-1, 3:-3] = cells
    for side in (slice(0, 2), slice(-2, None)):
        canvas[1:-1, side][marks] = SIGNAL
    return canvas
