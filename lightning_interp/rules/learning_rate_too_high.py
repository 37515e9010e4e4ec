"""Rule `learning_rate_too_high`: the loss leapt up, or filters died, and the network did not get over it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._decay import decay_explains
from lightning_interp.rules._evidence import (
    Death,
    broken_since,
    collapsed_to,
    deaths,
    early_end,
    guess_loss,
    inputs_blamed,
    is_problem,
    recent_loss,
    reference_loss,
    severity_of,
    started_badly,
    steps_done,
    warming_up,
)
from lightning_interp.rules._forecast import forecast_of
from lightning_interp.rules._jumps import OVERSHOOT_SHARE, Jump, any_overshoot, batch_jump, describe, early_jump
from lightning_interp.rules._spikes import Spike, find_spike
from lightning_interp.rules.alert import SEVERITIES, Alert, Severity
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

HELD = 0.6  # part of its thresholds under which an alert that is up is taken back: a failing run wavers much
BEFORE_NAN = 20  # steps before a NaN that are searched for its beginning
_LONGER = 3.0  # times the steps, as in `UndertrainedRule.horizon`
_SPIKE = 2.0  # as in `GradientSpikeRule.factor`
SOURCE = "Lewkowycz et al. 2020 (catapult), Meltzer et al. 2023 (dead units grow with the rate); thresholds measured"


class _Damage(NamedTuple):
    """What there is of it.

    Attributes:
        part: The loss, as a part of what nothing learned means; NaN where that is not known.
        killed, crippled: Whether a part of a layer died, and whether half of one did.
    """

    part: float
    killed: bool
    crippled: bool


@dataclass(frozen=True)
class LearningRateTooHighRule(Rule):
    """The marks of a too-high rate, most of them in the first steps, and their lasting damage.

    The start was sound (see `bad_start`). A *mark* is, in the first `early_steps` steps (under a warm-up: up to so
    many steps after its end), `loss_after / loss_before > jump` on one batch, or `loss / first loss > logged_jump`, or
    a fifth or more of the updates that raised the loss of their own batch (step ratio < 0). A weaker one, at any time,
    is any such update in a run in which the dead share of a layer rose by more than `dead_gain`; or that it rose by
    `dead_most` without one, unless a bad batch was seen (see `gradient_spike`). With a mark

    - the loss is no number any more (a weak mark does not count here); or it is above `recovered` of ln C from
      `late_step` on, after a jump or with a layer killed (`dead_gain`); after a jump of one batch, or with both, from
      `judge_step` on; or, after a jump, above `lost` of it from `judge_step` on, warm-up or not: critical;
    - or it is above `hampered` of that from `late_step` on, after a jump and with a layer killed; above `crippled` of
      it with half of one (`dead_most`), from `late_step` on, when the warm-up is over; above `halfway` of it, after a
      jump or with a layer killed, when half of the planned steps are done; above `at_end` of it, with a layer killed,
      when they are all done, and three times the steps would not bring it below `hopeless`: a warning;
    - or none of it: information, a "catapult"; often such runs generalise well. Overshoots and deaths alone are not
      mentioned: the edge of stability is a normal place to be, and of dead filters `dead_filters` speaks.

    These steps are counted from the jump if it came later than `early_steps`; with a weak mark, but for `dead_most`,
    the run is given another `late_step` after its warm-up. It is also critical if a NaN was preceded, within 20 steps,
    by such a jump of one batch: a bad batch would have had its high loss before the update; and if a cross-entropy that
    had been below ln C / 2 is back above `recovered` ln C.

    Most damage is done within some 20 steps; afterwards gradients and updates are tiny and look like a rate that is
    too low, so the early numbers tell most. Runs shorter than `judge_step` are judged at their end. Without a
    cross-entropy the first loss stands for ln C; where the loss function was not recognised there is no
    `loss_after`, and the logged loss decides alone (`evidence["same_batch"]` is then 0).

    The advice is the part of the rate that a parabola through the step that did it would take, within [0.01, 0.5], as
    `evidence["advised_rate_factor"]`.

    Source: catapult, Lewkowycz et al. 2020. Deaths grow with the rate, Meltzer et al. 2023. Measured by
    `benchmarks/diagnosis` on five small networks, three data sets and three optimizers, on which the thresholds were
    chosen, and longer runs: found 42 of 44 to which a lower rate would have brought 0.3 of the attainable fall of the
    loss, and no other; on other networks, data and optimizers 46 of 49, with five false alarms, and on those added when
    the rule was finished 17 of 20, with one. By step 100 it named 66 of the 71 that were hurt in the first 50.

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
        crippled: The same from `late_step` on, where half of a layer was killed.
        dead_gain: Growth of the dead share of a layer, in [0, 1].
        dead_most: The same from which it says enough by itself; at least `dead_gain`.
        bad_start: Multiple of ln C from which the start is to blame.
    """

    name: ClassVar[str] = "learning_rate_too_high"
    needs: ClassVar[tuple[str, ...]] = (
        "loss", "loss_before", "loss_after", "step_ratio", "learning_rate", "dead_fraction", "num_classes",
        "non_finite_step", "weight_norm",
    )  # fmt: skip

    jump: float = 1.5
    logged_jump: float = 3.0
    early_steps: int = 20
    judge_step: int = 60
    late_step: int = 100
    recovered: float = 0.9
    lost: float = 1.2
    hampered: float = 0.65
    crippled: float = 0.5
    halfway: float = 0.6
    at_end: float = 0.4
    hopeless: float = 0.3
    dead_gain: float = 0.25
    dead_most: float = 0.5
    bad_start: float = 3.0

    def __post_init__(self) -> None:
        for argument, low in (("jump", 1.0), ("logged_jump", 1.0), ("bad_start", 1.0)):
            check_number(argument, getattr(self, argument), low=low, high=math.inf)
        check_number("dead_gain", self.dead_gain, low=0, high=1)
        check_number("dead_most", self.dead_most, low=self.dead_gain, high=1)
        check_at_least("early_steps", self.early_steps, 1)
        check_at_least("judge_step", self.judge_step, self.early_steps)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        held = severity_of(active, (self.name, None))
        relaxed = HELD if is_problem(held) else 1.0
        worst = max(deaths(history), key=lambda death: death.gain, default=Death("", 0.0, 0.0))
        damage, milder = (self._damage(history, worst.gain, part) for part in (1.0, relaxed))
        jump, severity = self._verdict(history, damage)
        if held is not None and is_problem(held):
            # Taken back only well below the thresholds that raised it, and never made worse by that.
            held_by, kept = self._verdict(history, milder)
            jump, severity = jump or held_by, max(severity, min(kept, held, key=SEVERITIES.index), key=SEVERITIES.index)
        if jump is not None and is_problem(severity):
            yield self._alert(history, jump, severity, worst if milder.killed else None)
            return
        collapse = self._collapsed(history, self.recovered * relaxed)
        judged = history.finished or steps_done(history) >= self.judge_step
        if collapse or jump is None or jump.overshoots is not None or math.isnan(damage.part) or not judged:
            yield from collapse
        else:
            yield self._alert(history, jump, severity, worst if damage.killed else None)

    def _verdict(self, history: History, damage: _Damage) -> tuple[Jump | None, Severity]:
        """The mark, if there is one, and how bad it is; information also where that is not known."""
        broken = broken_since(history)
        jump = self.find_jump(history, broken)
        if broken is not None:
            return jump, "info" if jump is None else "critical"
        mark = jump or self._weak_mark(history, damage)
        if mark is None or math.isnan(damage.part):
            return mark, "info"
        return mark, self._severity(history, mark, damage, weak=jump is None)

    def _damage(self, history: History, gain: float, relaxed: float) -> _Damage:
        """What there is of it, against these parts of the thresholds."""
        loss, reference = recent_loss(history), _lost_level(history)
        part = math.nan if loss is None or reference is None else loss / (reference * relaxed)
        return _Damage(part, gain > self.dead_gain * relaxed, gain >= self.dead_most * relaxed)

    def _weak_mark(self, history: History, damage: _Damage) -> Jump | None:
        """An overshoot at any time where a layer was killed, or that most of one was; not after a bad batch.

        Nor where the weights have withered: then filters die of that.
        """
        if started_badly(history, self.bad_start) or decay_explains(history):
            return None
        spike = _bad_batch(history)
        overshot = any_overshoot(history, math.inf if spike is None else spike.step) if damage.killed else None
        if overshot is None and damage.crippled and spike is None:
            return Jump(1.0, 0, False, 0.1, overshoots=0.0)
        return overshot

    def _severity(self, history: History, jump: Jump, damage: _Damage, *, weak: bool) -> Severity:
        """How bad this damage is after this mark, at this time of the run."""
        part, killed, crippled = damage
        done, planned = steps_done(history), history.fact("planned_steps", math.inf)
        leapt, stuck = jump.overshoots is None, part > self.recovered
        later = early_end(history, 0) + self.late_step if weak else max(0, jump.step - self.early_steps)
        late = history.finished or done >= self.late_step + later
        # A jump of the logged loss alone may be a rough start, and is given until `late_step`.
        soon = leapt and done >= self.judge_step + later and (killed or jump.same_batch)
        if leapt and part > self.lost and done >= self.judge_step:
            return "critical"
        if (
            (stuck and (soon or (late and (killed or leapt))))
            or (part > self.crippled and crippled and done >= self.late_step and not warming_up(history))
            or (part > self.hampered and killed and leapt and late)
            or (part > self.halfway and (killed or leapt) and done >= max(planned / 2, self.late_step + later))
            or (part > self.at_end and killed and history.finished and self._hopeless(history, part))
        ):
            return "critical" if stuck else "warning"
        return "info"

    def _hopeless(self, history: History, part: float) -> bool:
        """Whether even three times the steps would not do, as far as can be foreseen."""
        seen = forecast_of(history, _LONGER)
        return seen is None or seen.later > self.hopeless * seen.now / part

    def _alert(self, history: History, jump: Jump, severity: Severity, killed: Death | None) -> Alert:
        bad, broken, overshoots = is_problem(severity), broken_since(history), jump.overshoots
        value, threshold = jump.factor, self.jump if jump.same_batch else self.logged_jump
        if overshoots is not None:
            value, threshold = overshoots, OVERSHOOT_SHARE
        message = f"{describe(jump)}{_outcome(history, killed, bad=bad)}."
        if overshoots == 0.0 and killed is not None:
            value, threshold = killed.gain, self.dead_most
            message = f"{_deaths(killed)}, and the loss is {_level(history)}."
        evidence = _evidence(history, jump)
        if bad:
            evidence["advised_rate_factor"] = jump.rate_factor
        return Alert(
            rule=self.name,
            severity=severity,
            value=value,
            threshold=threshold,
            cause="learning rate" if bad else "catapult",
            message=message,
            advice=_advice(history, jump) if bad else _NOTHING if killed is None else _SEE_FILTERS,
            evidence=evidence,
            alternatives=[
                *(["a bad batch or a loss that can overflow"] if broken is not None else []),
                *(["inputs that are not normalised"] if bad and inputs_blamed(history) else []),
            ],
            source=SOURCE,
        )

    def find_jump(self, history: History, broken: int | None) -> Jump | None:
        """The early jump, or the one that ended in a NaN; None if there is none or the start is to blame."""
        if started_badly(history, self.bad_start):
            return None
        jump = early_jump(history, same_batch=self.jump, logged=self.logged_jump, steps=self.early_steps)
        if jump is None and broken is not None:
            return batch_jump(history, broken - BEFORE_NAN, broken, self.jump)
        return jump

    def _collapsed(self, history: History, level: float) -> list[Alert]:
        """At most one, of a run that had learned and has lost it."""
        guess, loss = guess_loss(history), recent_loss(history)
        lowest = collapsed_to(history, level)
        if guess is None or loss is None or lowest is None or broken_since(history) is not None or _bad_batch(history):
            return []
        alert = Alert(
            rule=self.name,
            severity="critical",
            value=loss,
            threshold=self.recovered * guess,
            cause="learning rate",
            message=f"The loss was down at {lowest:.3g} and is back at {loss:.3g}, where a guess has {guess:.3g}.",
            advice="Go back to an earlier checkpoint and divide the learning rate by about 3, or clip the gradients.",
            evidence={"lowest_loss": lowest, "loss": loss, "reference_loss": guess},
            alternatives=[
                "data or a loss that changed at that time",
                "a stretch of bad batches",
                "weights that grow without weight decay",
            ],
            source=SOURCE,
        )
        return [alert]


def _bad_batch(history: History) -> Spike | None:
    """The one that may be behind it all; `gradient_spike` speaks of it."""
    spike = find_spike(history, _SPIKE)
    return None if spike is None or spike.rising else spike


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


def _outcome(history: History, killed: Death | None, *, bad: bool) -> str:
    broken = broken_since(history)
    if broken is not None:
        return f", and it is no number since step {broken}"
    parts = [f"it is {_level(history)}"] if bad else []
    parts += [] if killed is None else [_deaths(killed)]
    return f", and {' and '.join(parts)}" if parts else ", and then it recovered (a catapult)"


def _level(history: History) -> str:
    return f"{recent_loss(history):.3g} where nothing learned means {_lost_level(history):.3g}"


def _deaths(killed: Death) -> str:
    return f"{killed.gain:.0%} of the filters of {killed.layer} died since the start"


_NOTHING = "Nothing to do; with a rate much above this one the run would fail."
_SEE_FILTERS = "The loss got over it, the filters did not: see dead_filters."


def _advice(history: History, jump: Jump) -> str:
    past = [point.value for point in history.finite("learning_rate") if point.step <= jump.step] or [math.nan]
    target = f", to about {past[-1] * jump.rate_factor:.1e}" if past[-1] > 0 else ""
    lower = f"divide the learning rate by about {1 / jump.rate_factor:.0f}{target}, or warm it up."
    mean, deviation = history.fact("input_mean", 0.0), history.fact("input_std", 1.0)
    if not (inputs_blamed(history) and math.isfinite(mean) and math.isfinite(deviation)):
        return lower[0].upper() + lower[1:]
    first = f"Normalise the images first: subtract {mean:.3g} and divide by {deviation:.3g}."
    return f"{first} If that is not enough, {lower}"


def _evidence(history: History, jump: Jump) -> dict[str, float]:
    ratios = [point.value for point in history.finite("step_ratio") if point.step <= jump.step + 20]
    early = sum(ratio < 0 for ratio in ratios) / len(ratios) if ratios else None
    leapt = jump.overshoots is None
    numbers = {
        "jump": jump.factor if leapt else None,
        "jump_step": float(jump.step) if leapt else None,
        "same_batch": float(jump.same_batch) if leapt or jump.overshoots else None,
        "loss": recent_loss(history),
        "reference_loss": reference_loss(history),
        "dead_gain": max((death.gain for death in deaths(history)), default=None),
        "overshoot_fraction": early if leapt else jump.overshoots,
    }
    return {name: value for name, value in numbers.items() if value is not None}
