"""Pictures of filters."""

import numpy as np
import pytest

from lightning_interp.render.color import NON_FINITE, SIGNAL, diverging, signed_rgb, symmetric_scale
from lightning_interp.render.filters import filter_grid, largest_channels, shown_channels

RNG = np.random.default_rng(0)
CARD = 320  # pixels to which TensorBoard scales a picture

SHAPES = [
    (64, 3, 7, 7), (64, 64, 3, 3), (512, 512, 3, 3), (16, 1, 5, 5), (96, 3, 11, 11), (64, 32, 5, 5), (10, 2, 3, 3),
    (256, 64, 1, 1), (3, 8, 1, 1), (64, 16, 9), (32, 1, 9), (8, 3, 3, 3, 3), (4, 4, 2, 3, 3), (96, 1, 7, 7), (1, 1, 1),
    (5, 13, 3, 3), (2, 4, 1, 7), (2, 4, 7, 1), (32, 3, 1, 1, 1), (4, 32, 1),
]  # fmt: skip


def signals(picture):
    """How many pixels have the signal colour."""
    return int((picture == SIGNAL).all(axis=-1).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_filter_grid_any_layer_is_legible_on_a_card(shape):
    """A weight is at least two screen pixels wide, and the picture does not depend on what is dead."""
    weight = RNG.normal(size=shape)
    plain, marked = filter_grid(weight), filter_grid(weight, dead=[0])
    assert plain.dtype == np.uint8
    assert plain.shape == marked.shape
    assert plain.shape[1] * 2 <= CARD
    assert signals(plain) == 0
    assert signals(marked) >= 4


def test_filter_grid_rgb_layer_has_one_scale_for_all_filters():
    """Zero is mid-grey, a filter of half the size half as far from it, and the colours are the channels."""
    weight = np.zeros((4, 3, 2, 2))
    weight[0, 0], weight[1, 1], weight[2, 2] = 1.0, 0.5, -1.0
    picture = filter_grid(weight)  # tiles of 2x2 with frames: at 1 and 5
    assert picture[1, 1].tolist() == [255, 128, 128]
    assert picture[1, 5].tolist() == [128, 191, 128]
    assert picture[5, 1].tolist() == [128, 128, 0]
    assert picture[5, 5].tolist() == [128, 128, 128]


def test_filter_grid_rgb_layer_equals_naive_placement():
    """Every pixel of every tile, clipped at the common scale."""
    weight = RNG.normal(size=(10, 3, 4, 3))
    picture, scale = filter_grid(weight), symmetric_scale(weight)
    columns = (picture.shape[1] - 2 + 2) // 5
    for index, kernel in enumerate(weight):
        top, left = 1 + index // columns * 6, 1 + index % columns * 5
        for y in range(4):
            for x in range(3):
                assert picture[top + y, left + x].tolist() == signed_rgb(kernel[:, y, x], scale).tolist()


def test_filter_grid_deep_layer_is_a_row_of_kernels_for_each_filter():
    """Channels from left to right, one pixel between kernels, one scale."""
    weight = RNG.normal(size=(2, 5, 3, 2))
    picture, colours = filter_grid(weight), diverging(weight, symmetric_scale(weight))
    assert picture.shape == (2 + 3 + 2 + 3, 2 + 5 * 3 - 1, 3)
    for o in range(2):
        for i in range(5):
            assert (picture[1 + 5 * o : 4 + 5 * o, 1 + 3 * i : 3 + 3 * i] == colours[o, i]).all()


def test_filter_grid_many_channels_shows_the_largest_in_their_order():
    """The same ones for all filters, bounded by what can be read."""
    weight = RNG.normal(size=(64, 100, 3, 3)) * 0.01
    chosen = [3, 17, 40, 41, 80, 99]
    weight[:, chosen] += 1.0
    assert shown_channels(weight.shape) == len(chosen)
    assert (filter_grid(weight) == filter_grid(weight[:, chosen])).all()
    assert (filter_grid(weight, channels=[0, 1, 2, 4]) == filter_grid(weight[:, [0, 1, 2, 4]])).all()


def test_filter_grid_three_of_many_channels_is_not_taken_for_colour():
    """Only a layer that has three channels is."""
    weight = RNG.normal(size=(4, 9, 3, 3))
    picture = filter_grid(weight, channels=[0, 1, 2])
    assert picture.shape != filter_grid(weight[:, :3]).shape


def test_filter_grid_pointwise_layer_is_the_matrix():
    """A filter a row, and a dead one marked at both ends of its row and nowhere else."""
    weight = RNG.normal(size=(6, 9, 1, 1))
    picture = filter_grid(weight, dead=[2])
    assert (picture[1:-1, 3:-3] == diverging(weight[:, :, 0, 0], symmetric_scale(weight))).all()
    assert np.argwhere((picture == SIGNAL).all(axis=-1)).tolist() == [[3, 0], [3, 1], [3, 13], [3, 14]]


def test_filter_grid_one_axis_is_a_tile_of_channels_by_time():
    """A channel a row."""
    weight = RNG.normal(size=(1, 4, 7))
    assert (filter_grid(weight)[1:-1, 1:-1] == diverging(weight[0], symmetric_scale(weight))).all()


def test_filter_grid_three_axes_is_the_middle_slice():
    """Of depth or time."""
    weight = RNG.normal(size=(4, 3, 5, 3, 3))
    assert (filter_grid(weight) == filter_grid(weight[:, :, 2])).all()


def test_filter_grid_dead_filters_are_outlined_and_those_not_shown_ignored():
    """Three 3x3 tiles with a ring of 16 pixels each."""
    weight = RNG.normal(size=(100, 1, 3, 3))
    assert signals(filter_grid(weight, dead=[0, 1, 63, 64, 99])) == 3 * 16
    assert signals(filter_grid(weight, dead=[])) == 0


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 3, 3), (4, 8, 3, 3), (4, 8, 1, 1), (4, 8, 3)])
def test_filter_grid_constant_and_not_finite_weights_do_not_raise(shape):
    """Zero has the neutral colour, NaN its own, and the others keep theirs."""
    assert len(np.unique(filter_grid(np.zeros(shape)).reshape(-1, 3), axis=0)) == 2
    weight = RNG.normal(size=shape)
    weight.reshape(-1)[0] = np.nan
    picture = filter_grid(weight)
    assert (picture == NON_FINITE).all(axis=-1).sum() == 1
    assert (filter_grid(np.full(shape, np.inf)) == NON_FINITE).all(axis=-1).any()


def test_largest_channels_equals_naive_norms():
    """Also with NaN, which counts as nothing, and infinity, which comes first."""
    weight = RNG.normal(size=(7, 12, 3, 2))
    norms = [np.linalg.norm(weight[:, i]) for i in range(12)]
    assert largest_channels(weight, 4).tolist() == sorted(np.argsort(norms)[-4:].tolist())
    weight[0, 5, 0, 0] = np.inf
    weight[:, 6] = np.nan
    assert 5 in largest_channels(weight, 1)
    assert 6 not in largest_channels(weight, 11)
    assert largest_channels(np.zeros((2, 3, 1)), 2).tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 0, 3), (1,) * 6])
def test_filter_grid_wrong_arguments_are_refused(shape):
    """With the shape that came."""
    with pytest.raises(ValueError, match=r"\(O, I, \*kernel\) with 1 to 3 kernel axes, but got \("):
        filter_grid(np.zeros(shape))
    with pytest.raises(ValueError, match="`max_filters` to be positive, but got 0"):
        filter_grid(np.zeros((2, 2, 3)), max_filters=0)
