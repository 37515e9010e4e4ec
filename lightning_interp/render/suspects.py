"""Training images whose label looks wrong: as a picture, as a Markdown table, and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_interp.render.color import Color, Pixels
from lightning_interp.render.gallery import GAP, filled
from lightning_interp.render.markdown import escape
from lightning_interp.render.sheets import MID_GREY, WIDTH, near_square
from lightning_interp.render.text import CHARACTER, LINE, Segment, text_lines

MAX_SHOWN = 16  # four by four; smaller ones can't be judged
GIVEN: Color = (255, 150, 130)
SUGGESTED: Color = (140, 225, 140)
QUIET: Color = (170, 170, 170)
_ARROW = " -> "
_MOST_COLUMNS = 4
# What a spreadsheet would take for a formula at the start of a cell, the full-width forms included.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class SuspectRow:
    """One training image.

    Attributes:
        index: Into the training set.
        given: Name of its label.
        suggested: Name of the label that fits better.
        score: The larger, the more suspicious.
    """

    index: int
    given: str
    suggested: str
    score: float


def suspect_rows(
    indices: Sequence[int],
    given: Sequence[int],
    suggested: Sequence[int],
    scores: Sequence[float],
    classes: Sequence[str] | None = None,
) -> list[SuspectRow]:
    """The ranked images, with names for classes.

    Args:
        indices: (M,), into the training set.
        given: (M,), class indices.
        suggested: (M,), class indices.
        scores: (M,).
        classes: Names; a class without one is named by its number.

    Raises:
        ValueError: If the lengths differ.

    Example:
        >>> suspect_rows([17], [0], [2], [4.5], ["cat", "dog"])
        [SuspectRow(index=17, given='cat', suggested='2', score=4.5)]
    """
    names = classes or []

    def name(index: int) -> str:
        return names[index] if 0 <= index < len(names) else str(index)

    ranked = zip(indices, given, suggested, scores, strict=True)
    return [SuspectRow(int(at), name(int(is_)), name(int(fits)), float(score)) for at, is_, fits, score in ranked]


def suspects_sheet(images: Pixels | Sequence[Pixels], rows: Sequence[SuspectRow]) -> Pixels:
    """The most suspicious images, in reading order, each with its label, the better one, its index and its score.

    The given label is red, the suggested one green. Both stand on one line, `3 -> 8`, if they fit for all, else on two.

    Args:
        images: M pictures (H, W, 3), the most suspicious first, at least one; the first 16 are shown.
        rows: M.

    Returns:
        (height, 320, 3), on mid-grey; no side more than twice the other.

    Raises:
        ValueError: If the numbers differ or there is nothing to show.

    Example:
        >>> row = SuspectRow(17, "cat", "dog", 4.5)
        >>> suspects_sheet([np.zeros((8, 8, 3), np.uint8)] * 16, [row] * 16).shape
        (422, 320, 3)
    """
    if len(images) != len(rows) or not rows:
        raise ValueError(f"Expected a picture for each row, at least one, but got {len(images)} and {len(rows)}.")
    shown = rows[:MAX_SHOWN]
    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(len(shown))))
    side = (WIDTH - GAP * (columns - 1)) // columns
    room = side // CHARACTER
    short = all(len(row.given) + len(_ARROW) + len(row.suggested) <= room for row in shown)
    captions = [_caption(row, room, short) for row in shown]
    below = LINE * len(captions[0])
    height = math.ceil(len(shown) / columns) * (side + below + GAP) - GAP
    canvas = np.empty((height, WIDTH, 3), dtype=np.uint8)
    canvas[:] = MID_GREY
    for place, (picture, caption) in enumerate(zip(images, captions, strict=False)):
        top, left = place // columns * (side + below + GAP), place % columns * (side + GAP)
        canvas[top : top + side, left : left + side] = filled(picture, side, side)
        canvas[top + side : top + side + below, left : left + side] = text_lines(caption, side)
    return near_square(canvas)


def suspects_table(rows: Sequence[SuspectRow], *, limit: int = 50) -> str:
    r"""The ranked images as a Markdown table.

    Args:
        rows: The most suspicious first.
        limit: Most rows; a last line says how many there are in all.

    Example:
        >>> print(suspects_table([SuspectRow(17, "cat", "a|b", 4.5)]))
        | rank | index | given label | suggested label | score |
        |--:|--:|---|---|--:|
        | 1 | 17 | cat | a\|b | 4.50 |
    """
    lines = ["| rank | index | given label | suggested label | score |", "|--:|--:|---|---|--:|"]
    for rank, row in enumerate(rows[:limit], start=1):
        cells = (str(rank), str(row.index), escape(row.given), escape(row.suggested), f"{row.score:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    if len(rows) > limit:
        lines += ["", f"The first {limit} of {len(rows)}."]
    return "\n".join(lines)


def suspects_csv(rows: Sequence[SuspectRow]) -> str:
    """The ranked images as CSV, as the csv module writes and reads it; to be written in UTF-8 with `newline=""`.

    Columns: index, given_label, suggested_label, score (6 digits). All names are quoted. A name that a spreadsheet
    would run as a formula (it begins with `=`, `+`, `-`, `@`, a tab or a line break, and is no number) gets an
    apostrophe in front, since the names may come from anywhere.

    Example:
        >>> print(suspects_csv([SuspectRow(17, "cat, black", "=1+1", 4.5)]), end="")
        "index","given_label","suggested_label","score"
        17,"cat, black","'=1+1",4.5
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(("index", "given_label", "suggested_label", "score"))
    writer.writerows(
        (row.index, _harmless(row.given), _harmless(row.suggested), float(f"{row.score:.6g}")) for row in rows
    )
    return text.getvalue()


def _caption(row: SuspectRow, room: int, short: bool) -> list[str | list[Segment]]:
    score = f"{row.score:.1f}" if row.score < 100 else f"{row.score:.0e}"
    index = f"#{row.index}"
    gap = room - len(index) - len(score)
    last: list[Segment] = [(index if gap < 1 else f"{index}{' ' * gap}{score}", QUIET)]
    if short:
        return [[(row.given, GIVEN), (_ARROW, QUIET), (row.suggested, SUGGESTED)], last]
    return [[(row.given, GIVEN)], [("-> ", QUIET), (row.suggested, SUGGESTED)], last]


def _harmless(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) and not _NUMBER.fullmatch(name) else name
