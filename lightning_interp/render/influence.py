"""Which training images a prediction hangs on: a picture and a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from lightning_interp.render.color import BACKGROUND, RIGHT, WRONG, Color, Pixels
from lightning_interp.render.markdown import escape
from lightning_interp.render.sheets import MAX_SHOWN, MID_GREY, WIDTH, near_square
from lightning_interp.render.text import CHARACTER, INK, LINE, Segment, fit, text_lines

# Sky blue and orange of Okabe and Ito's palette: told apart with every common kind of colour blindness.
HELPFUL: Color = (86, 180, 233)
HARMFUL: Color = (230, 159, 0)
SUSPICIOUS: Color = (250, 250, 130)  # behind a label that is not the test image's
_DIM: Color = (150, 150, 156)

_DOWN = 4  # blocks below one another; more stand side by side
_TEST = 14 * CHARACTER + 2  # narrowest column for a test image and its words
_PLACE = 11 * CHARACTER + 2  # narrowest place for a training image: two numbers
_FRAME, _GAP = 2, 4
_LEAST = -300  # a power of ten that one can still divide by
_LOWEST = 24  # of a picture; less would not leave room for the word beside it


@dataclass(frozen=True)
class LeftOut:
    """A training image, and what leaving it out does to the loss of a test image.

    Attributes:
        picture: (H, W, 3).
        index: In the training set.
        label: Name of the class that it was given.
        predicted: Change of the loss in nats that influence functions predict; may be NaN.
        actual: Change of the loss in nats after it was left out and the head refitted; NaN where not computed.
    """

    picture: Pixels
    index: int
    label: str
    predicted: float
    actual: float = math.nan


@dataclass(frozen=True)
class Influenced:
    """A test image, and the training images that its loss hangs on.

    Attributes:
        picture: (H, W, 3).
        index: In the set that it is from.
        label: Name of its class.
        predicted: Name of the class with the highest score.
        loss: In nats.
        helpful: Without these the loss would rise, the strongest first.
        harmful: Without these the loss would fall, the strongest first.
    """

    picture: Pixels
    index: int
    label: str
    predicted: str
    loss: float
    helpful: Sequence[LeftOut] = field(default_factory=list)
    harmful: Sequence[LeftOut] = field(default_factory=list)

    @property
    def left_out(self) -> list[tuple[str, LeftOut]]:
        """All training images, each with the word for its effect."""
        return [("helpful", each) for each in self.helpful] + [("harmful", each) for each in self.harmful]


def influence_sheet(tests: Sequence[Influenced], top_k: int) -> Pixels:
    """A block for each test image: itself at the left, its helpful and harmful training images at the right.

    Below each training image stand its label, on yellow where it is not the test image's, its index, and the predicted
    and the actual change of the loss, in the power of ten of nats that is given below the test image. Four blocks of
    three are readable on a card of 320 pixels; more are wider.

    Args:
        tests: At least one; the first eight are shown.
        top_k: Places for helpful, and for harmful images; at most eight are shown.

    Returns:
        (height, width, 3), at least 320 wide; no side more than twice the other.

    Raises:
        ValueError: If there is no test image or `top_k` is not positive.

    Example:
        >>> blank = np.zeros((8, 8, 3), np.uint8)
        >>> influence_sheet([Influenced(blank, 5, "3", "3", 0.1, [LeftOut(blank, 7, "3", 2e-3)])], 3).shape
        (234, 320, 3)
    """
    if not tests or top_k < 1:
        raise ValueError(f"Expected at least one test image and place, but got {len(tests)} and {top_k}.")
    shown, places = tests[:MAX_SHOWN], min(top_k, MAX_SHOWN)
    layout = _layout(shown, places)
    columns, rows = _grid(len(shown))
    width = columns * (layout.width + _GAP) - _GAP
    head = _head(width)
    canvas = _blank(len(head) + rows * (layout.height + _GAP), width)
    canvas[: len(head)] = head
    for index, each in enumerate(shown):
        top, left = len(head) + _GAP + index % rows * (layout.height + _GAP), index // rows * (layout.width + _GAP)
        canvas[top : top + layout.height, left : left + layout.width] = _block(each, layout)
    return near_square(canvas)


def _head(width: int) -> Pixels:
    changes: list[Segment] = [("predicted", _DIM), ("/actual  ", INK), ("+ helpful  ", HELPFUL), ("- harmful", HARMFUL)]
    canvas = text_lines(["If an image is left out, the test loss changes by", changes], width)
    legend = text_lines(["label differs"], 13 * CHARACTER + 1, background=SUSPICIOUS, ink=BACKGROUND)
    left = 40 * CHARACTER
    canvas[LINE:, left : left + legend.shape[1]] = legend
    return canvas


@dataclass(frozen=True)
class _Layout:
    """Sizes of a block in pixels.

    Attributes:
        places: Training images in a row.
        test: Width of the test image's column.
        place: Width of a place for a training image.
        high: Height of a training image.
    """

    places: int
    test: int
    place: int
    high: int

    @property
    def width(self) -> int:
        return self.test + _FRAME + self.panel_width

    @property
    def panel_width(self) -> int:
        return LINE + self.places * (self.place + _FRAME)

    @property
    def panel_height(self) -> int:
        return self.high + 2 * LINE + 2 * _FRAME

    @property
    def height(self) -> int:
        return 2 * self.panel_height + _FRAME


def _grid(count: int) -> tuple[int, int]:
    """Columns and rows of blocks."""
    columns = math.ceil(count / _DOWN)
    return columns, math.ceil(count / columns)


def _layout(tests: Sequence[Influenced], places: int) -> _Layout:
    """As large as fits a card, if need be twice as high as wide."""
    test = max(_TEST, WIDTH // (places + 1))
    place = max(_PLACE, (WIDTH - test - _FRAME - LINE) // places - _FRAME)
    test = max(test, WIDTH - _Layout(places, 0, place, 0).width)  # what rounding leaves
    wide = _Layout(places, test, place, 0)
    columns, rows = _grid(len(tests))
    room = (2 * (columns * (wide.width + _GAP) - _GAP) - 2 * LINE) // rows - _GAP - wide.height
    pictures = [each.picture for each in tests] + [each.picture for test in tests for _, each in test.left_out]
    aspect = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    return _Layout(places, test, place, max(_LOWEST, min(room // 2, round(place * min(aspect, 1.5)))))


def _block(shown: Influenced, layout: _Layout) -> Pixels:
    exponent = _exponent([change for _, each in shown.left_out for change in (each.predicted, each.actual)])
    canvas = _blank(layout.height, layout.width)
    canvas[:, : layout.test] = _test(shown, layout, exponent)
    panels = (("helpful", shown.helpful, HELPFUL), ("harmful", shown.harmful, HARMFUL))
    for index, (word, images, color) in enumerate(panels):
        top, left = index * (layout.panel_height + _FRAME), layout.test + _FRAME
        panel = canvas[top : top + layout.panel_height, left:]
        panel[:] = color
        centred = word.center(layout.panel_height // CHARACTER)
        bar = text_lines([centred], layout.panel_height, background=color, ink=BACKGROUND)
        panel[:, :LINE] = np.rot90(bar)
        for place in range(layout.places):
            start = LINE + place * (layout.place + _FRAME)
            cell = panel[_FRAME:-_FRAME, start : start + layout.place]
            cell[:] = BACKGROUND
            if place < len(images):
                cell[:] = _training(images[place], layout, exponent, suspicious=images[place].label != shown.label)
            elif place == 0:
                cell[:LINE] = text_lines(["none"], layout.place)
    return canvas


def _test(shown: Influenced, layout: _Layout, exponent: int | None) -> Pixels:
    """Its number above, what the model makes of it below, the unit of the changes at the bottom."""
    right = shown.label == shown.predicted
    room = layout.test // CHARACTER
    predicted = f"predicted {shown.predicted}" if len(shown.predicted) + 10 <= room else f"pred. {shown.predicted}"
    words = text_lines(
        [f"label {shown.label}", [(predicted, RIGHT if right else WRONG)], f"loss {shown.loss:.3g}"], layout.test
    )
    canvas = _blank(layout.height, layout.test, BACKGROUND)
    height, width = shown.picture.shape[:2]
    high = min(layout.height - 2 * LINE - len(words), max(1, round(layout.test * height / width)))
    canvas[:LINE] = text_lines([f"test #{shown.index}"], layout.test)
    canvas[LINE : LINE + high] = _centred(shown.picture, high, layout.test)
    canvas[LINE + high : LINE + high + len(words)] = words
    if exponent is not None:
        unit = f"unit 1e{exponent} nats"
        canvas[-LINE:] = text_lines([[(unit if len(unit) <= room else unit[:-5], _DIM)]], layout.test)
    return canvas


def _training(shown: LeftOut, layout: _Layout, exponent: int | None, *, suspicious: bool) -> Pixels:
    room = layout.place // CHARACTER
    number = f"#{shown.index}"
    label = fit(shown.label, room)
    rest = number.rjust(room - len(label)) if len(label) + len(number) < room else ""
    numbers = [_signed(shown.predicted, exponent), _signed(shown.actual, exponent)]
    slash = " / " if len("".join(numbers)) + 3 <= room else "/"
    words = text_lines([[(label, INK), (rest, _DIM)], [(numbers[0], _DIM), (slash + numbers[1], INK)]], layout.place)
    if suspicious:
        width = min(layout.place, max(1, len(label)) * CHARACTER + 2)
        words[:LINE, :width] = text_lines([label], width, background=SUSPICIOUS, ink=BACKGROUND)
    return np.concatenate((_centred(shown.picture, layout.high, layout.place), words))


def _centred(picture: Pixels, height: int, width: int) -> Pixels:
    """As large as fits in a dark cell; `filled` has a mid-grey one, louder than a dark picture on this dark ground."""
    factor = min(height / picture.shape[0], width / picture.shape[1])
    high, wide = (max(1, int(side * factor + 1e-6)) for side in picture.shape[:2])
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    canvas = _blank(height, width, BACKGROUND)
    top, left = (height - high) // 2, (width - wide) // 2
    canvas[top : top + high, left : left + wide] = np.asarray(Image.fromarray(picture).resize((wide, high), method))
    return canvas


def _exponent(changes: Iterable[float]) -> int | None:
    """The power of ten in which the largest has one digit before the point; None where nothing is finite.

    Example:
        >>> _exponent([2e-4, -9.999e-3, math.nan])
        -2
    """
    finite = [abs(change) for change in changes if math.isfinite(change)]
    return max(_LEAST, int(f"{max(finite):.2e}".split("e")[1])) if finite else None


def _signed(change: float, exponent: int | None) -> str:
    return f"{change / 10.0**exponent:+.2f}" if exponent is not None and math.isfinite(change) else " n/a "


def influence_table(tests: Sequence[Influenced]) -> str:
    r"""What `influence_sheet` shows as a Markdown table, in the same order, one row a training image.

    Labels that are not the test image's are bold.

    Example:
        >>> blank = np.zeros((8, 8, 3), np.uint8)
        >>> print(influence_table([Influenced(blank, 5, "3", "8", 1.5, [], [LeftOut(blank, 7, "a|b", -2e-3)])]))
        | test image | left out | its label | predicted change (nats) | actual change (nats) |
        |---|---|---|---|---|
        | 5: label 3, predicted 8, loss 1.5 | 7 (harmful) | **a\|b** | -0.002 | n/a |
    """
    rows = [
        "| test image | left out | its label | predicted change (nats) | actual change (nats) |",
        "|---|---|---|---|---|",
    ]
    for test in tests:
        name = f"{test.index}: label {escape(test.label)}, predicted {escape(test.predicted)}, loss {test.loss:.3g}"
        for word, each in test.left_out:
            label = escape(each.label) if each.label == test.label else f"**{escape(each.label)}**"
            changes = [f"{change:+.3g}" if math.isfinite(change) else "n/a" for change in (each.predicted, each.actual)]
            rows.append(f"| {name} | {each.index} ({word}) | {label} | {changes[0]} | {changes[1]} |")
            name = ""
        if not test.left_out:
            rows.append(f"| {name} | none | | | |")
    return "\n".join(rows)


def _blank(height: int, width: int, color: Color = MID_GREY) -> Pixels:
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = color
    return canvas
