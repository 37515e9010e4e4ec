"""A power law through the end of a loss curve, and how far it says the loss would still fall."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCKS = 64  # medians of so many blocks are fitted: outlying batches don't count, and the cost is bounded
EXPONENTS = np.geomspace(0.05, 4.0, 40)


class Forecast(NamedTuple):
    """What a power law says.

    Attributes:
        now: Loss at the last step.
        later: Loss at `horizon` times the steps, at most `now`.
        exponent: Of the likeliest power law.
        certainty: The fall within the data, in its standard errors; below 4 it may be noise.
    """

    now: float
    later: float
    exponent: float
    certainty: float


class _Fit(NamedTuple):
    scale: float
    floor: float
    error: float  # sum of squared residuals


def forecast(steps: NDArray[np.float64], losses: NDArray[np.float64], *, horizon: float = 3.0) -> Forecast:
    """Fits L(t) = c + a (t / T)^-b with a, c >= 0 by least squares and extrapolates.

    For each b of a grid, a and c follow in closed form. The forecast is the mean over b, each weighted with its
    likelihood, since noisy losses leave b open and the single best one would be a matter of luck.

    Args:
        steps: (N,), increasing, positive, N >= 8; T is the last one.
        losses: (N,), finite.
        horizon: How many times longer the training is thought.

    Returns:
        The forecast.

    Example:
        >>> t = np.arange(100.0, 201.0)
        >>> result = forecast(t, 0.5 + 20 / t)
        >>> round(result.now, 2), round(result.later, 2)
        (0.6, 0.54)
    """
    times, values = _blocks(steps, losses)
    times = times / steps[-1]
    fits = [_fit(times**-b, values) for b in EXPONENTS]
    errors = np.array([fit.error for fit in fits])
    best = int(np.argmin(errors))
    variance = errors[best] / max(1, len(values) - 3) + 1e-12 * float(np.mean(values**2)) + 1e-300
    weights = np.exp(-(errors - errors[best]) / (2 * variance))
    weights /= weights.sum()
    now = float(weights @ [fit.scale + fit.floor for fit in fits])
    later = float(weights @ [fit.scale * horizon**-b + fit.floor for fit, b in zip(fits, EXPONENTS, strict=True)])
    return Forecast(now, later, float(EXPONENTS[best]), _certainty(times, values))


def _blocks(steps: NDArray[np.float64], losses: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count = min(BLOCKS, len(steps))
    width, longer = divmod(len(steps), count)
    cut = longer * (width + 1)  # as `array_split` does: the first ones are longer by one

    def blocks(values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        parts = values[:cut].reshape(-1, width + 1), values[cut:].reshape(-1, width)
        return [part for part in parts if len(part)]

    times = np.concatenate([part.mean(axis=1) for part in blocks(steps)])
    return times, np.concatenate([np.median(part, axis=1) for part in blocks(losses)])


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> _Fit:
    """Least squares for y = floor + scale x, both at least 0."""
    centred = x - x.mean()
    scale = float(centred @ y) / float(centred @ centred)
    floor = float(y.mean()) - scale * float(x.mean())
    if scale < 0:
        scale, floor = 0.0, float(y.mean())
    elif floor < 0:
        scale, floor = float(x @ y) / float(x @ x), 0.0
    residuals = y - floor - scale * x
    return _Fit(scale, floor, float(residuals @ residuals))


def _certainty(times: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Fall of a straight line through the values, in standard errors; infinity if they lie on a falling line."""
    centred = times - times.mean()
    spread = float(centred @ centred)
    slope = float(centred @ values) / spread
    residuals = values - values.mean() - slope * centred
    squares = float(residuals @ residuals)
    doubt = math.sqrt(squares / max(1, len(values) - 2) / spread)
    # Neighbours that err together count for fewer: the usual correction for a first-order process.
    together = min(0.9, max(0.0, float(residuals[1:] @ residuals[:-1]) / squares)) if squares > 0 else 0.0
    doubt *= math.sqrt((1 + together) / (1 - together))
    if doubt > 0:
        return -slope / doubt
    return math.inf if slope < 0 else 0.0
