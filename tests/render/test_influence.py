"""Sheets of test images with the training images they hang on: what stands where, at every size and count."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.color import BACKGROUND
from lightning_interp.render.influence import (
    HARMFUL,
    HELPFUL,
    SUSPICIOUS,
    Influenced,
    LeftOut,
    influence_sheet,
    influence_table,
)
from lightning_interp.render.sheets import MID_GREY
from lightning_interp.render.text import INK, LINE, text_lines

# Four test images with three and three places on a card: the column of the test image, the word, the places.
TEST, PLACE, HIGH, BLOCK, PANEL = 86, 71, 43, 148, 73
TOP, LEFT = 2 * LINE + 4, 86 + 2 + LINE
DIM = (150, 150, 156)


def plain(color, size=(8, 8)):
    return np.full((*size, 3), color, dtype=np.uint8)


def left_out(position, *, size=(8, 8), label="3", predicted=1e-3, actual=1.1e-3):
    """Each has a colour of its own, by its position."""
    return LeftOut(plain((position + 1, 77, 9), size), position, label, predicted, actual)


def some(count, helpful, harmful, *, size=(8, 8), label="3"):
    """Positions count through all training images; test images are (0, number, 200)."""
    each = helpful + harmful
    return [
        Influenced(
            plain((0, number, 200), size),
            number,
            label,
            label,
            0.5,
            [left_out(number * each + i, size=size) for i in range(helpful)],
            [left_out(number * each + helpful + i, size=size, predicted=-1e-3) for i in range(harmful)],
        )
        for number in range(count)
    ]


def where(picture, color):
    """(top, bottom, left, right) of a colour, which has to fill them."""
    rows, columns = np.nonzero((picture == color).all(axis=-1))
    box = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
    assert len(rows) == (box[1] - box[0]) * (box[3] - box[2])
    return box


def cell(picture, block, panel, place):
    top, left = TOP + block * (BLOCK + 4) + panel * (PANEL + 2) + 2, LEFT + place * (PLACE + 2)
    return picture[top : top + PANEL - 4, left : left + PLACE]


def test_four_by_three_on_a_card_has_every_image_in_its_place():
    """Helpful above, harmful below, in the order given, in blocks from top to bottom."""
    picture = influence_sheet(some(4, 3, 3), 3)
    assert picture.shape == (TOP - 4 + 4 * (BLOCK + 4), 320, 3)
    for number in range(24):
        block, panel, place = number // 6, number // 3 % 2, number % 3
        inside = where(cell(picture, block, panel, place), (number + 1, 77, 9))
        assert inside == (0, HIGH, (PLACE - HIGH) // 2, (PLACE - HIGH) // 2 + HIGH)
        where(picture, (number + 1, 77, 9))  # and nowhere else
    for number in range(4):
        top, bottom, left, right = where(picture, (0, number, 200))
        block = TOP + number * (BLOCK + 4)
        assert block + LINE <= top < bottom <= block + BLOCK - 4 * LINE
        assert 0 <= left < right <= TEST


def test_frames_and_words_tell_helpful_from_harmful():
    """Blue and orange around the places; the word at their left, turned by a quarter."""
    picture = influence_sheet(some(4, 3, 3), 3)
    for block in range(4):
        for panel, (word, color) in enumerate((("helpful", HELPFUL), ("harmful", HARMFUL))):
            top = TOP + block * (BLOCK + 4) + panel * (PANEL + 2)
            for row in (top, top + PANEL - 1):
                assert (picture[row, LEFT:] == color).all()
            for place in range(3):
                gap = picture[top : top + PANEL, LEFT + place * (PLACE + 2) + PLACE :][:, :2]
                assert (gap == color).all()
            turned = text_lines([word.center(12)], PANEL, background=color, ink=BACKGROUND)
            assert np.array_equal(np.rot90(picture[top : top + PANEL, TEST + 2 : LEFT], -1), turned)


def test_numbers_are_in_the_unit_of_their_block():
    """The largest change of a block has one digit before the point; the unit stands below the test image."""
    tests = [
        Influenced(
            plain(1), 5, "3", "8", 1.234, [left_out(1, predicted=1.234e-3, actual=2e-2)], [left_out(2, predicted=-5e-3)]
        ),
        Influenced(plain(1), 6, "3", "3", 1.0, [left_out(3, predicted=9.999e-6, actual=-9.991e-6)], []),
    ]
    tests += some(2, 1, 1)
    picture = influence_sheet(tests, 3)
    for block, panel, predicted, actual in (
        (0, 0, "+0.12", "+2.00"),
        (0, 1, "-0.50", "+0.11"),
        (1, 0, "+1.00", "-1.00"),
        (2, 0, "+1.00", "+1.10"),
    ):
        line = text_lines([[(predicted, DIM), ("/" + actual, INK)]], PLACE)
        assert np.array_equal(cell(picture, block, panel, 0)[-LINE:], line)
    for block, unit in enumerate(("1e-2", "1e-5", "1e-3", "1e-3")):
        bottom = TOP + block * (BLOCK + 4) + BLOCK
        assert np.array_equal(picture[bottom - LINE : bottom, :TEST], text_lines([[(f"unit {unit} nats", DIM)]], TEST))


@pytest.mark.parametrize(("label", "differs"), [("3", False), ("8", True), ("", True), ("golden retriever", True)])
def test_label_that_is_not_the_test_images_is_on_yellow(label, differs):
    """And only there; the legend has yellow in any case."""
    tests = some(4, 3, 3)
    tests[2].harmful[1] = left_out(99, label=label)
    picture = influence_sheet(tests, 3)
    marked = [
        number
        for number in range(24)
        if (cell(picture, number // 6, number // 3 % 2, number % 3) == SUSPICIOUS).all(-1).any()
    ]
    assert marked == ([16] if differs else [])
    assert (picture[LINE : 2 * LINE] == SUSPICIOUS).all(-1).any()


def test_label_and_index_share_a_line_where_both_fit():
    """A long name takes the whole line."""
    tests = some(4, 3, 0)
    tests[0].helpful[0] = left_out(1234, label="3")
    tests[0].helpful[1] = left_out(1234, label="3")
    picture = influence_sheet([*tests[:1], *some(3, 3, 0, label="a long name")], 3)
    line = cell(picture, 0, 0, 0)[HIGH : HIGH + LINE]
    assert np.array_equal(line, text_lines([[("3", INK), ("     #1234", DIM)]], PLACE))
    long = [Influenced(plain(1), 1, "a long name", "3", 0.1, [left_out(1234, label="a long name")])] * 4
    line = cell(influence_sheet(long, 3), 0, 0, 0)[HIGH : HIGH + LINE]
    assert np.array_equal(line, text_lines(["a long name"], PLACE))


@pytest.mark.parametrize("predicted", ["3", "8", "golden retriever"])
def test_words_below_the_test_image_say_right_and_wrong(predicted):
    """Green where the prediction is right, orange where it is wrong; long names cost the word."""
    tests = [Influenced(plain(1), 12, "3", predicted, 0.1234)] * 4
    picture = influence_sheet(tests, 3)
    words = picture[TOP + BLOCK - 4 * LINE : TOP + BLOCK - LINE, :TEST]
    color = (120, 230, 140) if predicted == "3" else (255, 176, 80)
    said = f"predicted {predicted}" if len(predicted) == 1 else "pred. golden ~"
    assert np.array_equal(words, text_lines(["label 3", [(said, color)], "loss 0.123"], TEST))
    assert np.array_equal(picture[TOP : TOP + LINE, :TEST], text_lines(["test #12"], TEST))


def test_missing_training_images_leave_dark_places():
    """The word none where there is not a single one; no unit where there is no number."""
    tests = some(3, 2, 0)
    tests.append(Influenced(plain(1), 9, "3", "3", 0.1))
    picture = influence_sheet(tests, 3)
    assert (cell(picture, 0, 0, 2) == BACKGROUND).all()
    for block, panel in ((0, 1), (3, 0), (3, 1)):
        empty = cell(picture, block, panel, 0)
        assert np.array_equal(empty[:LINE], text_lines(["none"], PLACE))
        assert (empty[LINE:] == BACKGROUND).all()
        assert (cell(picture, block, panel, 1) == BACKGROUND).all()
    assert (picture[TOP + 3 * (BLOCK + 4) + BLOCK - LINE :][:LINE, :TEST] == BACKGROUND).all()


@pytest.mark.parametrize(
    ("predicted", "actual", "shown"),
    [
        (math.nan, 1e-3, (" n/a ", "+1.00")),
        (1e-3, math.nan, ("+1.00", " n/a ")),
        (math.inf, -math.inf, (" n/a ", " n/a ")),
        (0.0, 0.0, ("+0.00", "+0.00")),
        (1e300, 1.5e300, ("+1.00", "+1.50")),
        (5e-324, 0.0, ("+0.00", "+0.00")),
        (9.996, 1.0, ("+1.00", "+0.10")),
        (9.994, 1.0, ("+9.99", "+1.00")),
    ],
)
def test_any_number_can_be_shown(predicted, actual, shown):
    """Not a number, infinite, zero, very large, very small, rounded up to the next power of ten."""
    tests = [Influenced(plain(1), 1, "3", "3", math.nan, [left_out(1, predicted=predicted, actual=actual)])] * 4
    line = cell(influence_sheet(tests, 3), 0, 0, 0)[-LINE:]
    assert np.array_equal(line, text_lines([[(shown[0], DIM), ("/" + shown[1], INK)]], PLACE))


@given(
    count=st.integers(1, 10), top_k=st.integers(1, 10), helpful=st.integers(0, 10), harmful=st.integers(0, 10),
    height=st.sampled_from([1, 8, 28, 97, 300]), width=st.sampled_from([1, 8, 32, 97, 300]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_every_shape_and_count_gives_a_bounded_sheet_without_overlaps(  # noqa: PLR0917 - drawn
    count, top_k, helpful, harmful, height, width
):
    """Each image that has a place is a full rectangle of its colour; of equal size among the training images."""
    tests = some(count, helpful, harmful, size=(height, width))
    picture = influence_sheet(tests, top_k)
    assert picture.dtype == np.uint8
    assert 320 <= picture.shape[1] <= 1400
    assert picture.shape[0] <= 2 * picture.shape[1]
    assert picture.shape[1] <= 2 * picture.shape[0]
    sizes, each = set(), helpful + harmful
    places = np.argwhere((picture[..., 1:] == (77, 9)).all(axis=-1))
    colors = picture[places[:, 0], places[:, 1], 0]
    for number, test in enumerate(tests):
        for rank, training in [*enumerate(test.helpful), *enumerate(test.harmful)]:
            found = places[colors == training.picture[0, 0, 0]]
            assert (len(found) > 0) == (number < 8 and rank < min(top_k, 8))
            if len(found):
                high, wide = found.max(axis=0) - found.min(axis=0) + 1
                assert high * wide == len(found)
                sizes.add((high, wide))
    assert len(sizes) == (1 if each else 0)
    where(picture, (0, min(count, 8) - 1, 200))
    assert not (picture == (0, 8, 200)).all(axis=-1).any()


@given(count=st.integers(1, 9), top_k=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_size_does_not_depend_on_how_many_were_found(count, top_k):
    """So that the pictures of different epochs have the same size; and the same input gives the same picture."""
    full, few = influence_sheet(some(count, top_k, top_k), top_k), influence_sheet(some(count, 1, 0), top_k)
    assert full.shape == few.shape
    assert np.array_equal(full, influence_sheet(some(count, top_k, top_k), top_k))


def test_pictures_of_different_sizes_share_a_sheet():
    """Each as large as fits, its shape kept."""
    tests = some(4, 3, 3)
    tests[0].helpful[0] = left_out(50, size=(200, 100))
    tests[0].helpful[1] = left_out(51, size=(10, 20))
    picture = influence_sheet(tests, 3)
    assert where(picture, (51, 77, 9))[1] - where(picture, (51, 77, 9))[0] == HIGH
    top, bottom, left, right = where(picture, (52, 77, 9))
    assert (bottom - top, right - left) == (PLACE // 2, PLACE)


def test_large_photographs_are_averaged_and_small_images_keep_their_pixels():
    """A fine checkerboard becomes grey; that of 8 x 8 pixels stays black and white."""
    fine = np.repeat((np.indices((430, 430)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    tests = some(4, 1, 1)
    tests[0].helpful[0] = LeftOut(fine, 1, "3", 1.0)
    tests[0].harmful[0] = LeftOut(fine[:8, :8], 2, "3", -1.0)
    picture = influence_sheet(tests, 3)
    inside = slice((PLACE - HIGH) // 2, (PLACE - HIGH) // 2 + HIGH)
    averaged, kept = cell(picture, 0, 0, 0)[:HIGH, inside], cell(picture, 0, 1, 0)[:HIGH, inside]
    assert set(np.unique(averaged)) <= {127, 128}
    assert set(np.unique(kept)) == {0, 255}
    centres = (np.arange(8) * HIGH + HIGH // 2) // 8
    assert np.array_equal(kept[np.ix_(centres, centres)], fine[:8, :8])


def test_blocks_are_apart_from_one_another():
    """Four mid-grey lines between them."""
    picture = influence_sheet(some(4, 3, 3), 3)
    for block in range(4):
        top = TOP + block * (BLOCK + 4)
        assert (picture[top - 4 : top] == MID_GREY).all()


def test_nothing_to_show_is_refused():
    """No test image, no place."""
    for tests, top_k in (([], 3), (some(1, 1, 1), 0)):
        with pytest.raises(ValueError, match="at least one test image"):
            influence_sheet(tests, top_k)


def test_table_has_the_order_of_the_sheet_and_harmless_labels():
    """The test image stands in its first row alone; labels that differ are bold."""
    tests = some(2, 1, 2)
    tests[0].harmful[1] = left_out(2, label="a|b\n*c*", predicted=-0.123456, actual=math.nan)
    tests.append(Influenced(plain(1), 7, "x|y", "z", 0.5))
    lines = influence_table(tests).splitlines()
    assert lines[2:] == [
        "| 0: label 3, predicted 3, loss 0.5 | 0 (helpful) | 3 | +0.001 | +0.0011 |",
        "|  | 1 (harmful) | 3 | -0.001 | +0.0011 |",
        r"|  | 2 (harmful) | **a\|b \*c\*** | -0.123 | n/a |",
        "| 1: label 3, predicted 3, loss 0.5 | 3 (helpful) | 3 | +0.001 | +0.0011 |",
        "|  | 4 (harmful) | 3 | -0.001 | +0.0011 |",
        "|  | 5 (harmful) | 3 | -0.001 | +0.0011 |",
        r"| 7: label x\|y, predicted z, loss 0.5 | none | | | |",
    ]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert len(influence_table([]).splitlines()) == 2
