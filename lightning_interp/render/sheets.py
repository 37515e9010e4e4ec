"""Samples with their maps as one picture for a card of about 320 pixels, and such pictures over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_interp.render.color import Color, Pixels, diverging, sequential, symmetric_scale
from lightning_interp.render.strip import step_label
from lightning_interp.render.text import Segment, text_lines

WIDTH = 320
MAX_SHOWN = 8  # more samples than that are too small to see
FRAME = 78  # side of a frame of a film strip: four of them and the gaps make a card
MID_GREY: Color = (128, 128, 128)
_GAP = 2
_TWO_GROUPS = 5  # from so many samples on, two stand side by side

Caption = Sequence[str | Sequence[Segment]]
"""Lines of text for one sample."""


def heat(values: NDArray[Any], *, signed: bool = False) -> Pixels:
    """Maps in colours, each with its own scale: the half percent of largest magnitudes is clipped.

    Args:
        values: (N, H, W).
        signed: Blue, light grey, red with grey at 0; else black to pale yellow from 0.

    Returns:
        (N, H, W, 3); NaN and infinities are magenta.
    """
    scales = [symmetric_scale(each) for each in values]
    pairs = zip(values, scales, strict=True)
    return np.stack([diverging(v, scale) if signed else sequential(v, 0.0, scale) for v, scale in pairs])


def overlay(images: Pixels, values: NDArray[Any], *, signed: bool = False) -> Pixels:
    """Maps over grey versions of their images, the more opaque the larger the value.

    Args:
        images: (N, H, W, 3).
        values: (N, H, W).
        signed: As in `heat`.

    Returns:
        (N, H, W, 3).

    Raises:
        ValueError: If the shapes differ.
    """
    if images.shape[:3] != values.shape or images.shape[-1] != 3:
        raise ValueError(f"Expected maps {images.shape[:3]} for images {images.shape}, but got {values.shape}.")
    grey = images.astype(np.float64) @ (0.299, 0.587, 0.114)
    scales = np.array([symmetric_scale(each) for each in values])[:, None, None]
    finite = np.isfinite(values)
    share = np.clip(np.abs(np.where(finite, values, 0.0)) / scales, 0.0, 1.0)
    opacity = np.where(finite, 0.85 * np.sqrt(share), 1.0)[..., None]
    blended = (1 - opacity) * (0.75 * grey + 32)[..., None] + opacity * heat(values, signed=signed)
    return np.floor(blended + 0.5).astype(np.uint8)


def categories(values: NDArray[Any], calm: NDArray[Any]) -> Pixels:
    """Classes in colours: the calm one of each sample light grey, the others as in `category_color`.

    Args:
        values: (N, H, W) integers.
        calm: (N,) integers.

    Returns:
        (N, H, W, 3).
    """
    pixels = np.empty((*values.shape, 3), dtype=np.uint8)
    for index in np.unique(values):
        pixels[values == index] = category_color(int(index))
    pixels[values == np.reshape(calm, (-1, 1, 1))] = (225, 225, 225)
    return pixels


def category_color(index: int) -> Color:
    """A strong colour for a class; neighbours differ in hue by the golden angle.

    Example:
        >>> category_color(0)
        (242, 85, 85)
    """
    hue = index * 0.618034 % 1.0 * 6
    wave = [np.clip(abs((hue + shift) % 6 - 3) - 1, 0.0, 1.0) for shift in (0, 4, 2)]
    red, green, blue = (int(85 + 157 * level + 0.5) for level in wave)
    return red, green, blue


def sheet(columns: Sequence[Pixels], headings: Sequence[str], captions: Sequence[Caption]) -> Pixels:
    """One row a sample: its pictures side by side, its caption below; two groups of rows from five samples on.

    A single sample has its pictures two by two. Small pictures are enlarged without smoothing, large ones are averaged.
    The result is 320 pixels wide, and no more than twice as high or half as high.

    Args:
        columns: Each (N, H, W, 3), of equal shape; the first eight samples are shown.
        headings: One for each column.
        captions: N captions with the same number of lines.

    Returns:
        (height, 320, 3), on mid-grey.

    Raises:
        ValueError: If the shapes or the numbers differ.
    """
    shapes = {column.shape for column in columns}
    count = len(captions)
    if len(shapes) != 1 or len(headings) != len(columns) or next(iter(shapes))[0] != count or count == 0:
        raise ValueError(
            f"Expected a heading for each column and columns of one shape (N, H, W, 3) with a caption for each sample, "
            f"but got {len(headings)} headings, shapes {sorted(shapes)} and {count} captions."
        )
    shown = min(count, MAX_SHOWN)
    if shown == 1:
        return near_square(_single([column[0] for column in columns], headings, captions[0]))
    groups = 2 if shown >= _TWO_GROUPS else 1
    rows = math.ceil(shown / groups)
    width = (WIDTH - _GAP * (groups - 1)) // groups
    stacks = [
        _group([column[start : min(start + rows, shown)] for column in columns], headings, captions[start:], width)
        for start in range(0, shown, rows)
    ]
    return near_square(_side_by_side(stacks))


def _group(columns: Sequence[Pixels], headings: Sequence[str], captions: Sequence[Caption], width: int) -> Pixels:
    """Samples below one another."""
    side = (width - _GAP * (len(columns) - 1)) // len(columns)
    height = _height(columns[0][0], side)
    parts = [_side_by_side([text_lines([heading], side) for heading in headings])]
    for index in range(len(columns[0])):
        parts.append(_side_by_side([fitted(column[index], height, side) for column in columns]))
        parts.append(text_lines(captions[index], width))
    return _stacked(parts, width)


def _single(pictures: Sequence[Pixels], headings: Sequence[str], caption: Caption) -> Pixels:
    """One sample, its pictures two by two, the caption in the place left over or below."""
    side = (WIDTH - _GAP) // 2
    height = _height(pictures[0], side)
    cells = [
        _stacked([text_lines([heading], side), fitted(picture, height, side)], side)
        for picture, heading in zip(pictures, headings, strict=True)
    ]
    rows = [_side_by_side(cells[index : index + 2]) for index in range(0, len(cells), 2)]
    return _stacked([*rows, text_lines(caption, WIDTH)], WIDTH)


def _height(picture: Pixels, side: int) -> int:
    """Of a cell that is `side` wide: as high as the picture will be, but never higher than wide."""
    factor = side / max(picture.shape[:2])
    return min(side, round(picture.shape[0] * (int(factor) if factor >= 1 else factor)) or 1)


def fitted(picture: Pixels, height: int, width: int) -> Pixels:
    """A picture in the middle of a mid-grey cell, as large as fits; enlarged by whole numbers, without smoothing.

    Args:
        picture: (H, W, 3).
        height: Of the cell.
        width: Of the cell.

    Returns:
        (height, width, 3).
    """
    factor = min(height / picture.shape[0], width / picture.shape[1])
    if factor >= 1:
        resized = picture.repeat(int(factor), axis=0).repeat(int(factor), axis=1)
    else:
        size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
        resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
    canvas = _blank(height, width)
    top, left = (height - resized.shape[0]) // 2, (width - resized.shape[1]) // 2
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return canvas


def frame(pictures: Pixels) -> Pixels:
    """The first four samples in one frame of a film strip.

    Args:
        pictures: (N, H, W, 3).

    Returns:
        (height, 78, 3); the height depends on the shape of the pictures alone.
    """
    columns = 1 if len(pictures) == 1 else 2
    side = (FRAME - (columns - 1) * _GAP) // columns
    height = _height(pictures[0], side)
    cells = [fitted(picture, height, side) for picture in pictures[: columns * columns]]
    rows = [_side_by_side(cells[index : index + columns]) for index in range(0, len(cells), columns)]
    return _stacked(rows, FRAME)


def strip_sheet(frames: Sequence[tuple[int, Pixels]], first: Pixels | None = None) -> Pixels:
    """Frames in reading order, each with its step above it.

    Args:
        frames: Pairs of a step and what `frame` gave, at least one.
        first: What `frame` gave for the images, shown before the others under the heading "images".

    Returns:
        (height, width, 3), at most 320 wide with up to 16 frames, no more than twice as high or half as high.
    """
    cells = [] if first is None else [_stacked([text_lines(["images"], FRAME), first], FRAME)]
    cells += [_stacked([text_lines([f"step {step_label(step)}"], FRAME), picture], FRAME) for step, picture in frames]
    columns = math.ceil(math.sqrt(len(cells)))
    rows = [_side_by_side(cells[index : index + columns]) for index in range(0, len(cells), columns)]
    return near_square(_stacked(rows, rows[0].shape[1]))


def near_square(picture: Pixels) -> Pixels:
    """The picture with as much mid-grey below or beside it as makes no side more than twice the other."""
    height, width = picture.shape[:2]
    canvas = _blank(max(height, math.ceil(width / 2)), max(width, math.ceil(height / 2)))
    canvas[:height, :width] = picture
    return canvas


def _side_by_side(pictures: Sequence[Pixels]) -> Pixels:
    """From left to right with gaps, the tops in line."""
    width = sum(picture.shape[1] for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas = _blank(max(picture.shape[0] for picture in pictures), width)
    left = 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + _GAP
    return canvas


def _stacked(pictures: Sequence[Pixels], width: int) -> Pixels:
    """From top to bottom with gaps, each widened to `width`."""
    canvas = _blank(sum(picture.shape[0] for picture in pictures) + _GAP * (len(pictures) - 1), width)
    top = 0
    for picture in pictures:
        canvas[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0] + _GAP
    return canvas


def _blank(height: int, width: int) -> Pixels:
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = MID_GREY
    return canvas
