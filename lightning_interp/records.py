"""What a callback hands to the loggers: plain values with a tag, a unit and a step.

Nothing here knows torch, Lightning or TensorBoard; `sinks.py` turns records into what each logger understands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_BROKEN_IN_TAGS = re.compile(r'["\\\x00-\x1f\x7f]')


def safe_tag(tag: str) -> str:
    r"""Quotes, backslashes and control characters as in an address: TensorBoard's fast back end shows no picture else.

    Example:
        >>> safe_tag("interp.filters/00_a\\b é")
        'interp.filters/00_a%5Cb é'
    """
    return _BROKEN_IN_TAGS.sub(lambda mark: f"%{ord(mark[0]):02X}", tag)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Common to all records.

    Attributes:
        tag: Name in the logger, `interp.<quantity>/<NN>_<layer>` or `interp/<quantity>`.
        step: Position on the axis that `self.log` uses; never the epoch.
        unit: Unit of the values, empty when they have none.
    """

    tag: str
    step: int
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Scalar(Record):
    """One number. NaN and infinities are allowed: they are what one looks for."""

    value: float


@dataclass(frozen=True, kw_only=True)
class Histogram(Record):
    """A distribution, already binned.

    Attributes:
        counts: (B,), number of values in each bin.
        edges: (B + 1,), increasing.
    """

    counts: NDArray[np.float64]
    edges: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Image(Record):
    """A picture.

    Attributes:
        pixels: (H, W, 3), uint8.
        caption: One line that says what is shown; loggers without captions drop it.
    """

    pixels: NDArray[np.uint8]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Embedding(Record):
    """Points for the projector.

    Attributes:
        points: (N, D), float32. Zeros, NaN and infinities are allowed.
        labels: N strings of any kind, or none.
        columns: Other things to know about the points, to colour and to search by: name to N strings.
        sprites: (N, H, W, 3) uint8 thumbnails of any size, or None. In TensorBoard's projector those of less than 32
            pixels are enlarged and those of more than 64 shrunk; so many that they don't fit on a sheet of 4096 pixels
            are shrunk further: to 32 pixels for 16,384 of them, to 12 for 100,000.
    """

    points: NDArray[np.float32]
    labels: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)
    sprites: NDArray[np.uint8] | None = None


@dataclass(frozen=True, kw_only=True)
class Text(Record):
    """Markdown."""

    markdown: str
