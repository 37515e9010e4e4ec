"""The peers and ours side by side, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.diagnosis.labels import LABELLED, Labelled
from benchmarks.diagnosis.peers.finding import Finding
from benchmarks.diagnosis.peers.observe import RULES
from benchmarks.diagnosis.peers.sample import MAIN
from benchmarks.diagnosis.score import Interval, primary, spoke, wilson
from benchmarks.diagnosis.tables import percent, table

OURS = "lightning-interp"


class Verdict(NamedTuple):
    """What one tool said of one run: the rules of ours that it comes to, and whether it said anything at all."""

    run: Labelled
    rules: frozenset[str]
    anything: bool


def report(runs: Iterable[Labelled], lines: Iterable[Mapping[str, Any]]) -> str:
    """The tables for the runs that the peers have seen."""
    by_key = {line["key"]: line["peers"] for line in lines}
    seen = [run for run in runs if run.spec.key in by_key]
    verdicts = {OURS: [ours(run) for run in seen]}
    for name in RULES:
        said = [(run, by_key[run.spec.key][name]) for run in seen if name in by_key[run.spec.key]]
        if said:
            verdicts[name] = [theirs(run, (Finding(*finding) for finding in findings)) for run, findings in said]
    healthy = sum(run.faulty is False for run in seen)
    head = f"## Peers on the same {len(seen)} runs, {healthy} of them healthy, with 95 % Wilson intervals"
    absent = ", ".join(name for name in RULES if name not in verdicts)
    notes = [f"Not installed when the runs were trained, so left out: {absent}."] if absent else []
    dash = "a dash: it has no such rule; 0/0: nothing to count"
    figures = [f"### {kind} ({dash})\n\n{_by_rule(verdicts, figure)}" for kind, figure in FIGURES]
    return "\n\n".join([head, *notes, _summary(verdicts), *figures])


def ours(run: Labelled) -> Verdict:
    """By the same measure as in the other tables: warnings and worse."""
    return Verdict(run, frozenset(rule for rule in LABELLED if spoke(run, rule)), primary(run) is not None)


def theirs(run: Labelled, findings: Iterable[Finding]) -> Verdict:
    """From a peer's findings."""
    said = list(findings)
    return Verdict(run, frozenset(f.rule for f in said if f.rule is not None), bool(said))


def false_alarms(verdicts: Sequence[Verdict]) -> Interval:
    """Of the healthy runs, those of which it said something that their label calls false."""
    healthy = [v for v in verdicts if v.run.faulty is False]
    return wilson(sum(any(v.run.labels.get(rule) is False for rule in v.rules) for v in healthy), len(healthy))


def anything(verdicts: Sequence[Verdict], faulty: bool) -> Interval:
    """Of the faulty or the healthy runs, those of which it said anything, right or wrong, with a label or without."""
    chosen = [v for v in verdicts if v.run.faulty is faulty]
    return wilson(sum(v.anything for v in chosen), len(chosen))


def recall(verdicts: Sequence[Verdict], rule: str) -> Interval:
    """Of the runs with the fault, those of which it said so."""
    positive = [v for v in verdicts if v.run.labels[rule]]
    return wilson(sum(rule in v.rules for v in positive), len(positive))


def precision(verdicts: Sequence[Verdict], rule: str) -> Interval:
    """Of the runs of which it said so and whose label is known, those with the fault."""
    said = [v for v in verdicts if rule in v.rules and v.run.labels[rule] is not None]
    return wilson(sum(bool(v.run.labels[rule]) for v in said), len(said))


FIGURES = (("Recall", recall), ("Precision", precision))


def _summary(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    rows = [
        [name, percent(false_alarms(said)), percent(anything(said, False)), percent(anything(said, True))]
        for name, said in verdicts.items()
    ]
    head = ["tool", "false alarms in healthy runs", "healthy runs with any finding", "faulty runs with any finding"]
    return table(head, rows)


def _by_rule(verdicts: Mapping[str, Sequence[Verdict]], figure: Callable[[Sequence[Verdict], str], Interval]) -> str:
    rows = []
    for name, said in verdicts.items():
        known = RULES.get(name, frozenset(MAIN))
        rows.append([name, *(_cell(figure(said, rule)) if rule in known else "-" for rule in MAIN)])
    return table(["tool", *(f"`{rule}`" for rule in MAIN)], rows)


def _cell(interval: Interval) -> str:
    """A rule that there is but never spoke must not look like one that there isn't."""
    return percent(interval) if interval.total else "0/0"
