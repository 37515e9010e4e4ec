"""The report in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.diagnosis.cells import is_extra, is_fresh, is_held_out
from benchmarks.diagnosis.labels import LABELLED, Labelled, label_all
from benchmarks.diagnosis.score import (
    Interval,
    alerts_of,
    causes,
    failures,
    false_alarms,
    named_soon,
    primary,
    rule_score,
    wrong_causes,
)

MAX_FAILURES = 400


def report(records: Iterable[Mapping[str, Any]], plan: Mapping[str, str] | None = None) -> str:
    """All tables, from the lines of the runs; `plan` as in `label_all`."""
    records = list(records)
    records = [record for record in records if plan is None or record["key"] in plan]
    everything = label_all(records, plan)
    fresh, held_out = ([run for run in everything if kind(run.spec)] for kind in (is_fresh, is_held_out))
    runs = [run for run in everything if not is_fresh(run.spec) and not is_held_out(run.spec)]
    parts = [_summary(everything, records)]
    for title, group in (
        ("# Networks, data and optimizers that were added when the rules were finished", fresh),
        ("# Those on which no threshold was chosen, but failures were looked at", held_out),
    ):
        parts += [title, _summary(group, records), _rules(group), _failures(group)] if group else []
    parts += [
        "# Those on which thresholds were chosen",
        _summary(runs, records),
        _rules(runs),
        _architectures(runs),
        _left_out(runs),
        _faults(runs),
        _failures(runs),
    ]
    return "\n\n".join(filter(None, parts))


def percent(interval: Interval) -> str:
    """For example `95 % (19/20; 76-99)`.

    Example:
        >>> from benchmarks.diagnosis.score import wilson
        >>> percent(wilson(19, 20)), percent(wilson(0, 0))
        ('95 % (19/20; 76-99)', '-')
    """
    if not interval.total:
        return "-"
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.share:.0f} % ({interval.hits}/{interval.total}; {low:.0f}-{high:.0f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _summary(runs: Sequence[Labelled], records: Sequence[Mapping[str, Any]]) -> str:
    kinds = Counter(run.faulty for run in runs)
    healthy, total = kinds[False], max(1, len(runs))
    extra = [run for run in runs if is_extra(run.spec)]
    minutes = sum(record["seconds"] for record in records) / 60
    rows = [
        ["runs judged; trained in all", f"{len(runs)}; {len(records)} ({minutes:.0f} process minutes)"],
        ["healthy; faulty; ambiguous", f"{healthy} ({100 * healthy / total:.0f} %); {kinds[True]}; {kinds[None]}"],
        ["healthy runs with a false alarm", percent(false_alarms(runs))],
        [
            "of them long versions, and runs without a ladder",
            percent(false_alarms(extra)),
        ],
        ["right primary cause, of the faulty runs in which something was said", percent(causes(runs))],
        ["too-high rate that strikes within 50 steps, named by step 100", percent(named_soon(runs))],
    ]
    return "## Summary\n\n" + table(["what", "how many"], rows)


def _rules(runs: Sequence[Labelled]) -> str:
    rows = []
    for rule in LABELLED:
        score = rule_score(runs, rule)
        delay = "-" if math.isnan(score.delay) else f"{score.delay:.0f}"
        row = [percent(score.recall), percent(score.precision), percent(score.false_alarms)]
        rows.append([f"`{rule}`", *row, percent(wrong_causes(runs, rule)), str(score.ambiguous), delay])
    head = ["rule", "recall", "precision", "of healthy runs", "wrong cause, where first", "ambiguous"]
    head.append("median steps to alert")
    return "## Rules, with 95 % Wilson intervals\n\n" + table(head, rows)


def _architectures(runs: Sequence[Labelled]) -> str:
    names = sorted({run.spec.architecture for run in runs})
    rows = []
    for rule in LABELLED:
        parts = [rule_score([run for run in runs if run.spec.architecture == name], rule) for name in names]
        cells = [f"{_short(part.recall)}; {_short(part.precision)}" for part in parts]
        rows.append([f"`{rule}`", *cells])
    alarms = [_short(false_alarms(run for run in runs if run.spec.architecture == name)) for name in names]
    rows.append(["false alarms in healthy runs", *alarms])
    return "## By architecture: recall; precision\n\n" + table(["rule", *names], rows)


def _left_out(runs: Sequence[Labelled]) -> str:
    """The thresholds are the same everywhere, so leaving one out says how much a figure hangs on one architecture."""
    names = sorted({run.spec.architecture for run in runs})
    rows = []
    for rule in LABELLED:
        scores = [rule_score([run for run in runs if run.spec.architecture != name], rule) for name in names]
        recall = [score.recall.share for score in scores if score.recall.total]
        precision = [score.precision.share for score in scores if score.precision.total]
        rows.append([f"`{rule}`", _range(recall), _range(precision)])
    return "## All architectures but one: lowest to highest\n\n" + table(["rule", "recall", "precision"], rows)


def _faults(runs: Sequence[Labelled]) -> str:
    """What was said to each injected fault: the verdict on it, and the primary alerts."""
    rows = []
    for fault in sorted({run.spec.fault for run in runs} - {"none"}):
        group = [run for run in runs if run.spec.fault == fault]
        heads = Counter(_head(run) for run in group)
        kinds = Counter(run.faulty for run in group)
        said = ", ".join(f"{head} {count}" for head, count in heads.most_common())
        rows.append([fault, f"{kinds[True]}; {kinds[False]}; {kinds[None]}", said])
    return "## Injected faults\n\n" + table(["fault", "harmful; harmless; ambiguous", "primary alert"], rows)


def _head(run: Labelled) -> str:
    alert = primary(run)
    return "nothing" if alert is None else f"{alert['rule']} ({alert['cause'] or 'no cause'})"


def _failures(runs: Sequence[Labelled]) -> str:
    found = failures(runs)
    rows = []
    for run, verdict in sorted(found, key=lambda pair: pair[1])[:MAX_FAILURES]:
        said = dict.fromkeys(f"{a['rule']}@{a['step']} {a['severity'][0]} {a['cause'] or ''}" for a in alerts_of(run))
        reached = "-" if run.progress is None else f"{run.progress:.2f}"
        dead = " ".join(f"{max(count):.2f}" for count in run.record["counts"])
        rows.append([verdict, run.spec.name, reached, dead, "; ".join(said) or "-", run.spec.key])
    more = f"\n\n{len(found) - MAX_FAILURES} more." if len(found) > MAX_FAILURES else ""
    head = ["verdict", "run", "progress", "dead or dormant", "alerts", "key"]
    return f"## Wrong verdicts: {len(found)}\n\n" + table(head, rows) + more


def _short(interval: Interval) -> str:
    return f"{interval.hits}/{interval.total}" if interval.total else "-"


def _range(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    return f"{100 * min(shares):.0f}-{100 * max(shares):.0f} %"
