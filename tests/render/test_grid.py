"""Tiles side by side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.render.color import BACKGROUND, SIGNAL
from lightning_interp.render.grid import square_columns, tile


@given(
    count=st.integers(1, 30),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    columns=st.none() | st.integers(1, 40),
    gap=st.integers(1, 3),
    framed=st.booleans(),
)
def test_tile_every_picture_is_found_in_reading_order(count, size, columns, gap, framed):
    """Cut out again at the places that the docstring promises, and nothing else is drawn."""
    height, width = size
    images = np.arange(count * height * width * 3).reshape(count, height, width, 3).astype(np.uint8)
    canvas = tile(images, columns=columns, gap=gap, outlined=[False] * count if framed else None)
    between = gap * (1 + framed)
    across = (canvas.shape[1] - 2 * gap + between) // (width + between)
    assert columns is None or across == min(columns, count)
    free = np.ones(canvas.shape[:2], dtype=bool)
    for index, image in enumerate(images):
        top, left = gap + index // across * (height + between), gap + index % across * (width + between)
        assert (canvas[top : top + height, left : left + width] == image).all()
        free[top : top + height, left : left + width] = False
    assert (canvas[free] == BACKGROUND).all()


def test_tile_marked_ones_have_a_closed_frame_and_their_neighbours_none():
    """A tile between four marked ones does not look marked itself."""
    images = np.full((9, 3, 3, 3), 200, dtype=np.uint8)
    marks = [False, True, False, True, False, True, False, True, False]
    canvas = tile(images, columns=3, outlined=marks)
    assert canvas.shape == (15, 15, 3)
    for index, marked in enumerate(marks):
        top, left = index // 3 * 5 + 1, index % 3 * 5 + 1
        frame = np.ones((5, 5), dtype=bool)
        frame[1:-1, 1:-1] = False
        ring = canvas[top - 1 : top + 4, left - 1 : left + 4][frame]
        assert (ring == SIGNAL).all() if marked else (ring == BACKGROUND).all(), index


def test_tile_size_does_not_depend_on_what_is_marked():
    """Pictures of several steps can be compared."""
    images = np.zeros((7, 3, 3, 3), dtype=np.uint8)
    assert tile(images, outlined=[True] * 7).shape == tile(images, outlined=[False] * 7).shape


@pytest.mark.parametrize("count", [4, 10, 32, 64])
@pytest.mark.parametrize("size", [(3, 3), (3, 30), (26, 5)])
def test_square_columns_no_other_number_is_nearer_to_a_square_without_more_holes(count, size):
    """Against all alternatives."""
    height, width = size
    best = square_columns(count, height, width)

    def ratio_and_holes(columns):
        rows = -(-count // columns)
        return abs(np.log(rows * height / (columns * width))), rows * columns - count

    ratio, holes = ratio_and_holes(best)
    for other in range(1, count + 1):
        other_ratio, other_holes = ratio_and_holes(other)
        assert not (other_ratio < ratio and other_holes <= holes)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, 3, 3, 3), {}),
        ((2, 3, 3), {}),
        ((2, 3, 3, 1), {}),
        ((2, 3, 3, 3), {"columns": 0}),
        ((2, 3, 3, 3), {"gap": 0}),
        ((2, 3, 3, 3), {"outlined": [True]}),
    ],
)
def test_tile_wrong_arguments_are_refused(shape, options):
    """Each with the argument's name."""
    with pytest.raises(ValueError, match=next(iter(options), "images")):
        tile(np.zeros(shape, dtype=np.uint8), **options)
