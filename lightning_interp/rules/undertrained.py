"""Rule `undertrained`: the training ended while the loss was still falling."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._curve import Forecast
from lightning_interp.rules._decay import decay_explains
from lightning_interp.rules._evidence import (
    RELAXED,
    TWICE,
    TWICE_ADVICE,
    broken_since,
    guess_loss,
    largest_dead,
    reference_loss,
    softmax_twice,
    steps_done,
)
from lightning_interp.rules._forecast import forecast_of
from lightning_interp.rules._schedule import rests_since
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.learning_rate_too_high import explains_loss
from lightning_interp.rules.learning_rate_too_low import LearningRateTooLowRule
from lightning_interp.rules.rule import Key, Rule

_PROBES = 4
_LEFT = (0.1, 0.3)  # parts of the first loss, near the floor and far from it
_RISING = 0.005  # of the points: less is noise, with the hundreds of points that are usual
SOURCE = "Power law of learning curves, Hestness et al. 2017, Kaplan et al. 2020; thresholds measured"


@dataclass(frozen=True)
class UndertrainedRule(Rule):
    """With `horizon` times the steps the loss would fall by `fall` of what a guess has; half of that if it is high.

    L(t) = c + a t^-b, with c >= 0, is fitted to the training loss of the last half (see `forecast`), and

        (L(T) - L(horizon T)) / L0 > threshold,   L0 = ln C, or the first loss where there is no cross-entropy,

    and the fall within the last half is no matter of noise (`certainty`). The threshold is `fall` for a loss near its
    floor, L(T) <= 0.1 L0, and goes down to half of that at 0.3 L0: such a forecast errs on the side of too little, and
    where much of the loss is left there is more that it may have missed. Time t is the work done, the learning rate
    summed up (see `work_done`): a loss that is flat because the rate has decayed has found no floor, and a schedule
    three times as long has three times the work in it. Said as a warning when the training has ended
    as planned, and as information from `from_part` of the planned steps on. Not said if the loss is NaN, or if a
    too-high rate or deaths (`dead` of a layer) explain a high loss; if the rate is too low, that is given as the
    cause. Without a cross-entropy L0 is the first loss.

    A run may also end on the level where it began, before the fall has set in: above `not_begun` of L0 with steps that
    are short (median step ratio above `short`) more of them, or longer ones, are due, whatever the curve says; but not
    where less than `fall` is left of it, as in a trained network that goes on. If the rate was below a thousandth of
    its largest for the last half of the steps or more, that is the cause, and no more steps are advised.

    Where the embedding is measured, the alert says too whether the classes were still moving apart (`knn_accuracy` over
    the last half): evidence, not a condition. Otherwise it speaks of the training loss only. A loss that is near zero
    can't fire: less than `fall` is left.

    The advice is `horizon` times the steps, as `evidence["advised_steps_factor"]`.

    Source: learning curves as power laws, Hestness et al. 2017, Kaplan et al. 2020. Measured by `benchmarks/diagnosis`
    on five small networks, three data sets and three optimizers, on which the thresholds were chosen: found 40 of 43
    runs to which three times the steps brought 0.2 of the attainable fall of the loss, with three false alarms; on
    other networks, data and optimizers 35 of 41, with four, and on further ones 47 of 55, with four (41 before `dead`
    was raised, which they led to). It misses most where a noisy loss hides the fall.

    Attributes:
        fall: Part of ln C, or of the first loss, by which it must still fall near the floor.
        horizon: How many times longer the training is thought.
        from_part: Part of the planned steps from which it is mentioned.
        dead: Dead share of a layer that explains a high loss, in [0, 1]; with less of it dead a network learns on.
        certainty: Standard errors by which the loss must have fallen within the last half.
        min_points: Losses that the last half must have.
        not_begun: Part of ln C (or of the first loss, the smaller one) above which nothing was learned yet.
        short: Median step ratio from which the steps were short.
    """

    name: ClassVar[str] = "undertrained"
    needs: ClassVar[tuple[str, ...]] = (
        "loss", "planned_steps", "num_classes", "dead_fraction", "loss_before", "loss_after", "step_ratio",
        "learning_rate", "scores_normalised", "weight_norm",
    )  # fmt: skip

    fall: float = 0.09
    horizon: float = 3.0
    from_part: float = 0.9
    dead: float = 0.5
    certainty: float = 3.0
    min_points: int = 16
    not_begun: float = 0.9
    short: float = 0.98

    def __post_init__(self) -> None:
        for argument in ("fall", "from_part", "dead", "not_begun", "short"):
            check_number(argument, getattr(self, argument), low=0, high=1)
        check_number("horizon", self.horizon, low=1, high=math.inf)
        check_number("certainty", self.certainty, low=0, high=math.inf)
        check_at_least("min_points", self.min_points, 8)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        planned = history.fact("planned_steps", math.inf)
        reference = reference_loss(history)
        if reference is None or not (history.finished or steps_done(history) >= self.from_part * planned):
            return
        if broken_since(history) is not None or largest_dead(history) >= self.dead or explains_loss(history):
            return
        if decay_explains(history):
            return
        seen = forecast_of(history, self.horizon, self.min_points)
        if seen is None:
            return
        scale = guess_loss(history) or reference
        part = (seen.now - seen.later) / scale
        threshold = self.fall * float(np.interp(seen.now / scale, _LEFT, (1.0, 0.5)))
        falling = part > threshold * (RELAXED if (self.name, None) in active else 1.0)
        falling = falling and seen.certainty >= self.certainty
        begun = seen.now <= self.fall * scale  # of a trained network that goes on, the first level is the last one
        if falling or (not begun and self._not_begun(history, seen.now / reference)):
            future = f"in {self.horizon:g} times the steps it would come to about {seen.later:.3g}"
            what = f"and still falling: {future}" if falling else f"and has not left its first level, {reference:.3g}"
            yield self._alert(history, seen, (part, threshold), reference, what)

    def _not_begun(self, history: History, part: float) -> bool:
        """Whether the loss has not left its first level, and the steps have been too short for it to do so."""
        ratios = [point.value for point in history.finite("step_ratio")]
        return part > self.not_begun and len(ratios) >= _PROBES and statistics.median(ratios) > self.short

    def _alert(self, history: History, seen: Forecast, fall: tuple[float, float], reference: float, what: str) -> Alert:
        rests = rests_since(history)
        if rests is not None and 2 * rests <= steps_done(history):
            return self._at_rest(history, seen, fall, reference, rests)
        apart, separation = _separation(history)
        twice = softmax_twice(history)
        slow = any(alert.severity == "warning" for alert in LearningRateTooLowRule().check(history, ()))
        longer = f"Train about {self.horizon:g} times as long ({self.horizon * steps_done(history):.0f} steps)"
        return Alert(
            rule=self.name,
            severity="warning" if history.finished else "info",
            value=fall[0],
            threshold=fall[1],
            cause=TWICE if twice else "learning rate too low" if slow else "too few steps",
            message=f"The training loss is {seen.now:.3g} {what}.{apart}",
            advice=(
                TWICE_ADVICE
                if twice
                else "Raise the learning rate first (see learning_rate_too_low), then train longer if need be."
                if slow
                else f"{longer}, if the validation loss is falling too."
            ),
            evidence={
                "loss": seen.now,
                "forecast_loss": seen.later,
                "reference_loss": reference,
                "exponent": seen.exponent,
                "steps": float(steps_done(history)),
                "advised_steps_factor": self.horizon,
                **separation,
            },
            alternatives=["too few steps"] if slow or twice else ["learning rate too low"],
            source=SOURCE,
        )

    def _at_rest(
        self, history: History, seen: Forecast, fall: tuple[float, float], reference: float, since: int
    ) -> Alert:
        return Alert(
            rule=self.name,
            severity="warning" if history.finished else "info",
            value=fall[0],
            threshold=fall[1],
            cause="learning rate decayed to nothing",
            message=(
                f"The training loss is {seen.now:.3g}, and next to nothing is learned since step {since}: from there "
                "on the learning rate was below a thousandth of its largest."
            ),
            advice="Look at the schedule: its length, and whether it is stepped once an epoch or with each batch.",
            evidence={
                "loss": seen.now,
                "reference_loss": reference,
                "steps": float(steps_done(history)),
                "at_rest_since": float(since),
            },
            alternatives=["too few steps"],
            source=SOURCE,
        )


def _separation(history: History) -> tuple[str, dict[str, float]]:
    """Whether the classes were moving apart in the embedding over the last half: a sentence and evidence, if known."""
    half = [p for p in history.finite("knn_accuracy") if 2 * (p.step + 1) >= steps_done(history)]
    if len(half) < 2:
        return "", {}
    first, last = half[0].value, half[-1].value
    evidence = {"knn_accuracy": last, "knn_accuracy_rise": last - first}
    if last - first < _RISING:
        return "", evidence
    return (
        f" The classes are still moving apart: {first:.1%} of the points lay among their own, now {last:.1%}.",
        evidence,
    )
