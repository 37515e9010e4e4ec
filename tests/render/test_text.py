"""Text in pictures: sizes, colours, what does not fit."""

import numpy as np
import pytest

from lightning_interp.render.color import BACKGROUND
from lightning_interp.render.text import CHARACTER, INK, LINE, fit, text_lines


def test_lines_are_drawn_below_one_another_in_their_colours():
    """A string in the standard ink, then two pieces in colours of their own, side by side."""
    red, green = (255, 0, 0), (0, 255, 0)
    bar = text_lines(["HH", [("HH", red), ("HH", green)]], 60)
    assert bar.shape == (2 * LINE, 60, 3)
    first, second = bar[:LINE].reshape(-1, 3), bar[LINE:]
    assert {tuple(pixel) for pixel in first.tolist()} == {BACKGROUND, INK}
    where = {color: np.flatnonzero((second == color).all(-1).any(0)) for color in (red, green)}
    assert where[red].max() < where[green].min()
    assert where[green].max() < 1 + 4 * CHARACTER


def test_text_that_does_not_fit_is_cut_with_a_tilde():
    """Spaces stay, line breaks become spaces, unknown characters question marks."""
    assert fit("golden retriever", 9) == "golden r~"
    assert fit(" a\nb ", 9) == " a b "
    assert fit("犬é", 9) == "?é"
    assert (fit("abc", 3), fit("abc", 1), fit("abc", 0)) == ("abc", "~", "")


def test_long_line_stays_inside_the_bar():
    """Also when the second piece finds no room."""
    bar = text_lines([[("x" * 30, INK), ("y" * 30, (255, 0, 0))]], 60)
    assert bar.shape == (LINE, 60, 3)
    assert not (bar == (255, 0, 0)).all(-1).any()


@pytest.mark.parametrize(("lines", "width"), [([], 60), (["a"], CHARACTER - 1)])
def test_impossible_bar_is_refused(lines, width):
    """Nothing to write, or nowhere."""
    with pytest.raises(ValueError, match="Expected at least one line"):
        text_lines(lines, width)
