"""Rule `learning_rate_too_low`: the loss falls just as the gradient promises, and is far from its floor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._decay import decay_explains
from lightning_interp.rules._evidence import (
    RELAXED,
    TWICE,
    TWICE_ADVICE,
    first_loss,
    guess_loss,
    largest_dead,
    reference_loss,
    softmax_twice,
    started_badly,
    steps_done,
)
from lightning_interp.rules._forecast import foreseen_loss
from lightning_interp.rules._schedule import rates_at, still_rising
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule
from lightning_interp.rules.suspect_labels import SuspectLabelsRule
from lightning_interp.rules.vanishing_gradient import VanishingGradientRule

SOURCE = "Trust-region ratio of the update; Schneider et al. 2021 (alpha = 1 - 2 ratio); thresholds measured"
BLOW_UP_STEPS = 50
_MOST = 10.0  # times: beyond, the parabola says little
_LITTLE = 1 / 11  # part of ln C that no rate can gain more than a tenth of ln C from


@dataclass(frozen=True)
class LearningRateTooLowRule(Rule):
    """The median step ratio of late steps is above `ratio`, and the loss ends above `loss` of ln C.

    The further the loss stays from its floor, the less the ratio must prove: from `loss` to `far` of ln C the threshold
    goes down in a straight line from `ratio` to `far_ratio`.

    ratio = (loss_before - loss_after) / (fall that the gradient promises); it is 1 - s / (2 s*) where the quadratic
    minimum lies s* / s steps away, so near 1 the steps could be some 1 / (2 (1 - ratio)) times longer.

    Looked at are the probed steps of the last three quarters so far whose learning rate is at least half of the
    largest so far (the end of a decay is slow on purpose), at least `min_probes` of them. A plain step ratio near 1 is
    what many good runs begin with, so nothing is said before `from_part` of the planned steps (at most `enough_steps`;
    `min_steps` where no end is planned), and the loss that counts is the one foreseen for the end (see `forecast`).
    Not said after an early blow-up (loss above `blow_up` times the first one) or a bad start, nor where `dead` or more
    of a layer is dead, the gradient vanishes or the labels are wrong: then a high loss or small updates are a
    consequence; nor while a warm-up is still rising or has just ended; nor below ln C / 11, where a trained network
    goes on and no rate has more to gain. Information at most if the targets of a cross-entropy are no indices (mixed
    images, distillation), since nobody knows its floor; if its scores are probabilities already, that is the cause.

    Without a cross-entropy the first loss stands for ln C. Where the loss function was not recognised there is no
    ratio: then the median update ratio of the layers below `update_ratio` is the sign, with a loss still above
    half of the first one; that is weaker (13 of 28 found), hence information unless nothing was learned at all.

    The advice is that factor, at most 10, as `evidence["advised_rate_factor"]`.

    Source: trust-region ratio, Nocedal and Wright 2006, equation 4.4; alpha of Schneider et al. 2021 is 1 - 2 ratio.
    Measured by `benchmarks/diagnosis` on five small networks, three data sets and three optimizers, on which the
    thresholds were chosen, and longer runs: found 52 of 53 to which a higher rate would have brought 0.3 of the
    attainable fall of the loss, with one false alarm; elsewhere 24 of 36, with four, and on networks, data and
    optimizers added when the rule was finished 36 of 38, with one.

    Attributes:
        ratio: Step ratio from which steps are called short.
        loss: Part of ln C (or of the first loss) under which the run is doing well anyway.
        far_ratio: Step ratio from which steps are called short where the loss ends at `far` or above.
        far: Part of ln C (or of the first loss).
        blow_up: Multiple of the first loss in the first 50 steps that speaks for a too-high rate.
        dead: Dead share of a layer, in [0, 1].
        update_ratio: norm(update) / norm(weight), for runs without a step ratio.
        from_part: Part of the planned steps from which it is said.
        enough_steps: Steps from which it is said however many are planned.
        min_steps: Steps from which it is said if no end is planned.
        min_probes: Probed steps that are needed.
    """

    name: ClassVar[str] = "learning_rate_too_low"
    needs: ClassVar[tuple[str, ...]] = (
        "loss", "step_ratio", "learning_rate", "update_ratio", "dead_fraction", "num_classes", "filter_movement",
        "soft_targets", "scores_normalised", "weight_norm",
    )  # fmt: skip
    patience: ClassVar[int] = 2

    ratio: float = 0.92
    loss: float = 0.3
    far_ratio: float = 0.85
    far: float = 0.5
    blow_up: float = 1.5
    dead: float = 0.25
    update_ratio: float = 1e-4
    from_part: float = 0.75
    enough_steps: int = 1000
    min_steps: int = 200
    min_probes: int = 4

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, low=0.5, high=1)
        check_number("far_ratio", self.far_ratio, low=0.5, high=1)
        for argument in ("dead", "from_part"):
            check_number(argument, getattr(self, argument), low=0, high=1)
        for argument in ("loss", "far", "blow_up", "update_ratio"):
            check_number(argument, getattr(self, argument), low=0, high=math.inf)
        for argument in ("enough_steps", "min_steps", "min_probes"):
            check_at_least(argument, getattr(self, argument), 1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        reference = reference_loss(history)
        if reference is None or self._too_early(history) or still_rising(history) or self._explained(history):
            return
        loss, guess = foreseen_loss(history), guess_loss(history)
        if loss is None or loss <= self.loss * reference or (guess is not None and loss < _LITTLE * guess):
            return
        held = (self.name, None) in active
        ratios = self._late(history, "step_ratio", None)
        numbers = {"loss": loss, "reference_loss": reference}
        for layer in history.layers("filter_movement")[:1]:
            numbers["first_layer_movement"] = history.get("filter_movement", layer).values[-1]
        if len(history.get("step_ratio")):
            ratio = statistics.median(ratios) if len(ratios) >= self.min_probes else 0.0
            threshold = self._threshold(loss / reference)
            if ratio > (1 - (1 - threshold) / RELAXED if held else threshold):
                alert = self._by_ratio(ratio, threshold, {**numbers, "step_ratio": ratio}, _largest_rate(history))
                yield _with_its_floor(history, alert)
        elif loss > 0.5 * reference:
            layers = history.layers("update_ratio")
            updates = [update for layer in layers for update in self._late(history, "update_ratio", layer)]
            if len(updates) >= self.min_probes and 0 < statistics.median(updates) < self.update_ratio:
                yield self._by_update(statistics.median(updates), loss > 0.9 * reference, numbers)

    def _too_early(self, history: History) -> bool:
        planned = history.fact("planned_steps", math.inf)
        begin = self.min_steps if math.isinf(planned) else min(self.from_part * planned, self.enough_steps)
        return not history.finished and steps_done(history) < begin

    def _explained(self, history: History) -> bool:
        first = first_loss(history)
        early = [point.value for point in history.finite("loss") if point.step < BLOW_UP_STEPS]
        blew_up = first is not None and max(early, default=0.0) > self.blow_up * first
        if (
            blew_up
            or started_badly(history, 3.0)
            or decay_explains(history)
            or any(VanishingGradientRule().check(history, ()))
        ):
            return True
        known = history.get("label_recognition").values
        if any(SuspectLabelsRule().check(history, ())) or (known and max(known) < SuspectLabelsRule.unrelated):
            return True
        return largest_dead(history) >= self.dead

    def _late(self, history: History, quantity: str, layer: str | None) -> list[float]:
        """The values of the last three quarters, measured at half of the largest rate or more."""
        late = [p for p in history.finite(quantity, layer) if p.step >= history.step / 4]
        rates = rates_at(history, [point.step for point in late])
        return [point.value for point, rate in zip(late, rates, strict=True) if rate >= 0.5]

    def _threshold(self, part: float) -> float:
        """The step ratio that must be passed where the loss ends at this part of what nothing learned means."""
        way = min(1.0, (part - self.loss) / max(self.far - self.loss, 1e-12))
        return self.ratio + way * min(0.0, self.far_ratio - self.ratio)

    def _by_ratio(self, ratio: float, threshold: float, numbers: dict[str, float], rate: float) -> Alert:
        room = min(_MOST, 1 / (2 * (1 - ratio)) if ratio < 1 else math.inf)
        target = f", to {rate * room:.1e}" if rate > 0 else ""
        return Alert(
            rule=self.name,
            severity="warning",
            value=ratio,
            threshold=threshold,
            cause="learning rate too low",
            message=(
                f"Each step brings {ratio:.1%} of what its gradient promises, so the steps are short, and the loss is "
                f"still going to be {numbers['loss']:.3g} in the end, where nothing learned means "
                f"{numbers['reference_loss']:.3g}."
            ),
            advice=f"Raise the learning rate by about {room:.0f} times{target}.",
            evidence={**numbers, "advised_rate_factor": room},
            alternatives=[
                "a warm-up or a decay that is too long",
                "too few steps",
                "gradients that are clipped to next to nothing",
                "strong dropout, augmentation or weight decay",
            ],
            source=SOURCE,
        )

    def _by_update(self, update: float, nothing_learned: bool, numbers: dict[str, float]) -> Alert:
        room = min(_MOST, 1e-3 / update)
        return Alert(
            rule=self.name,
            severity="warning" if nothing_learned else "info",
            value=update,
            threshold=self.update_ratio,
            cause="learning rate too low",
            message=(
                f"An update changes the weights by {update:.1e} of their norm, and the loss is still "
                f"{numbers['loss']:.3g} where nothing learned means {numbers['reference_loss']:.3g} (the loss function "
                f"was not recognised, so this rests on the logged loss)."
            ),
            advice=f"Raise the learning rate by about {room:.0f} times and compare.",
            evidence={
                **numbers,
                "update_ratio": update,
                "same_batch": 0.0,
                "advised_rate_factor": room,
            },
            alternatives=["gradients that vanish", "a loss whose gradient is blocked"],
            source="CS231n, neural networks 3 (update ratio about 1e-3); threshold measured",
        )


def _largest_rate(history: History) -> float:
    return max((point.value for point in history.finite("learning_rate")), default=0.0)


def _with_its_floor(history: History, alert: Alert) -> Alert:
    """The same where the loss can't come near zero, so that it says little of the rate."""
    if softmax_twice(history):
        others = ["learning rate too low", *alert.alternatives]
        evidence = {name: value for name, value in alert.evidence.items() if name != "advised_rate_factor"}
        return replace(alert, cause=TWICE, advice=TWICE_ADVICE, alternatives=others, evidence=evidence)
    if history.fact("soft_targets", 0.0) > 0:
        raised = alert.advice[0].lower() + alert.advice[1:]
        advice = f"Only if the loss is far above the entropy of the targets: {raised}"
        return replace(alert, severity="info", advice=advice, alternatives=[_FLOOR, *alert.alternatives])
    return alert


_FLOOR = "targets that are shared between classes, of which a part of the loss always remains"
