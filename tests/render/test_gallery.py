"""Pictures with lines of text, and rows of pictures over time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.gallery import column, frame_side, gallery, timeline
from lightning_interp.render.sheets import MID_GREY
from lightning_interp.render.text import LINE, text_lines

RED = (200, 10, 20)


def plain(height, width, color=RED):
    return np.full((height, width, 3), color, dtype=np.uint8)


@given(count=st.integers(1, 20), height=st.integers(1, 80), width=st.integers(1, 80), lines=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_gallery_fits_a_card_and_is_near_to_a_square(count, height, width, lines):
    """320 pixels wide, and no side more than twice the other."""
    picture = gallery([plain(height, width)] * count, [["text"] * lines] * count)
    assert picture.shape[1] == 320
    assert 160 <= picture.shape[0] <= 640
    assert (picture == RED).all(axis=-1).any()


def test_gallery_has_pictures_in_reading_order_with_their_lines():
    """Four colours, two by two."""
    colors = [(10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)]
    picture = gallery([plain(8, 8, color) for color in colors], [[str(i)] for i in range(4)])
    side = (320 - 2) // 2
    for index, color in enumerate(colors):
        top, left = index // 2 * (side + LINE + 2), index % 2 * (side + 2)
        assert tuple(picture[top + side // 2, left + side // 2]) == color
        assert np.array_equal(
            picture[top + side : top + side + LINE, left : left + side], text_lines([str(index)], side)
        )


def test_gallery_enlarges_small_pictures_by_whole_numbers_without_smoothing():
    """What the network made stays what it is."""
    checks = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)
    picture = gallery([np.repeat(checks[..., None], 3, axis=2)], [[]])
    assert np.array_equal(picture[::40, ::40, 0], checks)
    assert set(np.unique(picture)) == {0, 255}


def test_gallery_refuses_uneven_lines():
    """As many lines for each."""
    for pictures, lines in (([], []), ([plain(2, 2)], []), ([plain(2, 2)] * 2, [["a"], ["a", "b"]])):
        with pytest.raises(ValueError, match="lines"):
            gallery(pictures, lines)


@given(rows=st.integers(1, 12), frames=st.integers(1, 10), name=st.text("ab", min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_timeline_of_ten_frames_fits_a_card(rows, frames, name):
    """However long the names are."""
    names = [name] * rows
    side = frame_side(names, 10)
    picture = timeline([(step, column([plain(5, 5)] * rows, side)) for step in range(frames)], names, side)
    assert picture.shape[1] <= max(320, picture.shape[0] // 2 + 1)
    assert max(picture.shape[:2]) <= 2 * min(picture.shape[:2]) + 1


def test_timeline_has_a_column_a_step():
    """Steps above, names at the left, mid-grey between."""
    frames = [(step, column([plain(4, 4, (step, 0, 0)), plain(4, 4, (0, step, 0))], 20)) for step in (7, 9)]
    picture = timeline(frames, ["a", "b"], 20)
    left = 1 * 6 + 2 + 2
    for index, step in enumerate((7, 9)):
        x = left + index * 22
        assert np.array_equal(picture[:LINE, x : x + 20], text_lines([str(step)], 20))
        assert tuple(picture[LINE + 10, x + 10]) == (step, 0, 0)
        assert tuple(picture[LINE + 22 + 10, x + 10]) == (0, step, 0)
        assert tuple(picture[LINE + 20, x + 10]) == MID_GREY
