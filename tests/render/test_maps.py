"""Pictures of activation maps."""

import numpy as np
import pytest

from lightning_interp.render.color import BACKGROUND, NON_FINITE, SIGNAL, diverging, sequential, symmetric_scale
from lightning_interp.render.maps import activation_grid

RNG = np.random.default_rng(0)


def test_activation_grid_non_negative_maps_share_one_scale():
    """Zero is black, and a map of half the size is darker than its neighbour."""
    maps = np.zeros((4, 3, 5))
    maps[0], maps[1] = 1.0, 0.5
    picture = activation_grid(maps)
    colours = sequential(np.array([0.0, 0.5, 1.0]), 0.0, 1.0)
    found = [picture[y, x].tolist() for y, x in np.ndindex(picture.shape[:2])]
    for colour, pixels in zip(colours, (2 * 15, 15, 15), strict=True):
        assert found.count(colour.tolist()) == pixels


def test_activation_grid_signed_maps_diverge_about_zero():
    """As after a LeakyReLU or no activation at all."""
    maps = RNG.normal(size=(1, 6, 6))
    assert (activation_grid(maps)[1:-1, 1:-1] == diverging(maps[0], symmetric_scale(maps))).all()


def test_activation_grid_only_maps_that_are_zero_everywhere_are_outlined():
    """One pixel that fires, however weakly, keeps a channel alive; so does a NaN."""
    maps = np.zeros((3, 80, 80))
    maps[0, 79, 79], maps[1, 0, 0] = 1e-12, np.nan
    picture = activation_grid(maps)
    ring = (picture == SIGNAL).all(axis=-1).sum()
    side = 80 // 4 + 2  # averaged over squares of four
    assert ring == 4 * side - 4


def test_activation_grid_large_maps_are_means_over_squares():
    """Sides that do not divide evenly too."""
    maps = np.abs(RNG.normal(size=(1, 53, 30)))
    picture = activation_grid(maps)
    expected = np.array([[maps[0, y : y + 3, x : x + 3].mean() for x in range(0, 30, 3)] for y in range(0, 53, 3)])
    assert picture.shape == (18 + 2, 10 + 2, 3)
    assert (picture[1:-1, 1:-1] == sequential(expected, 0.0, symmetric_scale(maps))).all()


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 512])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (28, 28), (112, 112), (20, 224)])
def test_activation_grid_with_image_fits_the_card(channels, size):
    """No wider than 320 pixels, so that TensorBoard never shrinks an outline away."""
    image = np.full((*RNG.integers(8, 300, 2), 3), 77, dtype=np.uint8)
    picture = activation_grid(np.zeros((channels, *size)), image)
    assert picture.shape[1] <= 320
    assert (picture == SIGNAL).all(axis=-1).any()
    assert (picture[0, 0] == 77).all()


def test_activation_grid_image_is_left_of_the_unchanged_grid():
    """Its pixels are repeated, not smoothed."""
    maps, image = RNG.normal(size=(16, 8, 8)), RNG.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    grid, both = activation_grid(maps), activation_grid(maps, image)
    assert (both[:, -grid.shape[1] :] == grid).all()
    assert (both[:16, :16] == image.repeat(4, axis=0).repeat(4, axis=1)).all()
    assert (both[16:, :16] == BACKGROUND).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, np.nan, np.inf])
def test_activation_grid_constant_or_not_finite_maps_do_not_raise(value):
    """NaN and infinity are marked."""
    picture = activation_grid(np.full((2, 30, 30), value))
    assert (picture == NON_FINITE).all(axis=-1).any() == (not np.isfinite(value))


def test_activation_grid_sequences_are_strips():
    """(C, length)."""
    maps = RNG.normal(size=(5, 20))
    assert (activation_grid(maps) == activation_grid(maps[:, None])).all()


def test_activation_grid_wrong_arguments_are_refused():
    """With the shape that came."""
    with pytest.raises(ValueError, match=r"\(C, h, w\) and not empty, but got shape \(1, 2, 3, 4\)"):
        activation_grid(np.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="`max_channels` to be positive, but got 0"):
        activation_grid(np.zeros((1, 2, 3)), max_channels=0)
    with pytest.raises(ValueError, match=r"`image` to be \(H, W, 3\) and not empty, but got shape \(2, 2\)"):
        activation_grid(np.zeros((1, 2, 3)), np.zeros((2, 2), dtype=np.uint8))
