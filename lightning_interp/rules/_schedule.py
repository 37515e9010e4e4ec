"""The course of the learning rate: between the probed steps, through a warm-up, and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from lightning_interp.rules.history import History


def rates_at(history: History, steps: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Learning rate at each step over the largest one so far, in [0, 1]; 1 everywhere if none was recorded.

    It is known at the probed steps and interpolated between them: schedules are smooth, or change at a step.

    Example:
        >>> history = History()
        >>> for step, rate in ((0, 0.1), (10, 0.2)):
        ...     history.record("learning_rate", rate, step=step)
        >>> rates_at(history, [0, 5, 10, 99]).tolist()
        [0.5, 0.75, 1.0, 1.0]
    """
    known = history.finite("learning_rate")
    largest = max((point.value for point in known), default=0.0)
    if largest <= 0:
        return np.ones(len(steps))
    rates: NDArray[np.float64] = np.interp(
        np.asarray(steps, dtype=float), [point.step for point in known], [point.value / largest for point in known]
    )
    return rates


def work_done(history: History, steps: Sequence[int]) -> NDArray[np.float64]:
    """Sum of the rates up to and with each step, in steps at the largest rate: the time that the weights know of.

    A step at a tenth of the rate counts as a tenth, so the end of a decay, where the loss is flat because the steps
    are short, is not taken for a floor. At a constant rate it is the number of steps done.

    Args:
        history: The numbers of a run.
        steps: Increasing, from 0.

    Returns:
        (len(steps),).

    Example:
        >>> history = History()
        >>> for step, rate in ((0, 0.2), (10, 0.2), (20, 0.0)):
        ...     history.record("learning_rate", rate, step=step)
        >>> work_done(history, [0, 9, 20]).tolist()
        [1.0, 10.0, 16.0]
    """
    at = np.asarray(steps, dtype=float)
    knots = np.array(sorted({0.0, *(point.step for point in history.finite("learning_rate"))}))
    rates = rates_at(history, knots)
    # The area under straight lines between the knots; the step itself counts too, so there is a whole one at step 0.
    areas = np.concatenate([[0.0], np.cumsum(np.diff(knots) * (rates[1:] + rates[:-1]) / 2)])
    last = np.searchsorted(knots, at, side="right") - 1
    total: NDArray[np.float64] = areas[last] + (at - knots[last]) * (rates[last] + rates_at(history, at)) / 2
    return np.asarray(rates[0] + total, dtype=np.float64)


def still_rising(history: History) -> bool:
    """Whether the largest rate was reached in the last fifth of the steps so far, by a rise: a warm-up."""
    rates = history.finite("learning_rate")
    if not rates:
        return False
    peak = max(rates, key=lambda point: point.value)  # the first of equal ones
    return peak.value > rates[0].value * 1.001 and peak.step > 0.8 * history.step


def rests_since(history: History, part: float = 1e-3) -> int | None:
    """Step from which on the rate was below this part of its largest, to the end; None if it is not.

    Example:
        >>> history = History()
        >>> for step, rate in ((0, 0.1), (10, 1e-5), (20, 1e-7)):
        ...     history.record("learning_rate", rate, step=step)
        >>> rests_since(history)
        10
    """
    rates = history.finite("learning_rate")
    least = part * max((point.value for point in rates), default=0.0)
    resting = list(takewhile(lambda point: point.value < least, reversed(rates)))
    return resting[-1].step if resting else None
