"""Pictures with a line of text each, and rows of pictures over time, on a card of about 320 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lightning_interp.render.color import Pixels
from lightning_interp.render.sheets import MID_GREY, WIDTH, fitted, near_square
from lightning_interp.render.strip import step_label
from lightning_interp.render.text import CHARACTER, LINE, text_lines

GAP = 2


def gallery(pictures: Sequence[Pixels], lines: Sequence[Sequence[str]]) -> Pixels:
    """Pictures in reading order, about square in all, each with its lines below it.

    Args:
        pictures: Each (H, W, 3), at least one.
        lines: For each picture, the same number of lines each.

    Returns:
        (height, 320, 3), on mid-grey; no side more than twice the other.

    Raises:
        ValueError: If the numbers differ.

    Example:
        >>> gallery([np.zeros((8, 8, 3), np.uint8)] * 10, [["0"]] * 10).shape
        (277, 320, 3)
    """
    if len(pictures) != len(lines) or not pictures or len({len(each) for each in lines}) != 1:
        raise ValueError(f"Expected equally many lines for each picture, but got {len(pictures)} and {len(lines)}.")
    columns = math.ceil(math.sqrt(len(pictures)))
    side = (WIDTH - GAP * (columns - 1)) // columns
    below = LINE * len(lines[0])
    rows = math.ceil(len(pictures) / columns)
    canvas = _blank(rows * (side + below + GAP) - GAP, WIDTH)
    for index, (picture, texts) in enumerate(zip(pictures, lines, strict=True)):
        top, left = index // columns * (side + below + GAP), index % columns * (side + GAP)
        canvas[top : top + side, left : left + side] = filled(picture, side, side)
        if texts:
            canvas[top + side : top + side + below, left : left + side] = text_lines(texts, side)
    return near_square(canvas)


def column(pictures: Sequence[Pixels], side: int) -> Pixels:
    """Pictures below one another in square cells: a frame for `timeline`."""
    canvas = _blank(len(pictures) * (side + GAP) - GAP, side)
    for index, picture in enumerate(pictures):
        canvas[index * (side + GAP) : index * (side + GAP) + side] = filled(picture, side, side)
    return canvas


def timeline(frames: Sequence[tuple[int, Pixels]], names: Sequence[str], side: int) -> Pixels:
    """Columns over time, their step above them, the name of each row at the left.

    Args:
        frames: Pairs of a step and a `column` of the same pictures, at least one.
        names: One for each row.
        side: As it was for `column`.

    Returns:
        (height, width, 3), on mid-grey; no side more than twice the other.
    """
    room = name_room(names)
    height = frames[0][1].shape[0]
    canvas = _blank(LINE + height, room + len(frames) * (side + GAP) - GAP)
    for index, name in enumerate(names):
        top = LINE + index * (side + GAP) + max(0, (side - LINE) // 2)
        bar = text_lines([name], room - GAP)[: canvas.shape[0] - top]
        canvas[top : top + len(bar), : room - GAP] = bar
    for index, (step, frame) in enumerate(frames):
        left = room + index * (side + GAP)
        canvas[:LINE, left : left + side] = text_lines([step_label(step)], side)
        canvas[LINE:, left : left + side] = frame
    return near_square(canvas)


def name_room(names: Sequence[str]) -> int:
    """Pixels for the names at the left of a `timeline`: of the longest, at most eight characters."""
    return min(8, max(map(len, names))) * CHARACTER + 2 + GAP


def frame_side(names: Sequence[str], columns: int) -> int:
    """Side of the pictures with which so many columns fill a card.

    Example:
        >>> frame_side(["0", "1"], 10)
        29
    """
    return (WIDTH - name_room(names) + GAP) // columns - GAP


def filled(picture: Pixels, height: int, width: int) -> Pixels:
    """Like `fitted`, but enlarged as far as it goes: pixels may differ in size by one.

    Args:
        picture: (H, W, 3).
        height: Of the cell.
        width: Of the cell.

    Returns:
        (height, width, 3).
    """
    factor = min(height / picture.shape[0], width / picture.shape[1])
    if factor <= 1:
        return fitted(picture, height, width)
    size = (max(1, int(picture.shape[1] * factor + 1e-6)), max(1, int(picture.shape[0] * factor + 1e-6)))
    return fitted(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)), height, width)


def _blank(height: int, width: int) -> Pixels:
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = MID_GREY
    return canvas
