"""Numbers to colours: two colour maps as data, and images back from their normalisation.

Everything here takes and gives numpy arrays. Colours are sRGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Values = NDArray[Any]
Color = tuple[int, int, int]

NON_FINITE: Color = (255, 0, 255)  # magenta: in neither map, and no RGB filter that is not at its limit has it
SIGNAL: Color = (0, 230, 64)  # green: in neither map, and bright on the dark background
BACKGROUND: Color = (24, 24, 28)
RIGHT: Color = (120, 230, 140)  # a prediction that is the label
WRONG: Color = (255, 176, 80)

# Anchors at equal distances. Diverging: blue, light grey, red; the ends differ in hue for all common kinds of colour
# blindness and both darken away from zero. Sequential: black to pale yellow, lightness rising throughout.
_DIVERGING = (
    (8, 38, 112),
    (42, 106, 190),
    (140, 182, 224),
    (238, 238, 238),
    (240, 166, 134),
    (200, 62, 54),
    (104, 4, 28),
)
_SEQUENTIAL = ((0, 0, 0), (52, 20, 92), (122, 34, 110), (194, 60, 84), (240, 118, 44), (250, 190, 60), (255, 252, 210))


def diverging(values: Values, scale: float) -> Pixels:
    """Colours for signed values: blue below zero, light grey at zero, red above.

    Args:
        values: (...), any numeric type.
        scale: Positive value that gets the darkest colour; what lies beyond is clipped.

    Returns:
        (..., 3); NaN and infinities are magenta.

    Raises:
        ValueError: If `scale` is not positive and finite.

    Example:
        >>> diverging(np.array([0.0]), 1.0).tolist()
        [[238, 238, 238]]
    """
    return _mapped(_unit(values, -scale, scale), values, _DIVERGING)


def sequential(values: Values, low: float, high: float) -> Pixels:
    """Colours for values that start somewhere: black at `low`, pale yellow at `high`.

    Args:
        values: (...), any numeric type.
        low: Value that gets black.
        high: Greater than `low`; what lies outside is clipped.

    Returns:
        (..., 3); NaN and infinities are magenta.

    Raises:
        ValueError: If `low < high` does not hold for finite bounds.
    """
    return _mapped(_unit(values, low, high), values, _SEQUENTIAL)


def signed_rgb(values: Values, scale: float) -> Pixels:
    """Colours for three signed channels: zero is mid-grey (128), `scale` is full, `-scale` none of that channel.

    Args:
        values: (..., 3).
        scale: Positive.

    Returns:
        (..., 3); pixels with a NaN or an infinity in any channel are magenta.
    """
    return to_uint8(_unit(values, -scale, scale), finite=np.isfinite(values))


def to_uint8(values: Values, *, finite: NDArray[np.bool_] | None = None) -> Pixels:
    """RGB in [0, 1] to 8 bits, rounded; what lies outside is clipped.

    Args:
        values: (..., 3).
        finite: (..., 3), where the values are to be believed; None takes those that are finite.

    Returns:
        (..., 3); pixels that are not finite in any channel are magenta.

    Example:
        >>> to_uint8(np.array([0.0, 0.5, 2.0])).tolist()
        [0, 128, 255]
    """
    if values.ndim == 0 or values.shape[-1] != 3:
        raise ValueError(f"Expected `values` to be (..., 3), but got shape {values.shape}.")
    finite = np.isfinite(values) if finite is None else finite
    numbers = np.clip(np.where(finite, values, 0.0).astype(np.float64), 0.0, 1.0)
    pixels = np.floor(numbers * 255.0 + 0.5).astype(np.uint8)
    pixels[~finite.all(axis=-1)] = NON_FINITE
    return pixels


def symmetric_scale(values: Values, quantile: float = 0.995) -> float:
    """A scale for `diverging` and `signed_rgb` that a few outliers don't set.

    Args:
        values: (...).
        quantile: Share of the finite values within the scale.

    Returns:
        That quantile of the magnitudes; their maximum where it is zero, 1 where that is zero too or nothing is finite.

    Example:
        >>> symmetric_scale(np.array([0.0, 0.0]))
        1.0
    """
    magnitudes = np.abs(values[np.isfinite(values)].astype(np.float64))
    if magnitudes.size == 0:
        return 1.0
    for scale in (float(np.quantile(magnitudes, quantile, method="higher")), float(magnitudes.max())):
        if scale > np.finfo(np.float64).tiny:
            return scale
    return 1.0


def denormalise(images: Values, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Pixels:
    """Images of any number of channels as a person would see them.

    Three channels are red, green and blue; of four the fourth (alpha, infrared) is left out; any other number is
    averaged to grey, each channel after its own mean and std. Without `mean` and `std`, float images within [0, 1] are
    shown as they are, others are stretched so that the batch's smallest value is black and its largest white; integer
    images are taken as 0 to 255.

    Args:
        images: (N, C, H, W).
        mean: What was subtracted: one number, or one for each channel; None is 0.
        std: What was divided by, likewise; None is 1. Both may be in units of 0 to 1 or of 0 to 255.

    Returns:
        (N, H, W, 3).

    Raises:
        ValueError: If the shape is not (N, C, H, W) or `mean` or `std` have another length than 1 or C.

    Example:
        >>> denormalise(np.zeros((1, 1, 1, 1)), mean=[0.5], std=[0.25]).tolist()
        [[[[128, 128, 128]]]]
    """
    if images.ndim != 4 or images.shape[1] == 0:
        raise ValueError(f"Expected `images` to be (N, C, H, W), but got shape {images.shape}.")
    numbers = images.astype(np.float64)
    if mean is not None or std is not None:
        offset, factor = _per_channel("mean", mean, 0.0, images), _per_channel("std", std, 1.0, images)
        numbers = numbers * factor + offset
        if max(float(np.abs(offset).max()), float(factor.max())) > 1.0:
            numbers /= 255.0
    elif np.issubdtype(images.dtype, np.integer):
        numbers /= 255.0
    else:
        numbers = _stretched(numbers)
    channels = numbers[:, :3] if images.shape[1] in (3, 4) else numbers.mean(axis=1, keepdims=True)
    return to_uint8(np.broadcast_to(np.moveaxis(channels, 1, -1), (*channels.shape[::2], numbers.shape[3], 3)))


def _per_channel(argument: str, numbers: Sequence[float] | None, default: float, images: Values) -> NDArray[np.float64]:
    """(C or 1, 1, 1)."""
    given = np.asarray([default] if numbers is None else list(numbers), dtype=np.float64)
    if given.size not in (1, images.shape[1]):
        channels = images.shape[1]
        right = "1 number" if channels == 1 else f"1 or {channels} numbers"
        raise ValueError(f"Expected `{argument}` to hold {right}, one for each channel, but got {given.size}.")
    return given.reshape(-1, 1, 1)


def _stretched(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    finite = numbers[np.isfinite(numbers)]
    if finite.size == 0 or (finite.min() >= 0.0 and finite.max() <= 1.0):
        return numbers
    return _unit(numbers, *bounds(finite.min(), finite.max()), clip=False)


def bounds(low: float, high: float) -> tuple[float, float]:
    """The same bounds, moved apart if they are equal, so that one can divide by their distance.

    Example:
        >>> bounds(3.0, 3.0)
        (3.0, 6.0)
    """
    low, high = float(low), float(high)
    return (low, high) if high - low > np.finfo(np.float64).tiny else (low, low + max(1.0, abs(low)))


def _unit(values: Values, low: float, high: float, *, clip: bool = True) -> NDArray[np.float64]:
    """[low, high] to [0, 1]; non-finite values become 0.5 where they are clipped, and stay otherwise."""
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"Expected finite bounds with low < high, but got {low} and {high}.")
    # Halved first: the distance of two huge bounds would overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        unit: NDArray[np.float64] = (values.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2)
    return np.clip(np.where(np.isfinite(values), unit, 0.5), 0.0, 1.0) if clip else unit


def _mapped(unit: NDArray[np.float64], values: Values, anchors: Sequence[Color]) -> Pixels:
    """Interpolates between the anchors."""
    positions = np.linspace(0.0, 1.0, len(anchors))
    channels = [np.interp(unit, positions, [anchor[i] for anchor in anchors]) for i in range(3)]
    return to_uint8(np.stack(channels, axis=-1) / 255.0, finite=np.isfinite(values)[..., None].repeat(3, axis=-1))
