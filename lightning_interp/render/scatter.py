"""Maps of points with classes in colour, legible on a card of about 320 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lightning_interp.render.color import BACKGROUND, Color, Pixels, Values
from lightning_interp.render.sheets import FRAME, WIDTH, near_square
from lightning_interp.render.text import CHARACTER, LINE, fit, text_lines

LIMIT = (
    1.75  # half the width of a panel, in root mean square distances from the centre: maps of digits stay within 1.72
)
MAX_CLASSES = 20
_GAP = 2
_FINE = 4  # points are drawn so many times larger, then averaged
_GREY: Color = (104, 104, 110)
_RING: Color = (255, 255, 255)
_LONGEST = 12  # characters of a class name

# Ten, then ten more. On the dark background, and at least 29 (all twenty: 15) apart in CIELAB for people with normal
# colour vision, and as Machado et al. 2009 simulate protanopia and deuteranopia.
_PALETTE: tuple[Color, ...] = (
    (41, 169, 255), (248, 134, 0), (18, 159, 113), (179, 175, 208), (255, 255, 111),
    (90, 76, 255), (181, 73, 10), (255, 255, 245), (176, 55, 170), (174, 224, 138),
    (165, 136, 63), (111, 215, 185), (244, 56, 104), (232, 228, 255), (194, 181, 85),
    (255, 140, 151), (36, 122, 65), (255, 67, 231), (154, 110, 149), (255, 255, 204),
)  # fmt: skip

Panel = tuple[str, Values]
"""A title and (N, 2) coordinates, of unit spread."""


def scatter(
    panels: Sequence[Panel],
    labels: Values,
    *,
    names: Sequence[str] | None = None,
    marked: Values | None = None,
    note: str = "",
) -> Pixels:
    """Maps side by side, each class in a colour of its own and with its name at its middle.

    The view is always the same, 1.75 units to each side of the origin, so that pictures of one map at several times can
    be compared; points beyond are drawn as triangles at the edge that point to where they are. Points that are not
    finite are left out. Of more than 20 classes the 20 most frequent have colours; the others, and points without a
    label, are grey and in the background. Points are drawn in one mixed order, so that no class covers the others.

    Args:
        panels: Each a title and (N, 2) coordinates, centred and of unit spread.
        labels: (N,), integers; negative ones are points without a label.
        names: Of the classes, by label; None, and labels beyond the end, show the number.
        marked: (N,) bool, points to put a ring around.
        note: A line below the maps.

    Returns:
        (height, 320, 3): one panel is 320 pixels wide, two or more stand in two columns, ten or more in four.

    Raises:
        ValueError: If there is no panel or a shape does not fit.

    Example:
        >>> scatter([("PCA", np.zeros((3, 2)))], np.array([0, 1, 1])).shape
        (333, 320, 3)
    """
    _check(panels, labels, marked)
    columns = math.ceil(math.sqrt(len(panels)))
    side = (WIDTH - _GAP * (columns - 1)) // columns
    rows = math.ceil(len(panels) / columns)
    below = [note] if note else []
    grey = len(np.unique(labels[labels >= 0])) - MAX_CLASSES
    if grey > 0:
        below.append(f"grey: {grey} rarer class{'es' if grey > 1 else ''}")
    cell = LINE + side
    canvas = np.empty((rows * (cell + _GAP) - _GAP + LINE * len(below), WIDTH, 3), dtype=np.uint8)
    canvas[:] = _GREY
    for index in range(rows * columns):
        top, left = index // columns * (cell + _GAP), index % columns * (side + _GAP)
        canvas[top : top + cell, left : left + side] = BACKGROUND
        if index >= len(panels):
            continue
        title, coordinates = panels[index]
        canvas[top : top + LINE, left : left + side] = text_lines([title], side)
        picture = _points(coordinates, labels, marked, side)
        _write_names(picture, coordinates, labels, names)
        canvas[top + LINE : top + cell, left : left + side] = picture
    if below:
        canvas[-LINE * len(below) :] = text_lines(below, WIDTH)
    return near_square(canvas)


def scatter_frame(coordinates: Values, labels: Values, *, side: int = FRAME) -> Pixels:
    """A small map without text, always of the same size: a frame of a film strip.

    Args:
        coordinates: (N, 2), centred and of unit spread.
        labels: (N,), integers.
        side: In pixels.

    Returns:
        (side, side, 3).

    Raises:
        ValueError: If a shape does not fit.
    """
    _check([("", coordinates)], labels, None)
    return _points(coordinates, labels, None, side)


def class_colors(labels: Values) -> dict[int, Color]:
    """A colour for each of the 20 most frequent classes, in the order of their labels; negative labels are no class.

    The first ten are kept apart for people who don't tell red from green too; of twenty some pairs are near, so the
    maps write the names of the classes on them.

    Example:
        >>> list(class_colors(np.array([3, 7, 7, -1])))
        [3, 7]
    """
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    frequent = np.sort(classes[np.argsort(-counts, kind="stable")[:MAX_CLASSES]])
    return {int(label): _PALETTE[index] for index, label in enumerate(frequent)}


def _check(panels: Sequence[Panel], labels: Values, marked: Values | None) -> None:
    shapes = [coordinates.shape for _, coordinates in panels]
    if labels.ndim != 1 or not shapes or any(shape != (len(labels), 2) for shape in shapes):
        raise ValueError(f"Expected panels of coordinates (N, 2) for labels (N,), but got {shapes} and {labels.shape}.")
    if marked is not None and marked.shape != labels.shape:
        raise ValueError(f"Expected `marked` to have the shape {labels.shape} of `labels`, but got {marked.shape}.")


def _points(coordinates: Values, labels: Values, marked: Values | None, side: int) -> Pixels:
    """(side, side, 3), the points alone."""
    size = side * _FINE
    image = Image.new("RGB", (size, size), BACKGROUND)
    draw = ImageDraw.Draw(image)
    finite = np.asarray(np.isfinite(coordinates).all(axis=1))
    colors = class_colors(labels)
    radius = _radius(int(finite.sum()), side) * _FINE
    centres = _centres(coordinates, size, radius)
    outside = np.zeros(len(labels), dtype=bool)
    outside[finite] = (np.abs(coordinates[finite]) > LIMIT).any(axis=1)
    rings = np.zeros(len(labels), dtype=bool) if marked is None else marked.astype(bool)
    known = np.isin(labels, list(colors))
    mixed: NDArray[np.int64] = np.random.default_rng(0).permutation(len(labels))
    # Grey ones first, ringed ones last, so that these lie on top.
    order = mixed[np.argsort(rings[mixed] * 2 + known[mixed], kind="stable")]
    for index in order[finite[order]]:
        x, y = centres[index]
        color = colors.get(int(labels[index]), _GREY)
        if rings[index]:
            for reach, ink in ((radius + 1.6 * _FINE, _RING), (radius + 0.6 * _FINE, BACKGROUND)):
                draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)
        if outside[index]:
            draw.polygon(_arrow(x, y, coordinates[index], 1.6 * radius), fill=color)
        else:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return np.array(image.reduce(_FINE))


def _radius(count: int, side: int) -> float:
    """In pixels: so that the points cover about a seventh of the panel, within what can be seen and told apart."""
    return float(np.clip(side * math.sqrt(0.14 / (math.pi * max(count, 1))), 0.8, side / 64 + 1))


def _centres(coordinates: Values, size: int, radius: float) -> NDArray[np.float64]:
    """(N, 2), in fine pixels, the second axis of the map upwards; what lies outside is brought to the edge."""
    margin = 2 * radius
    numbers = np.clip(np.nan_to_num(coordinates.astype(np.float64)), -LIMIT, LIMIT) * (1, -1)
    return margin + (numbers / LIMIT + 1) / 2 * (size - 2 * margin)


def _arrow(x: float, y: float, coordinates: Values, reach: float) -> list[tuple[float, float]]:
    """A triangle that points to where the point is."""
    angle = math.atan2(-float(coordinates[1]), float(coordinates[0]))
    return [
        (x + reach * math.cos(angle + turn), y + reach * math.sin(angle + turn))
        for turn in (0.0, 0.8 * math.pi, -0.8 * math.pi)
    ]


def _write_names(picture: Pixels, coordinates: Values, labels: Values, names: Sequence[str] | None) -> None:
    """Writes the name of each coloured class at its middle, where it covers no other name."""
    side = picture.shape[0]
    finite = np.isfinite(coordinates).all(axis=1)
    taken: list[tuple[int, int, int, int]] = []
    for label, color in class_colors(labels).items():
        own = coordinates[finite & (labels == label)].astype(np.float64)
        if not len(own):
            continue
        name = names[label] if names is not None and label < len(names) else str(label)
        bar = text_lines([fit(name, min(_LONGEST, side // 2 // CHARACTER))], min(side, CHARACTER * _LONGEST + 2))
        ink = bar.max(axis=-1) > 128
        ink = np.pad(ink[:, : max(1, int(ink.any(axis=0).nonzero()[0].max(initial=0)) + 1)], 2)
        middle = np.median(own, axis=0)
        # Of the points of the class, the one nearest to the middle: the middle of a ring lies in another class.
        x, y = _centres(own[np.square(own - middle).sum(axis=1).argmin()][None], side, 2.0)[0]
        box = _free_place(int(x) - ink.shape[1] // 2, int(y) - ink.shape[0] // 2, ink.shape, side, taken)
        taken.append(box)
        _stamp(picture[box[1] : box[3], box[0] : box[2]], ink, color)


def _free_place(
    left: int, top: int, shape: tuple[int, ...], side: int, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int]:
    """The nearest box (left, top, right, bottom) that covers none of those taken; the first one if all do."""
    height, width = shape
    shifts = [(dx, dy) for dx in range(-48, 49, 4) for dy in range(-48, 49, 4)]
    first: tuple[int, int, int, int] | None = None
    for dx, dy in sorted(shifts, key=lambda shift: (shift[0] ** 2 + shift[1] ** 2, shift)):
        x = min(max(left + dx, 0), max(side - width, 0))
        y = min(max(top + dy, 0), max(side - height, 0))
        box = (x, y, x + width, y + height)
        first = first or box
        if not any(box[0] < r - 2 and box[2] - 2 > x0 and box[1] < b - 3 and box[3] - 3 > t for x0, t, r, b in taken):
            return box
    return first or (left, top, left + width, top + height)


def _stamp(patch: Pixels, ink: NDArray[np.bool_], color: Color) -> None:
    """Text in a light tint of the colour, with a dark edge of two pixels."""
    edge = np.zeros_like(ink)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            if abs(dy) + abs(dx) < 4:
                edge |= np.roll(ink, (dy, dx), axis=(0, 1))
    height, width = patch.shape[:2]
    ink, edge = ink[:height, :width], edge[:height, :width]
    patch[edge] = (8, 8, 10)
    patch[ink] = tuple((3 * 255 + 2 * part) // 5 for part in color)
