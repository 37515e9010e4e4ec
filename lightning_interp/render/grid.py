"""Small pictures side by side.

TensorBoard enlarges pictures to a card of about 320 pixels without smoothing, so nothing is enlarged here: one value is
one pixel, and the gaps are as thin as they can be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_interp.render.color import BACKGROUND, SIGNAL, Color, Pixels


def tile(
    images: Pixels,
    *,
    columns: int | None = None,
    gap: int = 1,
    background: Color = BACKGROUND,
    outlined: NDArray[np.bool_] | Sequence[bool] | None = None,
) -> Pixels:
    """Equally sized pictures in rows, from the top left.

    With `outlined`, each picture has a frame of its own, `gap` pixels thick, in the signal colour where it is marked;
    so neighbours are then 2 * `gap` apart, and one that is not marked can't look so for its neighbours' sake. The size
    of the result does not depend on which are marked.

    Args:
        images: (N, h, w, 3), at least one.
        columns: Pictures in a row; None makes the result about square.
        gap: Pixels between the pictures and around them.
        background: Colour between the pictures and of the places left over.
        outlined: (N,), which ones to mark; None reserves no frames.

    Returns:
        (H, W, 3).

    Raises:
        ValueError: If a shape is wrong or `columns` or `gap` is not positive.

    Example:
        >>> tile(np.zeros((64, 7, 7, 3), np.uint8)).shape
        (65, 65, 3)
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"Expected `images` to be (N, h, w, 3) and not empty, but got shape {images.shape}.")
    count, height, width, _ = images.shape
    if gap < 1 or (columns is not None and columns < 1):
        raise ValueError(f"Expected `gap` and `columns` to be positive, but got {gap} and {columns}.")
    if outlined is not None and len(outlined) != count:
        raise ValueError(f"Expected `outlined` to hold {count} marks, one for each picture, but got {len(outlined)}.")
    between = gap if outlined is None else 2 * gap
    columns = square_columns(count, height + between, width + between) if columns is None else min(columns, count)
    rows = math.ceil(count / columns)
    size = (rows * (height + between) - between + 2 * gap, columns * (width + between) - between + 2 * gap, 3)
    canvas = np.empty(size, dtype=np.uint8)
    canvas[:] = background
    for index, picture in enumerate(images):
        top = gap + index // columns * (height + between)
        left = gap + index % columns * (width + between)
        if outlined is not None and outlined[index]:
            canvas[top - gap : top + height + gap, left - gap : left + width + gap] = SIGNAL
        canvas[top : top + height, left : left + width] = picture
    return canvas


@functools.lru_cache(maxsize=1024)
def square_columns(count: int, height: int, width: int) -> int:
    """Columns with which `count` tiles of that size make a picture that is as near to a square as can be.

    Example:
        >>> square_columns(64, 8, 8), square_columns(32, 4, 16)
        (8, 3)
    """

    def distance(columns: int) -> tuple[float, int]:
        rows = math.ceil(count / columns)
        empty = rows * columns - count
        return abs(math.log((rows * height) / (columns * width))) + empty / count, columns

    return min(range(1, count + 1), key=distance)
