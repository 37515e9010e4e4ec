"""Rule `learning_rate_too_high`: the loss leapt up in the first steps and the network did not get over it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._evidence import (
    OVERSHOOT_SHARE,
    Death,
    Jump,
    any_overshoot,
    batch_jump,
    broken_since,
    collapsed_to,
    deaths,
    early_jump,
    guess_loss,
    is_problem,
    recent_loss,
    reference_loss,
    severity_of,
    started_badly,
    steps_done,
)
from lightning_interp.rules._forecast import forecast_of
from lightning_interp.rules._spikes import find_spike
from lightning_interp.rules.alert import SEVERITIES, Alert, Severity
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

HELD = 0.6  # part of its thresholds under which an alert that is up is taken back: a failing run wavers much
BEFORE_NAN = 20  # steps before a NaN that are searched for its beginning
_LONGER = 3.0  # times the steps, as in `UndertrainedRule.horizon`
_SPIKE = 2.0  # as in `GradientSpikeRule.factor`
SOURCE = "Lewkowycz et al. 2020 (catapult), Meltzer et al. 2023 (dead units grow with the rate); thresholds measured"


@dataclass(frozen=True)
class LearningRateTooHighRule(Rule):
    """The marks of a too-high rate in the first steps, which it can't hide, and their lasting damage.

    The start was sound (see `bad_start`). A *mark* is, in the first `early_steps` steps (under a warm-up: up to so
    many steps after its end), `loss_after / loss_before > jump` on one batch, or `loss / first loss > logged_jump`, or
    a fifth or more of the updates that raised the loss of their own batch (step ratio < 0); or, without any of these,
    a dead share of a layer that rose by more than `dead_gain` in a run in which some step overshot. With a mark

    - the loss is no number any more; or it is above `recovered` of ln C from `late_step` on, after a jump or with a
      layer killed (`dead_gain`); after a jump of one batch, or with both, from `judge_step` on; or above `lost` of it
      from `judge_step` on, warm-up or not: critical;
    - or it is above `hampered` of that from `late_step` on, after a jump and with a layer killed; above `halfway` of
      it when half of the planned steps are done; above `at_end` of it when they are all done, and three times the
      steps would not bring it below `hopeless`: a warning;
    - or none of it: information, a "catapult"; often such runs generalise well. Overshoots and deaths alone are not
      mentioned: the edge of stability is a normal place to be, and of dead filters `dead_filters` speaks.

    It is also critical if a NaN was preceded, within 20 steps, by such a jump of one batch: a bad batch would have had
    its high loss before the update; and if a cross-entropy that had been below ln C / 2 is back above `recovered` ln C.

    The damage is done within some 20 steps; afterwards gradients and updates are tiny and look like a rate that is
    too low, so only the early numbers tell. Runs shorter than `judge_step` are judged at their end. Without a
    cross-entropy the first loss stands for ln C; where the loss function was not recognised there is no
    `loss_after`, and the logged loss decides alone (`evidence["same_batch"]` is then 0).

    The advice is the part of the rate that a parabola through the step that did it would take, within [0.01, 0.5], as
    `evidence["advised_rate_factor"]`.

    Source: catapult, Lewkowycz et al. 2020. Deaths grow with the rate, Meltzer et al. 2023. Measured by
    `benchmarks/diagnosis` on five small networks, three data sets and three optimizers, on which the thresholds were
    chosen, and longer runs: found 41 of 44 to which a lower rate would have brought 0.3 of the attainable fall of the
    loss, and no other; on other networks, data and optimizers 44 of 49, with four false alarms. By step 100 it named 18
    of 24, and 33 of 36, of those hurt in the first 50: networks with BatchNorm under a warm-up collapse later.

    Attributes:
        jump: Growth of the loss of one batch by its own update.
        logged_jump: Growth of the logged loss over the first one.
        early_steps: Steps that are looked at.
        judge_step: Step by which the loss should have come down.
        late_step: Step from which it is expected whatever the network.
        recovered: Part of ln C (or of the first loss) below which it has.
        lost: Part of that above which it is worse than nothing learned.
        hampered: The same from `late_step` on, where a layer was killed by a jump.
        halfway: The same when half of the planned steps are done.
        at_end: The same at the end.
        hopeless: The same that three times the steps should reach.
        dead_gain: Growth of the dead share of a layer, in [0, 1].
        bad_start: Multiple of ln C from which the start is to blame.
    """

    name: ClassVar[str] = "learning_rate_too_high"
    needs: ClassVar[tuple[str, ...]] = (
        "loss", "loss_before", "loss_after", "step_ratio", "learning_rate", "dead_fraction", "num_classes",
        "non_finite_step",
    )  # fmt: skip

    jump: float = 1.5
    logged_jump: float = 3.0
    early_steps: int = 20
    judge_step: int = 60
    late_step: int = 100
    recovered: float = 0.9
    lost: float = 1.2
    hampered: float = 0.65
    halfway: float = 0.6
    at_end: float = 0.4
    hopeless: float = 0.3
    dead_gain: float = 0.25
    bad_start: float = 3.0

    def __post_init__(self) -> None:
        for argument, low in (("jump", 1.0), ("logged_jump", 1.0), ("bad_start", 1.0)):
            check_number(argument, getattr(self, argument), low=low, high=math.inf)
        check_number("dead_gain", self.dead_gain, low=0, high=1)
        check_at_least("early_steps", self.early_steps, 1)
        check_at_least("judge_step", self.judge_step, self.early_steps)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        held = severity_of(active, (self.name, None))
        relaxed = HELD if is_problem(held) else 1.0
        broken = broken_since(history)
        jump = self.find_jump(history, broken)
        worst = max(deaths(history), key=lambda death: death.gain, default=Death("", 0.0, 0.0))
        killed = worst.gain > self.dead_gain * relaxed
        if jump is None and killed and not started_badly(history, self.bad_start):
            jump = any_overshoot(history)
        if jump is None:
            yield from self._collapsed(history, self.recovered * relaxed)
            return
        loss, reference = recent_loss(history), _lost_level(history)
        if broken is not None:
            severity: Severity = "critical"
        elif loss is None or reference is None:
            return
        else:
            severity = self._severity(history, jump, killed, loss / reference)
            if is_problem(
                held
            ):  # taken back only well below the thresholds that raised it, and never made worse by that
                milder = self._severity(history, jump, killed, loss / (reference * relaxed))
                kept = min(milder, held or milder, key=SEVERITIES.index)
                severity = max(severity, kept, key=SEVERITIES.index)
            judged = history.finished or steps_done(history) >= self.judge_step
            if severity == "info" and (not judged or jump.overshoots):
                return
        bad = is_problem(severity)
        outcome = _outcome(broken, loss if bad else None, reference, worst if killed else None)
        yield Alert(
            rule=self.name,
            severity=severity,
            value=jump.overshoots or jump.factor,
            threshold=OVERSHOOT_SHARE if jump.overshoots else self.jump if jump.same_batch else self.logged_jump,
            cause="learning rate" if bad else "catapult",
            message=f"{_describe(jump)}{outcome}.",
            advice=_advice(history, jump, severity),
            evidence=_evidence(history, jump, worst) | ({"advised_rate_factor": jump.rate_factor} if bad else {}),
            alternatives=["a bad batch or a loss that can overflow"] if broken is not None else [],
            source=SOURCE,
        )

    def _severity(self, history: History, jump: Jump, killed: bool, part: float) -> Severity:
        """How bad it is that the loss is this part of what nothing learned means."""
        done, planned = steps_done(history), history.fact("planned_steps", math.inf)
        later = max(0, jump.step - self.early_steps)
        leapt = not jump.overshoots
        stuck = part > self.recovered
        late = history.finished or done >= self.late_step + later
        if stuck and late and (killed or leapt):
            return "critical"
        # A jump of the logged loss alone may be a rough start, and is given until `late_step`.
        soon = done >= self.judge_step + later and (killed or jump.same_batch)
        if leapt and ((stuck and soon) or (part > self.lost and done >= self.judge_step)):
            return "critical"
        if part > self.hampered and killed and leapt and late:
            return "warning"
        if part > self.halfway and (leapt or killed) and done >= max(planned / 2, self.late_step + later):
            return "critical" if stuck else "warning"
        if history.finished and part > self.at_end and killed:
            seen = forecast_of(history, _LONGER)
            if seen is None or seen.later > self.hopeless * seen.now / part:
                return "warning"
        return "info"

    def find_jump(self, history: History, broken: int | None) -> Jump | None:
        """The early jump, or the one that ended in a NaN; None if there is none or the start is to blame."""
        if started_badly(history, self.bad_start):
            return None
        jump = early_jump(history, same_batch=self.jump, logged=self.logged_jump, steps=self.early_steps)
        if jump is None and broken is not None:
            return batch_jump(history, broken - BEFORE_NAN, broken, self.jump)
        return jump

    def _collapsed(self, history: History, level: float) -> Iterable[Alert]:
        spike = find_spike(history, _SPIKE)
        if spike is not None and not spike.rising:
            return  # one bad batch: `gradient_spike` speaks of it
        guess, loss = guess_loss(history), recent_loss(history)
        lowest = collapsed_to(history, level)
        if guess is None or loss is None or lowest is None or broken_since(history) is not None:
            return
        yield Alert(
            rule=self.name,
            severity="critical",
            value=loss,
            threshold=self.recovered * guess,
            cause="learning rate",
            message=f"The loss was down at {lowest:.3g} and is back at {loss:.3g}, where a guess has {guess:.3g}.",
            advice="Go back to an earlier checkpoint and divide the learning rate by about 3, or clip the gradients.",
            evidence={"lowest_loss": lowest, "loss": loss, "reference_loss": guess},
            alternatives=["a stretch of bad batches", "weights that grow without weight decay"],
            source=SOURCE,
        )


def _lost_level(history: History) -> float | None:
    """The loss that means nothing is learned, at least half of ln C.

    A network that begins with a small one (fine-tuning) has not lost all as soon as the noise of a batch is above that.
    """
    reference, guess = reference_loss(history), guess_loss(history)
    return reference if reference is None or guess is None else max(reference, guess / 2)


def explains_loss(history: History) -> bool:
    """Whether a too-high rate, with the default thresholds, is behind the loss of this run."""
    check = LearningRateTooHighRule().check
    return history.once("explains_loss", lambda: any(is_problem(alert.severity) for alert in check(history, ())))


def _describe(jump: Jump) -> str:
    if not math.isfinite(jump.factor):
        return f"The loss was NaN or infinite right after step {jump.step}"
    if jump.overshoots:
        return f"{jump.overshoots:.0%} of the updates raised the loss of their own batch"
    grew = f"grew {jump.factor:.3g} times"
    if jump.same_batch:
        return f"At step {jump.step} the loss of one batch {grew} through its own update"
    return f"By step {jump.step} the loss {grew} over the first one"


def _outcome(broken: int | None, stuck: float | None, reference: float | None, killed: Death | None) -> str:
    if broken is not None:
        return f", and it is no number since step {broken}"
    parts = []
    if stuck is not None:
        parts.append(f"it is {stuck:.3g} where nothing learned means {reference:.3g}")
    if killed is not None:
        parts.append(f"{killed.gain:.0%} of the filters of {killed.layer} died since the start")
    return f", and {' and '.join(parts)}" if parts else ", and then it recovered (a catapult)"


def _advice(history: History, jump: Jump, severity: Severity) -> str:
    if severity == "info":
        return "Nothing to do; with a rate much above this one the run would fail."
    past = [point.value for point in history.finite("learning_rate") if point.step <= jump.step] or [math.nan]
    target = f", to about {past[-1] * jump.rate_factor:.1e}" if past[-1] > 0 else ""
    return f"Divide the learning rate by about {1 / jump.rate_factor:.0f}{target}, or warm it up."


def _evidence(history: History, jump: Jump, worst: Death) -> dict[str, float]:
    ratios = [point.value for point in history.finite("step_ratio") if point.step <= jump.step + 20]
    numbers = {
        "jump": jump.factor,
        "jump_step": float(jump.step),
        "same_batch": float(jump.same_batch),
        "loss": recent_loss(history),
        "reference_loss": reference_loss(history),
        "dead_gain": worst.gain if worst.layer else None,
        "overshoot_fraction": sum(ratio < 0 for ratio in ratios) / len(ratios) if ratios else None,
    }
    return {name: value for name, value in numbers.items() if value is not None}
