"""Short texts in pictures, with the bitmap font that comes with Pillow: 6 pixels a character, 11 high."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightning_interp.render.color import BACKGROUND, Color, Pixels

INK: Color = (235, 235, 235)
LINE = 13  # pixels from one line to the next
CHARACTER = 6  # width in pixels

Segment = tuple[str, Color]
"""A piece of a line and its colour."""


def text_lines(
    lines: Sequence[str | Sequence[Segment]], width: int, *, background: Color = BACKGROUND, ink: Color = INK
) -> Pixels:
    """Lines of text on a bar.

    What does not fit is cut off, its last character replaced by a tilde; characters that the font lacks (it has those
    of Latin-1) become question marks.

    Args:
        lines: Each a string, or pieces of it with their colours.
        width: Of the bar, in pixels, at least one character.
        background: Of the bar.
        ink: Of strings.

    Returns:
        (LINE * number of lines, width, 3).

    Raises:
        ValueError: If the bar is too narrow or there is no line.

    Example:
        >>> text_lines(["label 3", "loss 0.02"], 60).shape
        (26, 60, 3)
    """
    if width < CHARACTER or not lines:
        raise ValueError(f"Expected at least one line and `width` to be at least {CHARACTER}, but got {width}.")
    canvas = Image.new("RGB", (width, LINE * len(lines)), background)
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        left, room = 1, width // CHARACTER
        for piece, color in [(line, ink)] if isinstance(line, str) else line:
            shown = fit(piece, room)
            draw.text((left, row * LINE + 1), shown, fill=color, font=_font())
            left, room = left + CHARACTER * len(shown), room - len(shown)
    return np.array(canvas)


def fit(text: str, room: int) -> str:
    """The text in at most `room` characters that the font has.

    Example:
        >>> fit("golden retriever", 9)
        'golden r~'
    """
    plain = "".join(" " if character.isspace() else character for character in text)
    known = plain.encode("latin-1", "replace").decode("latin-1")
    return known if len(known) <= room else known[: max(room - 1, 0)] + "~" * min(room, 1)


@cache
def _font() -> ImageFont.ImageFont:
    """The bitmap font: `load_default` gives an outline font, whose soft edges TensorBoard's enlarging would blur."""
    return ImageFont.load_default_imagefont()
