"""Colour maps and de-normalisation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lightning_interp.render.color import (
    BACKGROUND,
    NON_FINITE,
    SIGNAL,
    bounds,
    denormalise,
    diverging,
    sequential,
    signed_rgb,
    symmetric_scale,
    to_uint8,
)


def lightness(pixels):
    """Relative luminance (ITU-R BT.709) of sRGB."""
    linear = np.where(pixels / 255 <= 0.04045, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_sequential_lightness_rises_throughout():
    """So that it also reads in grey and for the colour-blind."""
    steps = lightness(sequential(np.linspace(0, 1, 256), 0.0, 1.0))
    assert (np.diff(steps) > -2e-3).all()
    assert steps[0] == 0.0
    assert steps[-1] > 0.9


def test_diverging_darkens_away_from_zero_and_differs_in_hue():
    """Blue below, red above, and magnitudes can be told on either side."""
    below, above = diverging(np.linspace(0, -1, 64), 1.0), diverging(np.linspace(0, 1, 64), 1.0)
    for side in (below, above):
        assert (np.diff(lightness(side)) < 2e-3).all()
    assert (below[20:, 2] > below[20:, 0]).all()
    assert (above[20:, 0] > above[20:, 2]).all()


def test_signal_colours_are_far_from_both_maps():
    """An outline and a NaN can't pass for a value."""
    values = np.linspace(-1, 1, 512)
    colours = np.concatenate([diverging(values, 1.0), sequential(values, -1.0, 1.0)]).astype(int)
    for signal in (NON_FINITE, SIGNAL):
        assert np.abs(colours - signal).sum(axis=-1).min() > 100
        assert np.abs(np.subtract(signal, BACKGROUND)).sum() > 200


def test_diverging_values_beyond_the_scale_are_clipped():
    """And so are those that would overflow."""
    ends = diverging(np.array([-1.0, 1.0]), 1.0)
    assert diverging(np.array([-1e308, 1e308]), 1.0).tolist() == ends.tolist()
    assert diverging(np.array([-1e308, 1e308]), 1e308).tolist() == ends.tolist()


def test_signed_rgb_zero_is_mid_grey_and_scale_is_full():
    """Each channel by itself."""
    assert signed_rgb(np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]]), 1.0).tolist() == [[128, 128, 128], [255, 0, 191]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_maps_non_finite_values_have_their_own_colour(bad):
    """In one channel it marks the pixel."""
    assert diverging(np.array([0.0, bad]), 1.0)[1].tolist() == list(NON_FINITE)
    assert sequential(np.array([bad]), 0.0, 1.0)[0].tolist() == list(NON_FINITE)
    assert signed_rgb(np.array([0.0, bad, 0.0]), 1.0).tolist() == list(NON_FINITE)
    assert to_uint8(np.array([[0.0, bad, 0.0], [0.0, 0.0, 1.0]])).tolist() == [list(NON_FINITE), [0, 0, 255]]


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, array_shapes(max_dims=3, max_side=5), elements=st.floats(allow_nan=True)))
def test_maps_any_values_give_pixels_without_warning(values):
    """Constant, huge, tiny, not finite: a scale is found and nothing divides by zero."""
    scale = symmetric_scale(values)
    assert np.isfinite(scale)
    assert scale > 0
    for pixels in (diverging(values, scale), sequential(values, 0.0, scale)):
        assert pixels.shape == (*values.shape, 3)
        assert pixels.dtype == np.uint8
        marked = (pixels == NON_FINITE).all(axis=-1)
        assert (marked == ~np.isfinite(values)).all()


@pytest.mark.parametrize("low_high", [(0.0, 0.0), (1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)])
def test_sequential_wrong_bounds_are_refused(low_high):
    """They come from the caller, not from data."""
    with pytest.raises(ValueError, match="finite bounds with low < high"):
        sequential(np.zeros(2), *low_high)


def test_symmetric_scale_few_outliers_do_not_set_it():
    """One in a thousand does not, and where nearly all is zero the largest value does."""
    values = np.ones(1000)
    values[3] = 50.0
    assert symmetric_scale(values) == 1.0
    assert symmetric_scale(np.where(values == 50.0, -50.0, 0.0)) == 50.0
    assert symmetric_scale(np.array([np.nan, np.inf])) == 1.0
    assert symmetric_scale(np.array([np.nan, -2.0])) == 2.0


def test_bounds_equal_ones_are_moved_apart():
    """At every magnitude."""
    for value in (0.0, -5.0, 1e20):
        low, high = bounds(value, value)
        assert low < high


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("unit", [1.0, 255.0])
def test_denormalise_gives_back_the_image(channels, unit):
    """What a user's transform did is undone to the nearest of 256 values."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, unit, (2, channels, 5, 4))
    mean, std = rng.uniform(0.3, 0.6, channels) * unit, rng.uniform(0.1, 0.3, channels) * unit
    normalised = (images - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    pixels = denormalise(normalised.astype(np.float32), mean.tolist(), std.tolist())
    wanted = images[:, :3] if channels in (3, 4) else images.mean(axis=1, keepdims=True).repeat(3, axis=1)
    assert pixels.shape == (2, 5, 4, 3)
    assert np.abs(pixels.transpose(0, 3, 1, 2) - wanted / unit * 255).max() <= 0.501


def test_denormalise_one_number_serves_all_channels():
    """As transforms allow it."""
    assert denormalise(np.zeros((1, 3, 1, 1)), mean=[0.5], std=[0.5]).tolist() == [[[[128, 128, 128]]]]


def test_denormalise_without_mean_and_std():
    """Unit range as it is, other floats stretched over the batch, integers as 0 to 255."""
    unit = np.array([0.0, 0.2, 0.4]).reshape(1, 1, 1, 3)
    assert denormalise(unit)[0, 0, :, 0].tolist() == [0, 51, 102]
    assert denormalise(unit * 10 - 2)[0, 0, :, 0].tolist() == [0, 128, 255]
    assert denormalise(np.array([0, 7, 255], dtype=np.uint8).reshape(1, 1, 1, 3))[0, 0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, np.nan, np.inf])
def test_denormalise_constant_or_not_finite_does_not_raise(value):
    """NaN pixels are marked."""
    pixels = denormalise(np.full((1, 3, 2, 2), value))
    assert ((pixels == NON_FINITE).all(axis=-1) == (not np.isfinite(value))).all()


def test_denormalise_wrong_arguments_are_refused():
    """With what was expected and what came."""
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), but got shape \(3, 2, 2\)"):
        denormalise(np.zeros((3, 2, 2)))
    with pytest.raises(ValueError, match="`std` to hold 1 or 3 numbers, one for each channel, but got 2"):
        denormalise(np.zeros((1, 3, 2, 2)), std=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"\(..., 3\)"):
        to_uint8(np.zeros((2, 4)))
