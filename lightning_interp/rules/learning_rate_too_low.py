"""Rule `learning_rate_too_low`: the loss falls just as the gradient promises, and is far from its floor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._evidence import (
    RELAXED,
    finite_points,
    first_loss,
    largest_dead,
    recent_loss,
    reference_loss,
    started_badly,
    steps_done,
)
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History, Point
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Trust-region ratio of the update; Schneider et al. 2021 (alpha = 1 - 2 ratio); thresholds measured"
BLOW_UP_STEPS = 50


@dataclass(frozen=True)
class LearningRateTooLowRule(Rule):
    """The median step ratio of late steps is above `ratio`, with the loss still above `loss` of ln C.

    ratio = (loss_before - loss_after) / (fall that the gradient promises); it is 1 - s / (2 s*) where the quadratic
    minimum lies s* / s steps away, so near 1 the steps could be some 1 / (2 (1 - ratio)) times longer.

    Looked at are the probed steps of the last three quarters so far whose learning rate is at least half of the
    largest so far (the end of a decay is slow on purpose), at least `min_probes` of them. Not said after an early
    blow-up (loss above `blow_up` times the first one) or a bad start, nor with `dead` or more of a layer dead: then
    small updates are a consequence; nor while a warm-up is still rising or has just ended.

    Without a cross-entropy the first loss stands for ln C. Where the loss function was not recognised there is no
    ratio: then the median update ratio of the layers below `update_ratio` is the sign, with a loss still above
    half of the first one; that is weaker (13 of 28 found), hence information unless nothing was learned at all.

    Source: measured: 24 of 28 runs with a too-low rate found, none of 46 healthy and 82 otherwise faulty ones.

    Attributes:
        ratio: Step ratio from which steps are called short.
        loss: Part of ln C (or of the first loss) under which the run is doing well anyway.
        blow_up: Multiple of the first loss in the first 50 steps that speaks for a too-high rate.
        dead: Dead share of a layer, in [0, 1].
        update_ratio: norm(update) / norm(weight), for runs without a step ratio.
        min_steps: Steps before which nothing is said: at first short steps are normal.
        min_probes: Probed steps that are needed.
    """

    name: ClassVar[str] = "learning_rate_too_low"
    needs: ClassVar[tuple[str, ...]] = (
        "loss", "step_ratio", "learning_rate", "update_ratio", "dead_fraction", "num_classes", "filter_movement",
    )  # fmt: skip
    patience: ClassVar[int] = 2

    ratio: float = 0.97
    loss: float = 0.1
    blow_up: float = 1.5
    dead: float = 0.25
    update_ratio: float = 1e-4
    min_steps: int = 200
    min_probes: int = 3

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, low=0.5, high=1)
        check_number("dead", self.dead, low=0, high=1)
        for argument in ("loss", "blow_up", "update_ratio"):
            check_number(argument, getattr(self, argument), low=0, high=math.inf)
        check_at_least("min_steps", self.min_steps, 1)
        check_at_least("min_probes", self.min_probes, 1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        loss, reference = recent_loss(history), reference_loss(history)
        if loss is None or reference is None or loss <= self.loss * reference or self._explained(history):
            return
        if steps_done(history) < self.min_steps or _rising(history):
            return
        held = (self.name, None) in active
        ratios = self._late(history, "step_ratio", None)
        numbers = {"loss": loss, "reference_loss": reference}
        for layer in history.layers("filter_movement")[:1]:
            numbers["first_layer_movement"] = history.get("filter_movement", layer).values[-1]
        if len(history.get("step_ratio")):
            ratio = statistics.median(ratios) if len(ratios) >= self.min_probes else 0.0
            if ratio > (1 - (1 - self.ratio) / RELAXED if held else self.ratio):
                yield self._by_ratio(ratio, {**numbers, "step_ratio": ratio})
        elif loss > 0.5 * reference:
            layers = history.layers("update_ratio")
            updates = [update for layer in layers for update in self._late(history, "update_ratio", layer)]
            if len(updates) >= self.min_probes and 0 < statistics.median(updates) < self.update_ratio:
                yield self._by_update(statistics.median(updates), loss > 0.9 * reference, numbers)

    def _explained(self, history: History) -> bool:
        first = first_loss(history)
        early = [point.value for point in finite_points(history.get("loss")) if point.step < BLOW_UP_STEPS]
        blew_up = first is not None and max(early, default=0.0) > self.blow_up * first
        return blew_up or started_badly(history, 3.0) or largest_dead(history) >= self.dead

    def _late(self, history: History, quantity: str, layer: str | None) -> list[float]:
        """The values of the last three quarters, measured at half of the largest rate or more."""
        rates = finite_points(history.get("learning_rate"))
        full = 0.5 * max((point.value for point in rates), default=0.0)
        late = [p for p in finite_points(history.get(quantity, layer)) if p.step >= history.step / 4]
        return [point.value for point in late if _rate_at(rates, point.step) >= full]

    def _by_ratio(self, ratio: float, numbers: dict[str, float]) -> Alert:
        room = 1 / (2 * (1 - ratio)) if ratio < 1 else math.inf
        return Alert(
            rule=self.name,
            severity="warning",
            value=ratio,
            threshold=self.ratio,
            cause="learning rate",
            message=(
                f"Each step brings {ratio:.1%} of what its gradient promises, so the steps are short, and the loss is "
                f"still {numbers['loss']:.3g} where nothing learned means {numbers['reference_loss']:.3g}."
            ),
            advice=f"Raise the learning rate by about {min(10.0, room):.0f} times.",
            evidence=numbers,
            alternatives=["a warm-up or a decay that is too long"],
            source=SOURCE,
        )

    def _by_update(self, update: float, nothing_learned: bool, numbers: dict[str, float]) -> Alert:
        return Alert(
            rule=self.name,
            severity="warning" if nothing_learned else "info",
            value=update,
            threshold=self.update_ratio,
            cause="learning rate",
            message=(
                f"An update changes the weights by {update:.1e} of their norm, and the loss is still "
                f"{numbers['loss']:.3g} where nothing learned means {numbers['reference_loss']:.3g} (the loss function "
                f"was not recognised, so this rests on the logged loss)."
            ),
            advice=f"Raise the learning rate by about {min(10.0, 1e-3 / update):.0f} times and compare.",
            evidence={**numbers, "update_ratio": update, "same_batch": 0.0},
            alternatives=["gradients that vanish", "a loss whose gradient is blocked"],
            source="CS231n, neural networks 3 (update ratio about 1e-3); threshold measured",
        )


def _rate_at(rates: list[Point], step: int) -> float:
    """The rate recorded last before or at a step, infinity if none was."""
    at = math.inf
    for point in rates:
        if point.step > step:
            break
        at = point.value
    return at


def _rising(history: History) -> bool:
    """Whether the largest learning rate was reached in the last fifth of the steps so far, by a rise."""
    rates = finite_points(history.get("learning_rate"))
    if not rates:
        return False
    peak = max(rates, key=lambda point: point.value)  # the first of equal ones
    return peak.value > rates[0].value * 1.001 and peak.step > 0.8 * history.step
