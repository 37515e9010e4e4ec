"""Sheets of training images and the direction in which changing them raises the loss of a test image."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.color import BACKGROUND, NON_FINITE, denormalise, diverging
from lightning_interp.render.influence import SUSPICIOUS
from lightning_interp.render.perturbation import Perturbed, perturbation_sheet, take_step
from lightning_interp.render.sheets import WIDTH
from lightning_interp.render.text import INK, LINE, text_lines

SIDE = (WIDTH - 3 * 2) // 4
TOP = LINE + LINE + 2  # below the legend and the headings


def pair(image, direction=None, test=None, *, label="3", test_label="3"):
    direction = np.zeros_like(image) if direction is None else direction
    return Perturbed(image, direction, image if test is None else test, 12, label, 34, test_label)


def squares(picture, row, height=SIDE, lines=3):
    """The four pictures of a row."""
    top = TOP + row * (height + 2 + lines * LINE + 2)
    return [picture[top : top + height, left : left + SIDE] for left in range(0, WIDTH, SIDE + 2)]


def means(square, side=2):
    """Colours in the middle of each enlarged pixel."""
    factor = SIDE // side
    start = (SIDE - factor * side) // 2 + factor // 2
    return square[start::factor, start::factor][:side, :side].tolist()


IMAGE = np.array([[[0.0, 0.25], [0.5, 1.0]]])
DIRECTION = np.array([[[-4.0, 2.0], [4.0, 4.0]]])
TEST = np.array([[[1.0, 0.0], [0.0, 1.0]]])


def test_row_holds_image_direction_step_and_test_image():
    """Two by two pixels; the step is a quarter of the range along the direction, and stays inside the range."""
    picture = perturbation_sheet([pair(IMAGE, DIRECTION, TEST)] * 2)
    stepped = np.array([[[0.0, 0.375], [0.75, 1.0]]])
    for row in range(2):
        image, direction, changed, test = squares(picture, row)
        for square, expected in ((image, IMAGE), (changed, stepped), (test, TEST)):
            assert means(square) == denormalise(expected[None])[0].tolist()
        assert means(direction) == diverging(DIRECTION[0], 4.0).tolist()


def test_caption_has_the_rise_to_first_order():
    """2 * 0.125 + 4 * 0.25: what is cut off at the range does not count."""
    picture = perturbation_sheet([pair(IMAGE, DIRECTION, TEST)] * 2)
    top = TOP + SIDE + 2
    lines = ["training #12, label 3", "test #34, label 3", "this step raises the test loss by about 1.2 nats"]
    assert np.array_equal(picture[top : top + 3 * LINE], text_lines(lines, WIDTH))
    assert f"{2 * 0.125 + 4 * 0.25:.2g}" == re.search(r"about (\S+)", lines[2])[1]


@pytest.mark.parametrize(("label", "differs"), [("3", False), ("8", True)])
def test_label_that_differs_from_the_test_images_is_yellow(label, differs):
    """In the caption."""
    picture = perturbation_sheet([pair(IMAGE, DIRECTION, label=label)] * 2)
    assert (picture == SUSPICIOUS).all(-1).any() == differs


def test_legend_names_the_colours_in_these_colours():
    """The words red and blue are what they say."""
    legend = perturbation_sheet([pair(IMAGE, DIRECTION)])[:LINE].reshape(-1, 3)
    colors = {tuple(color) for color in legend.tolist()} - {BACKGROUND, INK}
    assert len(colors) == 2
    assert {int(np.argmax(color)) for color in colors} == {0, 2}


@given(
    count=st.integers(1, 6), channels=st.integers(1, 5), height=st.integers(1, 60), width=st.integers(1, 60),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_shape_and_count_fits_a_card(count, channels, height, width, seed):
    """320 pixels wide, no side more than twice the other, the same each time, four pairs at most."""
    numbers = np.random.default_rng(seed).normal(size=(count, 3, channels, height, width)).astype(np.float32)
    pairs = [pair(*each) for each in numbers]
    picture = perturbation_sheet(pairs)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == WIDTH
    assert WIDTH <= 2 * picture.shape[0] <= 4 * WIDTH
    assert np.array_equal(picture, perturbation_sheet(pairs))
    assert np.array_equal(picture, perturbation_sheet(pairs[:4]))


@given(seed=st.integers(0, 1000), channels=st.integers(1, 4), spread=st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=40, deadline=None)
def test_step_raises_a_linear_loss_by_what_the_caption_says(seed, channels, spread):
    """Never lowers it: each pixel goes its own way or stays."""
    image, gradient = np.random.default_rng(seed).normal(size=(2, channels, 5, 4))
    gradient = gradient * spread
    stepped, rise = take_step(image, gradient)
    moved = stepped - image
    assert np.isclose(rise, (moved * gradient).sum(), rtol=1e-12, atol=0.0)
    assert rise > 0
    assert (moved * gradient >= 0).all()
    assert np.abs(moved).max() <= 0.25 * np.ptp(image) * (1 + 1e-12)
    assert image.min() <= stepped.min()
    assert stepped.max() <= image.max()


def test_without_a_direction_nothing_moves():
    """The map is light grey, the step is the image, the loss rises by 0."""
    picture = perturbation_sheet([pair(IMAGE)] * 2)
    image, direction, changed, _ = squares(picture, 0)
    assert np.array_equal(image, changed)
    assert means(direction) == [[[238] * 3] * 2] * 2


def test_non_finite_pixels_are_magenta_and_do_not_move():
    """In the map where the direction is NaN, in the pictures where the image is."""
    image = np.array([[[0.0, np.inf], [np.nan, 1.0]]] * 2)
    direction = np.array([[[np.nan, 1.0], [1.0, -1.0]], [[1.0, np.inf], [-np.inf, -1.0]]])
    direction[0, 0, 1] = -np.inf
    shown, heat, changed, _ = squares(perturbation_sheet([pair(image, direction)] * 2), 0)
    magenta = list(NON_FINITE)
    for square, expected in ((shown, [[0, 1], [1, 0]]), (changed, [[0, 1], [1, 0]]), (heat, [[1, 1], [1, 0]])):
        assert [[int(color == magenta) for color in row] for row in means(square)] == expected


def test_normalised_images_are_shown_in_true_colours():
    """Mean and std are undone for the images and for the step, not for the direction."""
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.2, 0.1]
    true = np.random.default_rng(0).random((3, 2, 2))
    normalised = (true - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    picture = perturbation_sheet([pair(normalised)] * 2, mean=mean, std=std)
    image, _, changed, test = squares(picture, 0)
    expected = np.floor(np.moveaxis(true, 0, -1) * 255 + 0.5).astype(int)
    for square in (image, changed, test):
        assert np.abs(np.array(means(square)) - expected).max() <= 1


def test_integer_images_are_zero_to_255():
    """As everywhere."""
    image = (IMAGE * 200).astype(np.uint8)
    shown, _, changed, _ = squares(perturbation_sheet([pair(image, DIRECTION)] * 2), 0)
    assert means(shown) == denormalise(image[None])[0].tolist()
    assert means(changed) == [[[0] * 3, [75] * 3], [[150] * 3, [200] * 3]]


def test_images_of_different_sizes_share_a_sheet():
    """The largest sets the cell, the others are fitted into it."""
    small, large = np.ones((1, 2, 2)), np.zeros((1, 4, 4))
    picture = perturbation_sheet([pair(small, test=large), pair(large, test=small)])
    assert means(squares(picture, 0)[0]) == [[[255] * 3] * 2] * 2
    assert means(squares(picture, 1)[3]) == [[[255] * 3] * 2] * 2


def test_nothing_and_wrong_shapes_are_refused():
    """No pair; a direction of another shape than its image."""
    for pairs in ([], [pair(IMAGE, np.zeros((1, 2, 3)))]):
        with pytest.raises(ValueError, match="at least one pair"):
            perturbation_sheet(pairs)
