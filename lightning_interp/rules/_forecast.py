"""What the loss of a run is going to be: the curve fit of `_curve`, over the work that the learning rate has done."""

from __future__ import annotations

import math

import numpy as np

from lightning_interp.rules._curve import Forecast, forecast
from lightning_interp.rules._evidence import recent_loss, steps_done
from lightning_interp.rules._schedule import work_done
from lightning_interp.rules.history import History

MIN_POINTS = 16  # losses below which a curve is a matter of luck


def forecast_of(history: History, horizon: float, min_points: int = MIN_POINTS) -> Forecast | None:
    """The loss at `horizon` times the work done so far, from the last half of that work; None with too few losses."""
    points = history.finite("loss")
    if not points:
        return None
    work = work_done(history, [point.step for point in points])
    late = work > work[-1] / 2
    if late.sum() < max(8, min_points):
        return None
    return forecast(work[late], np.array([point.value for point in points])[late], horizon=horizon)


def foreseen_loss(history: History) -> float | None:
    """The loss at the planned end, as the curve foresees it; the loss now at the end, or if no end is planned."""
    now, planned = recent_loss(history), history.fact("planned_steps", math.inf)
    if now is None or history.finished or math.isinf(planned) or planned <= steps_done(history):
        return now
    seen = forecast_of(history, planned / steps_done(history))
    return now if seen is None else min(now, seen.later)
