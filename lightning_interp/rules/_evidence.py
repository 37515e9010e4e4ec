"""What several rules read from a history: reference losses, deaths, the inputs, severity levels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from itertools import islice
from typing import NamedTuple

from lightning_interp.rules.alert import SEVERITIES, Severity
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key

RECENT = 10  # losses whose median is "the loss now": one batch says little
RELAXED = 0.8  # part of a threshold below which an alert that is up is cleared


class Death(NamedTuple):
    """How the dead share of a layer developed, in [0, 1]."""

    layer: str
    before: float
    now: float

    @property
    def gain(self) -> float:
        """Share that died during training."""
        return self.now - self.before


def steps_done(history: History) -> int:
    """Training steps done; `History.step` is the index of the last one, from 0."""
    return history.step + 1


def guess_loss(history: History) -> float | None:
    """Cross-entropy of a guess among C classes, ln C; None if the loss is no cross-entropy."""
    classes = history.fact("num_classes", math.nan)
    return math.log(classes) if classes >= 2 else None


def first_loss(history: History) -> float | None:
    """The loss before any update, NaN included; None if it was not seen (a run that was continued)."""
    first = history.get("loss").first
    return first.value if first is not None and first.step == 0 else None


def recent_loss(history: History) -> float | None:
    """Median of the last losses that are numbers."""
    values = [point.value for point in history.finite("loss")[-RECENT:]]
    return statistics.median(values) if values else None


def reference_loss(history: History) -> float | None:
    """The loss of a model that has learned nothing: ln C or the first loss, the smaller of those that are known.

    The smaller one, so that a pretrained model is measured by where it started. None if neither is known, or if the
    loss is not positive, since ratios of such losses mean nothing.
    """
    known = [loss for loss in (guess_loss(history), first_loss(history)) if loss is not None and math.isfinite(loss)]
    lowest = min(known, default=0.0)
    return lowest if lowest > 0 else None


def collapsed_to(history: History, part: float) -> float | None:
    """The lowest loss of a run that had learned and has lost it again; None for others.

    It had come below ln C / 2 and is now above `part` of ln C, both as medians of `RECENT` losses.
    """
    guess, now = guess_loss(history), recent_loss(history)
    if guess is None or now is None or now <= part * guess:
        return None
    lowest = lowest_median(history)
    return lowest if lowest < 0.5 * guess else None


def lowest_median(history: History) -> float:
    """The lowest median of `RECENT` losses in a row, infinity if there are fewer."""
    values = [point.value for point in history.finite("loss")]
    medians = (statistics.median(values[i : i + RECENT]) for i in range(0, len(values) - RECENT + 1, RECENT))
    return min(medians, default=math.inf)


def started_badly(history: History, factor: float) -> bool:
    """Whether the loss before any update was no number, or a cross-entropy above `factor` ln C."""
    first, guess = first_loss(history), guess_loss(history)
    if first is None:
        return False
    return not math.isfinite(first) or (guess is not None and first > factor * guess)


def broken_since(history: History) -> int | None:
    """Step since which the loss is not finite; None if it is finite, or was so again later (a batch was skipped)."""
    since = first_bad_loss(history)
    if since is None:
        return None
    healthy_again = any(point.step > since for point in history.finite("loss")[-1:])
    return None if healthy_again else since


def first_bad_loss(history: History) -> int | None:
    """Step of the first loss that is no number; None if all are."""
    losses = history.get("loss")
    some = len(losses) > len(history.finite("loss"))
    bad = [step for step, value in losses if not math.isfinite(value)] if some else []
    step = min([*bad, history.fact("non_finite_step", math.inf)])
    return None if step == math.inf else int(step)


def early_end(history: History, steps: int) -> int:
    """Step before which the learning rate is on trial for the first time.

    `steps` at a constant rate; under a warm-up, `steps` after its end, since the rate strikes where it is large.
    """
    peak, risen = -math.inf, 0
    for step, rate in history.finite("learning_rate"):
        if rate < peak * 0.999:
            break
        if rate > peak * 1.001 and peak > -math.inf:
            risen = step
        peak = max(peak, rate)
    return risen + steps if risen else steps


def warming_up(history: History) -> bool:
    """Whether the first rise of the learning rate goes on, as far as the newest step at which it is known."""
    rates = history.finite("learning_rate")
    return bool(rates) and 0 < rates[-1].step <= early_end(history, 0)


def deaths(history: History) -> list[Death]:
    """Dead share of each layer before the first update and now; layers without a window before it are left out."""
    found = []
    for layer in history.layers("dead_fraction"):
        series = history.get("dead_fraction", layer)
        early = list(islice(series.finite(), 2))
        if len(early) > 1 and early[0].step == 0:
            now = next(series.finite(newest_first=True)).value
            pruned = pruned_share(history, layer)
            before, born = of_unpruned(early[0].value, pruned), history.get("born_dead_fraction", layer).last
            if 0 < pruned < 1 and born is not None:  # which of the first ones were pruned since is not known otherwise
                before = born.value / (1 - pruned)
            found.append(Death(layer, before, of_unpruned(now, pruned)))
    return found


def largest_dead(history: History) -> float:
    """Largest dead share of a layer now, 0 if none was measured."""
    last = [(layer, history.get("dead_fraction", layer).last) for layer in history.layers("dead_fraction")]
    known = [(layer, point.value) for layer, point in last if point is not None and math.isfinite(point.value)]
    return max((of_unpruned(dead, pruned_share(history, layer)) for layer, dead in known), default=0.0)


def pruned_share(history: History, layer: str) -> float:
    """Share of a layer that pruning took out."""
    return history.fact("pruned_dead", 0.0, layer) / history.fact("num_filters", 1.0, layer)


def of_unpruned(dead: float, pruned: float) -> float:
    """A dead share, as the share of the filters that pruning has left: what was taken out has not died.

    Example:
        >>> of_unpruned(0.75, 0.5), of_unpruned(0.25, 0.5), of_unpruned(1.0, 1.0)
        (0.5, 0.0, 0.0)
    """
    return max(0.0, dead - pruned) / (1 - pruned) if pruned < 1 else 0.0


def inputs_off(history: History, mean: float = 0.2, spread: float = 2.0) -> bool:
    """Whether the first batch is far from zero mean or unit standard deviation."""
    centre, deviation = history.fact("input_mean", 0.0), history.fact("input_std", 1.0)
    return not abs(centre) <= mean or not 1 / spread <= deviation <= spread


LEARNED = 0.9  # part of ln C below which a network has learned something


def softmax_twice(history: History) -> bool:
    """Whether the cross-entropy is given probabilities: its floor is then ln(e + C - 1) - 1, 1.46 for ten classes."""
    return history.fact("scores_normalised", 0.0) > 0


TWICE = "softmax before the cross-entropy"
TWICE_ADVICE = "Give the cross-entropy the scores themselves: it takes the softmax of what it gets, here a second time."


def inputs_blamed(history: History, scale: float = 1.5, mean: float = 0.2, spread: float = 2.0) -> bool:
    """Whether the first batch is that far off, and so large (root mean square above `scale`) that it may do harm."""
    centre, deviation = history.fact("input_mean", 0.0), history.fact("input_std", 1.0)
    return inputs_off(history, mean, spread) and not math.hypot(centre, deviation) <= scale


def severity_of(active: Collection[Key], key: Key) -> Severity | None:
    """Severity with which an alert is up; `critical` where only the keys are known; None if it is not up.

    Example:
        >>> severity_of({("dead_filters", "conv1"): "info"}, ("dead_filters", "conv1"))
        'info'
    """
    if key not in active:
        return None
    if isinstance(active, Mapping):
        held: Severity = active[key]
        return held
    return "critical"


def level(value: float, thresholds: tuple[float, float, float], held: Severity | None) -> Severity | None:
    """The severity that a value reaches; thresholds up to the held severity are relaxed to `RELAXED` of themselves.

    Example:
        >>> level(0.3, (0.05, 0.25, 0.5), None), level(0.22, (0.05, 0.25, 0.5), "warning")
        ('warning', 'warning')
    """
    reached: Severity | None = None
    for severity, threshold in zip(SEVERITIES, thresholds, strict=True):
        relaxed = held is not None and SEVERITIES.index(severity) <= SEVERITIES.index(held)
        if value >= threshold * (RELAXED if relaxed else 1.0):
            reached = severity
    return reached


def is_problem(severity: Severity | None) -> bool:
    """Whether it is more than information."""
    return severity in ("warning", "critical")
