"""Rule `gradient_spike`: one batch whose loss and gradient tower above all before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._evidence import (
    RECENT,
    broken_since,
    guess_loss,
    reference_loss,
    steps_done,
)
from lightning_interp.rules._spikes import Spike, find_spike
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.exploding_gradient import ExplodingGradientRule
from lightning_interp.rules.history import History
from lightning_interp.rules.learning_rate_too_high import LearningRateTooHighRule, explains_loss
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Chowdhery et al. 2022 (PaLM, section 5.1: loss spikes and the batches before them); thresholds measured"


@dataclass(frozen=True)
class GradientSpikeRule(Rule):
    """A single loss, after the first `min_steps` steps, above `factor` times all losses before it.

    If the loss is a cross-entropy it must be above `factor` ln C too: a network that has learned something is sure of
    itself, and where labels or images are wrong it is surely wrong, so such a batch has several times the loss of a
    guess, and a gradient to match. The loss is looked at because it is known at every step and before the update; the
    gradient is probed only now and then (its norm is in the evidence where the step was a probed one).

    A warning for `keep` steps. Critical as long as the loss stays above `lost` of the way from the loss before it back
    to L0 (ln C or the first loss, the smaller one): that one batch has undone the training. The cause is a bad batch,
    unless the loss was on its way up already, or no better than a guess, or the update before had overshot (step
    ratio < 0): then the rate.

    Not said if the loss is NaN, if a too-high rate explains an early jump, or if `exploding_gradient` speaks. A batch
    of images on the wrong scale has no high loss in a network that normalises its first layer (BatchNorm, GroupNorm):
    nothing is seen of it here. Nor is in a run that was continued without its history.

    Source: loss spikes from single batches, PaLM, Chowdhery et al. 2022, section 5.1. Measured on small CNNs on real
    digits with one bad batch at step 120: found in 6 of 6 runs whose labels were shuffled in it (2.2 to 3.6 times ln C)
    and in 3 of 3 whose pixels were multiplied by 1000, without normalisation; in 0 of 4 of these with BatchNorm or
    GroupNorm. Silent in 65 of 65 runs without one, among them batches of 1, 2 and 4 images, the peak of one-cycle and
    rates near the largest that works. The threshold was chosen on most of these runs.

    Without a cross-entropy all losses before it, the first one among them, are the measure.

    Attributes:
        factor: Multiple of the largest loss so far and of ln C.
        min_steps: Steps before which jumps are a matter of the rate.
        keep: Steps for which it is told.
        lost: Part of what was learned that must be gone to make it critical, in [0, 1].
    """

    name: ClassVar[str] = "gradient_spike"
    needs: ClassVar[tuple[str, ...]] = (
        "loss_peak", "loss", "gradient_norm", "step_ratio", "num_classes", "learning_rate", "loss_before", "loss_after",
        "update_norm", "update_ratio", "trainable", "dead_fraction",
    )  # fmt: skip

    factor: float = 2.0
    min_steps: int = 50
    keep: int = 200
    lost: float = 0.5

    def __post_init__(self) -> None:
        check_number("factor", self.factor, low=1, high=math.inf)
        check_at_least("min_steps", self.min_steps, 1)
        check_at_least("keep", self.keep, 1)
        check_number("lost", self.lost, low=0, high=1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        spike = find_spike(history, self.factor, self.min_steps)
        if spike is None or broken_since(history) is not None:
            return
        now = _since(history, spike)
        gone = now is not None and self._undone(history, spike, now)
        if not gone and steps_done(history) > spike.step + self.keep:
            return
        if _rate_explains(history) or any(ExplodingGradientRule().check(history, ())):
            return
        yield self._alert(history, spike, now, gone)

    def _undone(self, history: History, spike: Spike, now: float) -> bool:
        """Whether the loss is still back where it began, or beyond."""
        reference = reference_loss(history)
        return reference is not None and now > spike.before + self.lost * max(reference - spike.before, spike.before)

    def _alert(self, history: History, spike: Spike, now: float | None, gone: bool) -> Alert:
        guess = guess_loss(history)
        if guess is not None and spike.before >= guess:  # nothing that a batch could have undone
            spike = spike._replace(rising=True)
        norms = {point.step: point.value for point in history.finite("gradient_norm")}
        usual = statistics.median(value for step, value in norms.items() if step != spike.step) if norms else None
        numbers = {
            "spike_step": float(spike.step),
            "loss_before": spike.before,
            "loss_since": now,
            "gradient_norm": norms.get(spike.step),
            "usual_gradient_norm": usual,
        }
        outcome = (
            "" if now is None else f", and it is {now:.3g} since" if gone else f"; since then it is {now:.3g} again"
        )
        return Alert(
            rule=self.name,
            severity="critical" if gone else "warning",
            value=spike.times,
            threshold=self.factor,
            cause="learning rate" if spike.rising else "bad batch",
            message=(
                f"At step {spike.step} the loss was {spike.loss:.3g}, {spike.times:.3g} times the largest one before "
                f"({spike.before:.3g} just before){outcome}."
            ),
            advice=_advice(spike, usual, gone),
            evidence={name: value for name, value in numbers.items() if value is not None},
            alternatives=["bad batch"] if spike.rising else ["learning rate"],
            source=SOURCE,
        )


def _since(history: History, spike: Spike) -> float | None:
    """Median of the newest losses after the spike; None until there are enough."""
    values = [point.value for point in history.finite("loss") if point.step > spike.step][-RECENT:]
    return statistics.median(values) if len(values) == RECENT else None


def _rate_explains(history: History) -> bool:
    """Whether it is the early jump that a too-high rate makes; a later collapse may be the work of this batch."""
    return LearningRateTooHighRule().find_jump(history, None) is not None and explains_loss(history)


def _advice(spike: Spike, usual: float | None, gone: bool) -> str:
    back = f"Go back to a checkpoint before step {spike.step}. " if gone else ""
    clip = "clip the gradient" + (f" (gradient_clip_val={2 * usual:.2g}, twice its usual norm)" if usual else "")
    if spike.rising:
        return f"{back}Divide the learning rate by about 3, or {clip}."
    return f"{back}Look at the images and labels of the batch of step {spike.step}, and {clip}."
