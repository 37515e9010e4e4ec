"""What the projector reads: raw vectors, a table of labels, a sheet of thumbnails. Arrays to bytes, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_interp.sinks.png import encode_png

# The projector draws a thumbnail as wide as it is in the sheet (flat view) or 30 pixels wide (in space), and blurs what
# it magnifies. It refuses sheets of more than 8192 pixels; half of that is 67 MB on the graphics card.
MIN_SIDE, MAX_SIDE, MAX_SHEET = 32, 64, 4096
EMPTY = "(empty)"
NOT_FINITE = " (not finite)"
MIN_DIMENSIONS = 3


def vectors(points: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Points as the projector can take them.

    Rows get Euclidean length 1: the projector's own t-SNE and UMAP find neighbours by a cosine distance that is right
    for nothing else. Rows of zeros stay zeros, and so become rows with a NaN or an infinity, since one of them would
    make every coordinate of every point NaN. Rows of up to three values keep their length, because they can be looked
    at as they are; they are filled up with zeros to three, without which nothing is drawn.

    Args:
        points: (N, D); not changed.

    Returns:
        (N, max(D, 3)), float32, a copy, and (N,), False for the rows that were not finite.

    Example:
        >>> vectors(np.array([[3, 0, 0, 4], [0, 0, 0, 0], [1, np.nan, 0, 0]], np.float32))[0].round(1).tolist()
        [[0.6000000238418579, 0.0, 0.0, 0.800000011920929], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    points = np.asarray(points, dtype=np.float32)
    peak = np.abs(points).max(axis=1, initial=0)
    finite = np.isfinite(peak)
    if not finite.all():
        points = np.where(finite[:, None], points, np.float32(0))
        peak = np.where(finite, peak, np.float32(0))
    if points.shape[1] <= MIN_DIMENSIONS:
        filled = np.zeros((len(points), MIN_DIMENSIONS), dtype=np.float32)
        filled[:, : points.shape[1]] = points
        return filled, finite
    # Through the largest value, so that the squares neither overflow nor vanish.
    scaled = points / np.where(peak > 0, peak, np.float32(1))[:, None]
    lengths = np.sqrt(np.einsum("nd,nd->n", scaled, scaled))
    scaled /= np.where(lengths > 0, lengths, np.float32(1))[:, None]
    return scaled, finite


def raw(matrix: NDArray[np.float32]) -> memoryview:
    r"""The bytes of a matrix, so changed that no one can take them for text.

    The projector reads a file as text first, and as raw numbers only if it is no valid UTF-8. A matrix of zeros is, and
    puts an end to the whole tab. So if the first number is zero it becomes -0, whose last byte can't stand where it
    does; else its first byte becomes 0xFF, which UTF-8 never has: the last eight bits of the mantissa, a relative
    change of at most 3e-5.

    Args:
        matrix: (N, D) with N * D > 0, C order; changed in place.

    Example:
        >>> bytes(raw(np.zeros((1, 2), np.float32)))
        b'\x00\x00\x00\x80\x00\x00\x00\x00'
    """
    content = matrix.reshape(-1).view(np.uint8)
    if matrix.flat[0] == 0:
        matrix.flat[0] = -0.0
    else:
        content[0] = 0xFF
    return content.data


def table(labels: Sequence[str], columns: Mapping[str, Sequence[str]], finite: NDArray[np.bool_]) -> bytes:
    r"""The labels and other columns, tab-separated.

    The projector takes the first line for a header if and only if there are several columns, skips empty lines (all
    later labels would move up by one) and knows no way to escape a tab or a line break. So these become spaces, and
    what is empty becomes "(empty)". Without labels and columns, points get their number.

    Args:
        labels: N strings, or none.
        columns: Name to N strings.
        finite: (N,); where it is False, the first column says so.

    Returns:
        UTF-8, each line ended.

    Example:
        >>> table(["cat", "a\tb"], {"index": ["7", ""]}, np.array([True, True])).decode()
        'label\tindex\ncat\t7\na b\t(empty)\n'
    """
    named = {"label": labels} if labels else {}
    named |= {clean(name): values for name, values in columns.items()}
    if not named:
        named["label"] = [str(i) for i in range(len(finite))]
    cleaned = [[clean(value) for value in values] for values in named.values()]
    for i in np.flatnonzero(~finite):
        cleaned[0][i] += NOT_FINITE
    lines = ["\t".join(row) for row in zip(*cleaned, strict=True)]
    if len(named) > 1:
        lines.insert(0, "\t".join(named))
    return ("\n".join(lines) + "\n").encode()


def clean(text: object) -> str:
    r"""A text without tabs, line breaks and what can't be seen; "(empty)" if nothing is left.

    Example:
        >>> clean("a\tb\r\nc"), clean(" ")
        ('a b c', '(empty)')
    """
    text = str(text)
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split()) or EMPTY


def thumbnail_size(count: int, height: int, width: int) -> tuple[int, int, int, int]:
    """How large thumbnails become.

    Those of less than 32 pixels are enlarged by a whole number, those of more than 64 pixels shrunk, and so are those
    of which too many would stand in a row of a sheet of 4096 pixels.

    Args:
        count: Number of thumbnails.
        height: In pixels.
        width: In pixels.

    Returns:
        Thumbnails in a row, side of a cell, height and width of a thumbnail in its cell.

    Example:
        >>> thumbnail_size(1797, 8, 8), thumbnail_size(40_000, 32, 16)
        ((43, 32, 32, 32), (200, 20, 20, 10))
    """
    a_row = math.isqrt(count - 1) + 1
    longest, limit = max(height, width), max(1, min(MAX_SIDE, MAX_SHEET // a_row))
    if longest > limit:
        shrunk = [max(1, round(size * limit / longest)) for size in (height, width)]
        return a_row, limit, shrunk[0], shrunk[1]
    factor = max(1, min(MIN_SIDE, limit) // longest)
    return a_row, longest * factor, height * factor, width * factor


def sprite_sheet(sprites: NDArray[np.uint8]) -> bytes:
    """All thumbnails in one picture, in reading order.

    The sheet has as many rows as columns and square cells: the projector divides by the wrong one of the two, and draws
    every thumbnail as a square. What a thumbnail that is no square leaves free is transparent.

    Args:
        sprites: (N, H, W, 3), N, H and W at least 1.

    Returns:
        PNG; `thumbnail_size` has the side of a cell.
    """
    count, height, width, _ = sprites.shape
    a_row, side, high, wide = thumbnail_size(count, height, width)
    cells = np.zeros((a_row * a_row, side, side, 3 if high == wide else 4), dtype=np.uint8)
    top, left = (side - high) // 2, (side - wide) // 2
    places = cells[:count, top : top + high, left : left + wide]
    if max(height, width) > side:
        for place, sprite in zip(places, sprites, strict=True):
            shrunk = Image.fromarray(np.ascontiguousarray(sprite)).resize((wide, high), Image.Resampling.BOX)
            place[..., :3] = np.asarray(shrunk)
    else:
        factor = side // max(height, width)
        places[..., :3] = sprites.repeat(factor, axis=1).repeat(factor, axis=2)
    places[..., 3:] = 255
    sheet = cells.reshape(a_row, a_row, side, side, -1).swapaxes(1, 2).reshape(a_row * side, a_row * side, -1)
    return encode_png(sheet)
