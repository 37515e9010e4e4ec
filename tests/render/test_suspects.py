"""The ranked images as picture, table and CSV."""

import csv
import io

import numpy as np
import pytest

from lightning_interp.render.suspects import (
    GIVEN,
    MAX_SHOWN,
    SUGGESTED,
    SuspectRow,
    suspect_rows,
    suspects_csv,
    suspects_sheet,
    suspects_table,
)


def pictures(count, height=8, width=8):
    return [np.full((height, width, 3), 10 * index % 250, dtype=np.uint8) for index in range(count)]


def has(picture, color):
    return bool((picture == np.array(color)).all(axis=-1).any())


def test_rows_name_classes_that_have_a_name():
    """The others by number, as negative ones."""
    rows = suspect_rows(np.array([5, 6]), np.array([1, 0]), np.array([-1, 2]), np.array([2.5, 1.0]), ["a", "b"])
    assert rows == [SuspectRow(5, "b", "-1", 2.5), SuspectRow(6, "a", "2", 1.0)]
    with pytest.raises(ValueError, match="shorter"):
        suspect_rows([1, 2], [0], [1], [2.0])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 16, 40])
@pytest.mark.parametrize("size", [(8, 8), (30, 17), (300, 500)])
def test_sheet_is_a_card_wide_with_no_side_more_than_twice_the_other(count, size):
    """Any number of pictures of any size."""
    sheet = suspects_sheet(pictures(count, *size), [SuspectRow(i, "3", "8", 4.2) for i in range(count)])
    height, width, _ = sheet.shape
    assert width >= 320
    assert max(height, width) <= 2 * min(height, width)
    assert sheet.dtype == np.uint8
    assert has(sheet, GIVEN)
    assert has(sheet, SUGGESTED)


def test_sheet_shows_the_first_ones_in_reading_order():
    """Their own colours in the middle of their cells."""
    sheet = suspects_sheet(pictures(20), [SuspectRow(i, "3", "8", 4.2) for i in range(20)])
    shown = [sheet[4 + row * 107 + 35, 35 + column * 80, 0] for row in range(4) for column in range(4)]
    assert shown == [10 * index for index in range(MAX_SHOWN)]


def test_long_names_get_a_line_each():
    """One more line in all cells than short names need."""
    short = suspects_sheet(pictures(16), [SuspectRow(i, "3", "8", 4.2) for i in range(16)])
    mixed = [SuspectRow(i, "golden retriever" if i == 5 else "3", "8", 4.2) for i in range(16)]
    assert suspects_sheet(pictures(16), mixed).shape[0] - short.shape[0] == 4 * 13


@pytest.mark.parametrize("row", [SuspectRow(10**15, "x" * 300, "\n\u732b", 1e300), SuspectRow(0, "", "", float("nan"))])
def test_odd_rows_are_drawn(row):
    """Long, foreign, empty, not a number."""
    assert suspects_sheet(pictures(1), [row]).shape[1] >= 320


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (2, 1)])
def test_numbers_that_differ_are_refused(count, rows):
    """And nothing at all."""
    with pytest.raises(ValueError, match=f"got {count} and {rows}"):
        suspects_sheet(pictures(count), [SuspectRow(0, "a", "b", 1.0)] * rows)


def test_table_keeps_its_columns_whatever_the_names():
    """Pipes and line breaks of names are made harmless."""
    table = suspects_table([SuspectRow(3, "a|b", "c\nd", 12.345), SuspectRow(4, "`x`", "*", 1.0)])
    lines = table.split("\n")
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == 6 for line in lines)
    assert lines[2] == "| 1 | 3 | a\\|b | c d | 12.35 |"


def test_long_table_says_how_many_there_are():
    """As many rows as were asked for."""
    rows = [SuspectRow(i, "a", "b", 1.0) for i in range(60)]
    assert suspects_table(rows).endswith("\n\nThe first 50 of 60.")
    assert suspects_table(rows, limit=2).count("\n| ") == 2
    assert "The first" not in suspects_table(rows, limit=60)


def test_csv_is_read_back_as_it_was():
    """By the csv module: commas, quotes, line breaks, other alphabets."""
    names = ['cat, "black"', "two\nlines", "\u732b \u00e9", "-1", "+2.5", "", " x"]
    rows = [SuspectRow(i, name, "b", i + 0.125) for i, name in enumerate(names)]
    read = list(csv.DictReader(io.StringIO(suspects_csv(rows), newline="")))
    assert list(read[0]) == ["index", "given_label", "suggested_label", "score"]
    assert [row["given_label"] for row in read] == names
    assert [(int(row["index"]), float(row["score"])) for row in read] == [(row.index, row.score) for row in rows]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff20"])
def test_name_that_a_spreadsheet_would_run_is_made_text(start):
    """With an apostrophe in front."""
    name = f"{start}HYPERLINK(1)"
    (read,) = csv.DictReader(io.StringIO(suspects_csv([SuspectRow(0, "x", name, 1.0)]), newline=""))
    assert read["suggested_label"] == f"'{name}"
