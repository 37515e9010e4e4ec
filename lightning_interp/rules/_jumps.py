"""The marks of a too-high rate: a loss that leapt up, of one batch or logged, and updates that overshot."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_interp.rules._evidence import early_end, first_loss, reference_loss
from lightning_interp.rules.history import History

OVERSHOOT_SHARE, OVERSHOOT_PROBES = 0.2, 10


class Jump(NamedTuple):
    """A loss that leapt up while the training began.

    Attributes:
        factor: How many times larger the loss became; infinity if it was no number any more.
        step: Where.
        same_batch: True if one batch was measured before and after its own update; False if the logged loss was
            compared with the first one, which is all there is when the loss was not recognised.
        rate_factor: Part of the learning rate that a quadratic model of the loss would take, 1 / (2 (1 - step ratio)),
            within [0.01, 0.5]; 0.1 where there is no step ratio of the update that did it.
        overshoots: None after a real jump; else the share of the probed updates that raised the loss of their own
            batch, 0 where none did or none was probed.
    """

    factor: float
    step: int
    same_batch: bool
    rate_factor: float
    overshoots: float | None = None


def batch_jump(history: History, begin: int, end: int, threshold: float = 1.5) -> Jump | None:
    """The largest growth of the loss of one batch through its own update, at the steps in [begin, end).

    None if it is `threshold` times or less. A loss that stays below a tenth of `reference_loss` is left out: it may
    well double, and that is noise. The advice for the rate is taken from the first such step, before all is lost.
    """
    floor = 0.1 * (reference_loss(history) or 0.0)
    before = dict(history.finite("loss_before"))
    after = history.get("loss_after")
    jumps = [
        (_ratio(value, before[step]), step)
        for step, value in after
        if begin <= step < end and before.get(step, 0.0) > 0 and not value < floor
    ]
    above = [(factor, step) for factor, step in jumps if factor > threshold]
    if not above:
        return None
    ratios = [ratio for at, ratio in history.finite("step_ratio") if at == above[0][1]]
    return Jump(*max(above, key=lambda pair: pair[0]), True, _rate_factor(ratios))


def early_jump(history: History, *, same_batch: float = 1.5, logged: float = 3.0, steps: int = 20) -> Jump | None:
    """The largest early jump of the loss.

    Args:
        history: The numbers of the run.
        same_batch: loss_after / loss_before of one batch from which it counts.
        logged: Loss over first loss from which it counts.
        steps: Length of the early phase at a constant rate, see `early_end`.

    Returns:
        The jump of one batch if there is one, else that of the logged loss, else repeated overshoots, else None.
    """
    key = ("early_jump", same_batch, logged, steps)
    return history.once(key, lambda: _early_jump(history, same_batch, logged, steps))


def _early_jump(history: History, same_batch: float, logged: float, steps: int) -> Jump | None:
    end = early_end(history, steps)
    jump = batch_jump(history, 0, end, same_batch)
    if jump is not None:
        return jump
    probed = any(point.step < end for point in history.get("loss_after"))
    factor, step = _logged_jump(history, end, with_nan=not probed)
    # What is seen at a step was done by the update before.
    ratios = [ratio for at, ratio in history.finite("step_ratio") if at == step - 1]
    return Jump(factor, step, False, _rate_factor(ratios)) if factor > logged else _overshoots(history, end)


def _overshoots(history: History, end: int) -> Jump | None:
    """Early updates that raised the loss of their own batch again and again, if none of them by much.

    At some rates the first steps kill the units before the loss can leap. Measured: a share of 0.2 or more in the first
    20 steps was found in 14 of 26 too-high runs and in 1 of 42 healthy ones, so it counts only together with damage.
    """
    early = [(step, ratio) for step, ratio in history.finite("step_ratio") if step < end]
    risen = [(step, ratio) for step, ratio in early if ratio < 0]
    if len(early) < OVERSHOOT_PROBES or len(risen) < OVERSHOOT_SHARE * len(early):
        return None
    before, after = history.finite("loss_before"), dict(history.finite("loss_after"))
    factors = [_ratio(after[step], value) for step, value in before if step in after and step < end]
    return Jump(max(factors, default=1.0), risen[0][0], True, _rate_factor([risen[0][1]]), len(risen) / len(early))


def any_overshoot(history: History, before: float = math.inf) -> Jump | None:
    """The worst update that raised the loss of its own batch, up to a step; None if none did, or few were probed."""
    ratios = [point for point in history.finite("step_ratio") if point.step < before]
    worst = min(ratios, key=lambda point: point.value, default=None)
    if worst is None or worst.value >= 0 or len(ratios) < OVERSHOOT_PROBES:
        return None
    share = sum(point.value < 0 for point in ratios) / len(ratios)
    return Jump(1.0, worst.step, True, _rate_factor([worst.value]), share)


def _logged_jump(history: History, end: int, *, with_nan: bool) -> tuple[float, int]:
    first, losses = first_loss(history), history.get("loss")
    if first is None or not math.isfinite(first) or first <= 0:
        return 0.0, 0
    pairs = [(_ratio(v, first), s) for s, v in losses if 0 < s < end]
    return max((pair for pair in pairs if with_nan or math.isfinite(pair[0])), default=(0.0, 0))


def _ratio(value: float, base: float) -> float:
    return value / base if math.isfinite(value) else math.inf


def _rate_factor(ratios: list[float]) -> float:
    worst = min(ratios, default=0.0)
    return 0.1 if worst >= 0 else max(0.01, 1 / (2 * (1 - worst)))


def describe(jump: Jump) -> str:
    """The beginning of a sentence."""
    if not math.isfinite(jump.factor):
        return f"The loss was NaN or infinite right after step {jump.step}"
    if jump.overshoots is not None:
        return f"{jump.overshoots:.0%} of the updates raised the loss of their own batch"
    grew = f"grew {jump.factor:.3g} times"
    if jump.same_batch:
        return f"At step {jump.step} the loss of one batch {grew} through its own update"
    return f"By step {jump.step} the loss {grew} over the first one"
