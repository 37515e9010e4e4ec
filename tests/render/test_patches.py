"""Pieces of images, their projections, and the blocks they are shown in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.color import BACKGROUND
from lightning_interp.render.patches import Excitement, cut, excitement_sheet, projection
from lightning_interp.render.sheets import MID_GREY
from lightning_interp.render.text import LINE


def numbered(height, width):
    """Each pixel says where it is."""
    rows, columns = np.indices((height, width))
    return np.stack((rows + 100, columns + 100, rows * 0), axis=-1).astype(np.uint8)


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), top=st.integers(-12, 12), left=st.integers(-12, 12),
    rows=st.integers(1, 12), columns=st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_cut_equals_pixel_by_pixel(height, width, top, left, rows, columns):  # noqa: PLR0917 - drawn
    """Inside: the image; outside: dark; an axis that is covered entirely is shown whole."""
    picture = numbered(height, width)
    piece = cut(picture, ((top, top + rows), (left, left + columns)))
    first_row, first_column = (0 if rows >= height else top), (0 if columns >= width else left)
    assert piece.shape[:2] == (min(rows, height), min(columns, width))
    for y in range(piece.shape[0]):
        for x in range(piece.shape[1]):
            row, column = first_row + y, first_column + x
            inside = 0 <= row < height and 0 <= column < width
            assert tuple(piece[y, x]) == (tuple(picture[row, column]) if inside else BACKGROUND)


def test_without_a_box_the_image_is_whole():
    """The receptive field is the whole image."""
    assert np.array_equal(cut(numbered(4, 6), None), numbered(4, 6))


def test_projection_is_mid_grey_where_nothing_is():
    """Colours for three channels, grey for any other number."""
    gradient = np.zeros((3, 2, 2), dtype=np.float32)
    gradient[0, 0, 0], gradient[2, 1, 1] = 1.0, -1.0
    assert projection(gradient).tolist() == [[[255, 128, 128], [128] * 3], [[128] * 3, [128, 128, 0]]]
    grey = projection(gradient[:2])
    assert tuple(grey[0, 0]) == (255, 255, 255)
    assert tuple(grey[1, 1]) == MID_GREY
    assert tuple(projection(np.full((1, 1, 1), np.nan, dtype=np.float32))[0, 0]) == (255, 0, 255)


def shown(count, k, *, projections=True, made=False, size=7):
    patch = np.full((size, size, 3), 250, dtype=np.uint8)
    other = np.full((size, size, 3), 5, dtype=np.uint8)
    return [
        Excitement(f"f{i}", [patch] * k, [other] * k if projections else [], patch if made else None)
        for i in range(count)
    ]


@given(
    count=st.integers(1, 12), k=st.integers(1, 10), projections=st.booleans(), made=st.booleans(),
    size=st.sampled_from([1, 5, 28, 100]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_sheet_fits_a_card_and_is_near_to_a_square(count, k, projections, made, size):
    """Whatever is shown."""
    picture = excitement_sheet(shown(count, k, projections=projections, made=made, size=size), k)
    height, width = picture.shape[:2]
    assert max(height, width) <= 2 * min(height, width) + 1
    assert width <= 320 or width <= height // 2 + 1
    assert (picture == 250).all(axis=-1).any()
    assert (picture == 5).all(axis=-1).any() == projections


def test_sheet_has_patches_at_the_left_of_each_block_and_projections_at_the_right():
    """One filter, four places, two patches: the rest stays mid-grey."""
    picture = excitement_sheet(shown(1, 2), 4)
    side = (320 - 3) // 4
    centre = side // 2
    assert picture[centre, centre].tolist() == [250] * 3
    assert picture[centre, side + centre].tolist() == [250] * 3
    assert picture[side + centre, centre].tolist() == list(MID_GREY)
    assert picture[centre, 2 * side + 3 + centre].tolist() == [5] * 3
    assert picture.shape[0] == 2 * side + LINE


def test_filter_that_nothing_excites_has_only_its_line():
    """Beside one that fires."""
    picture = excitement_sheet([*shown(1, 1), Excitement("f1")], 1)
    assert (picture == 250).all(axis=-1).any()
    only = excitement_sheet([Excitement("f1")], 1)
    assert set(map(tuple, only[:100].reshape(-1, 3).tolist())) == {MID_GREY}


def test_no_filters_are_refused():
    """There is nothing to show."""
    with pytest.raises(ValueError, match="at least one filter"):
        excitement_sheet([], 4)
