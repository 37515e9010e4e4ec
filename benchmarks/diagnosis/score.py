"""Figures: recall, precision, false alarms, wrong causes, delays; all from labelled runs, nothing is trained here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.diagnosis.faults import ONSET
from benchmarks.diagnosis.labels import LABELLED, Labelled, cause_of
from lightning_interp.rules import default_rules

Z95 = 1.959963984540054
SEVERITIES = ("info", "warning", "critical")
SOON, DAMAGE_BY = 100, 50


class Interval(NamedTuple):
    """A share with its 95 % Wilson interval; NaN where there is nothing to count."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Part of the total."""
        return self.hits / self.total if self.total else math.nan


class RuleScore(NamedTuple):
    """How one rule did.

    Attributes:
        recall: Of the runs with the fault, those where it spoke.
        precision: Of the runs where it spoke and whose label is known, those with the fault.
        false_alarms: Of the healthy runs, those where it spoke.
        ambiguous: Runs left out, where its label is neither.
        delay: Median steps from the fault to the first alert, in the runs found.
    """

    recall: Interval
    precision: Interval
    false_alarms: Interval
    ambiguous: int
    delay: float


def wilson(hits: int, total: int, z: float = Z95) -> Interval:
    """The Wilson score interval of a binomial share (Wilson 1927).

    Example:
        >>> interval = wilson(19, 20)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.764, 0.991)
    """
    if total == 0:
        return Interval(0, 0, math.nan, math.nan)
    share, square = hits / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return Interval(hits, total, max(0.0, centre - half), min(1.0, centre + half))


def alerts_of(run: Labelled, rule: str | None = None, least: str = "warning") -> list[dict[str, Any]]:
    """The alerts that were raised, of at least this severity, oldest first."""
    level = SEVERITIES.index(least)
    return [
        alert
        for alert in run.record["alerts"]
        if alert["status"] == "raised"
        and rule in (None, alert["rule"])
        and SEVERITIES.index(alert["severity"]) >= level
    ]


def spoke(run: Labelled, rule: str) -> bool:
    """Whether the rule warned. A layer that was frozen on purpose is rightly mentioned as information only."""
    least = "info" if rule == "untrained_layer" and run.spec.fault == "frozen_layer" else "warning"
    return bool(alerts_of(run, rule, least))


def rule_score(runs: Sequence[Labelled], rule: str) -> RuleScore:
    """The figures of one rule."""
    positive = [run for run in runs if run.labels[rule]]
    negative = [run for run in runs if run.labels[rule] is False]
    healthy = [run for run in runs if run.faulty is False]
    found = [run for run in positive if spoke(run, rule)]
    wrong = [run for run in negative if spoke(run, rule)]
    delays = [delay for run in found if (delay := _delay(run, rule)) is not None]
    return RuleScore(
        wilson(len(found), len(positive)),
        wilson(len(found), len(found) + len(wrong)),
        wilson(sum(spoke(run, rule) for run in healthy), len(healthy)),
        len(runs) - len(positive) - len(negative),
        statistics.median(delays) if delays else math.nan,
    )


def _delay(run: Labelled, rule: str) -> int | None:
    steps = [alert["step"] for alert in alerts_of(run, rule, "info")]
    onset = ONSET if run.spec.fault in {"corrupt_batch", "nan_batch"} else 0
    return min(steps) - onset if steps else None


def false_alarms(runs: Iterable[Labelled]) -> Interval:
    """Of the healthy runs, those with any false alarm: a rule with a label that warned although it is negative."""
    healthy = [run for run in runs if run.faulty is False]
    return wilson(sum(any(false_rules(run)) for run in healthy), len(healthy))


def false_rules(run: Labelled) -> list[str]:
    """Rules that warned although their label is negative."""
    return [rule for rule in LABELLED if run.labels[rule] is False and spoke(run, rule)]


def primary(run: Labelled) -> dict[str, Any] | None:
    """The alert that is read first: of the greatest severity, of these the most urgent rule, of these the first."""
    alerts = alerts_of(run)
    if not alerts and run.spec.fault == "frozen_layer":
        alerts = alerts_of(run, "untrained_layer", "info")
    order = {rule.name: i for i, rule in enumerate(default_rules())}
    return min(
        alerts,
        key=lambda a: (-SEVERITIES.index(a["severity"]), order.get(a["rule"], len(order)), a["step"]),
        default=None,
    )


def right_cause(run: Labelled) -> bool:
    """Whether the primary alert names a cause that is right."""
    alert = primary(run)
    if alert is None:
        return False
    return cause_of(alert["rule"], alert["cause"]) in run.causes


def causes(runs: Iterable[Labelled]) -> Interval:
    """Of the faulty runs in which anything was said, those whose primary alert names a right cause."""
    found = [run for run in runs if run.faulty and primary(run) is not None]
    return wilson(sum(map(right_cause, found)), len(found))


def wrong_causes(runs: Iterable[Labelled], rule: str) -> Interval:
    """Of the faulty runs whose primary alert is of this rule, those in which it names a cause that is not right."""
    led = [run for run in runs if run.faulty and (alert := primary(run)) is not None and alert["rule"] == rule]
    return wilson(sum(not right_cause(run) for run in led), len(led))


def damaged_early(run: Labelled) -> bool:
    """Whether the loss leapt to half as much again over the first one, or to NaN, in the first 50 steps."""
    early = run.record["early"][:DAMAGE_BY]
    first = early[0]
    return first is not None and any(loss is None or loss > 1.5 * max(first, run.record["guess"]) for loss in early)


def named_soon(runs: Iterable[Labelled]) -> Interval:
    """Of the runs whose too-high rate does its damage in the first 50 steps, those where it is named by step 100."""
    rule = "learning_rate_too_high"
    hurt = [run for run in runs if run.labels[rule] and damaged_early(run)]
    return wilson(sum(any(a["step"] <= SOON for a in alerts_of(run, rule)) for run in hurt), len(hurt))


def failures(runs: Iterable[Labelled]) -> list[tuple[Labelled, str]]:
    """Every wrong verdict, as a run and a word: missed or false with the rule, or the wrong cause."""
    found = []
    for run in runs:
        found += [(run, f"missed {rule}") for rule in LABELLED if run.labels[rule] and not spoke(run, rule)]
        found += [(run, f"false {rule}") for rule in false_rules(run)]
        alert = primary(run)
        if run.faulty and alert is not None and not right_cause(run):
            found.append((run, f"wrong cause: {cause_of(alert['rule'], alert['cause'])}"))
    return found
