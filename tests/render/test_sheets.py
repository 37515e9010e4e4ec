"""Sheets of samples and film strips: sizes at the card, pixels that stay what they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.color import NON_FINITE
from lightning_interp.render.sheets import (
    FRAME,
    MID_GREY,
    WIDTH,
    categories,
    category_color,
    fitted,
    frame,
    heat,
    near_square,
    overlay,
    sheet,
    strip_sheet,
)


def pictures(count=4, size=(8, 8), *, seed=0):
    """Random colour pictures."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 300), st.integers(1, 300), st.integers(2, 4), st.integers(1, 2))
def test_sheet_is_as_wide_as_a_card_and_near_square(count, height, width, columns, lines):
    """Whatever the samples are."""
    values = np.full((count, height, width, 3), 200, dtype=np.uint8)
    found = sheet([values] * columns, ["heading"] * columns, [["line"] * lines] * count)
    assert found.dtype == np.uint8
    assert found.shape[1] in (WIDTH, *range(WIDTH, found.shape[0] // 2 + 2))
    assert 0.5 <= found.shape[1] / found.shape[0] <= 2


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8])
def test_sheet_shows_every_sample_once_in_each_column(count):
    """Each sample has a colour of its own, which stays in whole rectangles of the same size."""
    values = np.zeros((count, 8, 8, 3), dtype=np.uint8)
    values[:, :, :, 0] = 10 * np.arange(1, count + 1)[:, None, None]
    found = sheet([values, values], ["a", "b"], [["x"]] * count)
    sizes = {int((found == (10 * i, 0, 0)).all(-1).sum()) for i in range(1, count + 1)}
    assert len(sizes) == 1
    assert sizes.pop() >= 2 * 8 * 8


def test_sheet_shows_at_most_eight_samples():
    """More would be too small to see."""
    values = np.zeros((9, 8, 8, 3), dtype=np.uint8)
    values[8] = (255, 0, 0)
    assert not (sheet([values], ["a"], [["x"]] * 9) == (255, 0, 0)).all(-1).any()


@pytest.mark.parametrize(
    ("columns", "headings", "captions"),
    [([(2, 4, 4, 3), (2, 4, 5, 3)], 2, 2), ([(2, 4, 4, 3)], 2, 2), ([(2, 4, 4, 3)], 1, 3), ([(0, 4, 4, 3)], 1, 0)],
)
def test_sheet_of_parts_that_do_not_fit_together_is_refused(columns, headings, captions):
    """Shapes and numbers must agree."""
    with pytest.raises(ValueError, match="Expected a heading for each column"):
        sheet([np.zeros(shape, np.uint8) for shape in columns], ["a"] * headings, [["x"]] * captions)


def test_small_picture_is_enlarged_by_whole_numbers():
    """The pixels stay what the network saw."""
    picture = pictures(1, (3, 4))[0]
    found = fitted(picture, 20, 20)
    inner = found[2:17, 0:20]
    assert np.array_equal(inner, picture.repeat(5, 0).repeat(5, 1))
    assert (found[:2] == MID_GREY).all()
    assert (found[17:] == MID_GREY).all()


def test_large_picture_is_averaged():
    """Two by two."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[::2] = 100
    assert (fitted(picture, 4, 4) == 50).all()


@pytest.mark.parametrize("signed", [True, False])
def test_heat_has_a_scale_for_each_sample(signed):
    """A faint map is as bright as a strong one; NaN is magenta; a map of zeros is flat."""
    values = np.random.default_rng(0).normal(size=(1, 6, 6))
    values = np.concatenate([values, 1000 * values, np.zeros((1, 6, 6)), values])
    values[3, 0, 0] = np.nan
    found = heat(values, signed=signed)
    assert np.array_equal(found[0], found[1])
    assert len(np.unique(found[2].reshape(-1, 3), axis=0)) == 1
    assert tuple(found[3, 0, 0]) == NON_FINITE


def test_overlay_is_grey_where_the_map_is_zero_and_coloured_where_it_is_large():
    """And magenta where it is no number."""
    values = np.zeros((1, 2, 3))
    values[0, 0, 1], values[0, 1, 2] = 1.0, np.inf
    found = overlay(pictures(1, (2, 3)), values)[0]
    assert len(set(found[0, 0].tolist())) == 1
    assert len(set(found[0, 1].tolist())) == 3
    assert tuple(found[1, 2]) == NON_FINITE
    with pytest.raises(ValueError, match="Expected maps"):
        overlay(pictures(1, (2, 3)), np.zeros((1, 3, 2)))


def test_classes_have_colours_and_the_target_is_grey():
    """The same class has the same colour in every sample, unless it is the target there."""
    values = np.array([[[0, 1, 2]], [[0, 1, 2]]])
    found = categories(values, np.array([0, 1]))
    assert len({tuple(found[0, 0, 0]), *(category_color(i) for i in range(10))}) == 11
    assert tuple(found[0, 0, 2]) == tuple(found[1, 0, 2]) == category_color(2)
    assert tuple(found[0, 0, 0]) == tuple(found[1, 0, 1]) == (225, 225, 225)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(8, 8), (5, 20), (20, 5), (200, 100)])
def test_frame_has_the_width_of_a_frame(count, size):
    """Its height depends on the shape alone, so that frames of one run fit together."""
    found = frame(pictures(count, size))
    assert found.shape == frame(pictures(count, size, seed=1)).shape
    assert found.shape[1] == FRAME


@pytest.mark.parametrize("count", [1, 2, 5, 15])
def test_strip_fits_a_card(count):
    """With the images in the first place; every frame is there."""
    frames = [(10**i, np.full((FRAME, FRAME, 3), 3 * i + 1, np.uint8)) for i in range(count)]
    first = np.full((FRAME, FRAME, 3), 255, np.uint8)
    found = strip_sheet(frames, first)
    assert found.shape[1] <= WIDTH
    assert 0.5 <= found.shape[1] / found.shape[0] <= 2
    for _, picture in [(0, first), *frames]:
        assert int((found == picture[0, 0]).all(-1).sum()) >= FRAME * FRAME


def test_near_square_adds_grey_only():
    """What is there stays there."""
    picture = pictures(1, (10, 50))[0]
    found = near_square(picture)
    assert found.shape == (25, 50, 3)
    assert np.array_equal(found[:10], picture)
    assert (found[10:] == MID_GREY).all()
    assert near_square(picture.swapaxes(0, 1)).shape == (50, 25, 3)
