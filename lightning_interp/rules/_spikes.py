"""The single loss that towers above all that was seen before: a bad batch, most likely."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import NamedTuple

from lightning_interp.rules._evidence import early_end, guess_loss
from lightning_interp.rules.history import History, Point

_BEFORE = 20  # losses whose median is "the loss before"


class Spike(NamedTuple):
    """One loss above all before it.

    Attributes:
        step: Where.
        loss: How high.
        times: Over the largest loss before it, or over ln C if that is larger.
        before: Median of the losses before it.
        rising: Whether the loss was on its way up already: a batch does that at once, a too-high rate step by step.
    """

    step: int
    loss: float
    times: float
    before: float
    rising: bool


def find_spike(history: History, factor: float, min_steps: int = 50) -> Spike | None:
    """The first loss above `factor` times all before it, and above `factor` ln C if the loss is a cross-entropy.

    Args:
        history: The numbers of the run.
        factor: Above 1.
        min_steps: Steps before which none is looked for; those after a warm-up are left out too (`early_end`).

    Returns:
        None if there is none, if the losses before it are not all known (a run that was continued), or if any loss
        is not positive: then multiples mean nothing.
    """
    peaks, losses = history.finite("loss_peak"), history.finite("loss")
    if not losses or losses[0].step != 0 or any(point.value <= 0 for point in (*peaks, *losses)):
        return None
    begin = max(min_steps, early_end(history, 20))
    for earlier, peak in pairwise(peaks):
        ceiling = max(earlier.value, guess_loss(history) or 0.0)
        if peak.step >= begin and peak.value > factor * ceiling:
            return _described(history, losses, peak, ceiling)
    return None


def _described(history: History, losses: list[Point], peak: Point, ceiling: float) -> Spike:
    before = [point.value for point in losses if point.step < peak.step]
    usual = statistics.median(before[-_BEFORE:])
    # Half of the way in orders of magnitude; the batch at the peak had not been learned from yet.
    rising = before[-1] > max(math.sqrt(usual * peak.value), max(before[-_BEFORE:-1], default=0.0))
    ratio = dict(history.finite("step_ratio")).get(peak.step - 1, 1.0)
    return Spike(peak.step, peak.value, peak.value / ceiling, usual, rising or ratio < 0)
