"""What excites filters: pieces of images, and what of them does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_interp.render.color import BACKGROUND, Pixels, signed_rgb, symmetric_scale
from lightning_interp.render.gallery import filled
from lightning_interp.render.grid import square_columns
from lightning_interp.render.sheets import MID_GREY, WIDTH, near_square
from lightning_interp.render.text import LINE, text_lines

Box = tuple[tuple[int, int], tuple[int, int]]
"""(first, one past the last) row and column; may lie outside the picture."""

_PART_GAP, _BLOCK_GAP = 3, 8


@dataclass
class Excitement:
    """What is shown of one filter.

    Attributes:
        caption: Its line of text.
        patches: Up to k pictures, the most exciting first; they may differ in size.
        projections: One for each patch, or none.
        maximised: The image that was made for it, or None.
    """

    caption: str
    patches: list[Pixels] = field(default_factory=list)
    projections: list[Pixels] = field(default_factory=list)
    maximised: Pixels | None = None


def cut(picture: Pixels, box: Box | None) -> Pixels:
    """A piece of a picture; what lies outside is dark, an axis that the box covers entirely is shown whole.

    Example:
        >>> cut(np.zeros((8, 8, 3), np.uint8), ((-1, 2), (-3, 9))).shape
        (3, 8, 3)
    """
    if box is None:
        return picture
    sides = picture.shape[:2]
    spans = [(0, side) if end - first >= side else (first, end) for (first, end), side in zip(box, sides, strict=True)]
    canvas = np.empty((*(end - first for first, end in spans), 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    inside = [(max(first, 0), min(end, side)) for (first, end), side in zip(spans, sides, strict=True)]
    (top, bottom), (left, right) = inside
    if top < bottom and left < right:
        rows, columns = slice(top - spans[0][0], bottom - spans[0][0]), slice(left - spans[1][0], right - spans[1][0])
        canvas[rows, columns] = picture[top:bottom, left:right]
    return canvas


def projection(gradient: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Pixels:
    """A signed gradient as a picture: mid-grey is nothing; three channels in colour, any other number in grey.

    Args:
        gradient: (C, H, W).

    Returns:
        (H, W, 3); the scale is the picture's own.
    """
    channels = gradient if len(gradient) == 3 else gradient.mean(axis=0, keepdims=True).repeat(3, axis=0)
    return signed_rgb(np.moveaxis(channels, 0, -1), symmetric_scale(channels))


def excitement_sheet(filters: Sequence[Excitement], k: int) -> Pixels:
    """A block for each filter: its patches, beside them their projections and the maximised image; a line below.

    Args:
        filters: At least one; all with projections, or none; likewise with maximised images.
        k: Places for patches in a block.

    Returns:
        (height, at most 320, 3), on mid-grey; no side more than twice the other.

    Raises:
        ValueError: If there is no filter.
    """
    if not filters:
        raise ValueError("Expected at least one filter, but got none.")
    across = math.ceil(math.sqrt(k))
    down = math.ceil(k / across)
    parts = 1 + any(each.projections for each in filters) + any(each.maximised is not None for each in filters)
    columns = square_columns(len(filters), 8 * down + 3, 8 * across * parts)
    block = (WIDTH - _BLOCK_GAP * (columns - 1)) // columns
    side = (block - _PART_GAP * (parts - 1)) // (across * parts)
    blocks = [_block(each, side, (across, down), parts) for each in filters]
    height, width = blocks[0].shape[:2]
    rows = math.ceil(len(blocks) / columns)
    canvas = _blank(rows * (height + _PART_GAP) - _PART_GAP, columns * (width + _BLOCK_GAP) - _BLOCK_GAP)
    for index, picture in enumerate(blocks):
        top, left = index // columns * (height + _PART_GAP), index % columns * (width + _BLOCK_GAP)
        canvas[top : top + height, left : left + width] = picture
    return near_square(canvas)


def _block(shown: Excitement, side: int, grid: tuple[int, int], parts: int) -> Pixels:
    across, down = grid
    part = across * side
    canvas = _blank(down * side + LINE, parts * (part + _PART_GAP) - _PART_GAP)
    for start, pictures in ((0, shown.patches), (part + _PART_GAP, shown.projections)):
        for index, picture in enumerate(pictures[: across * down]):
            top, left = index // across * side, start + index % across * side
            canvas[top : top + side - 1, left : left + side - 1] = filled(picture, side - 1, side - 1)
    if shown.maximised is not None:
        canvas[: down * side, -part:] = filled(shown.maximised, down * side, part)
    canvas[down * side :] = text_lines([shown.caption], canvas.shape[1])
    return canvas


def _blank(height: int, width: int) -> Pixels:
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = MID_GREY
    return canvas
