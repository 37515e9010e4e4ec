"""Which of the judged runs the peers see: a fixed sample, at least half of it healthy, with every kind of fault."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain, zip_longest

from benchmarks.diagnosis.labels import RATE_RULES, Labelled

MAIN = (*RATE_RULES, "dead_filters")


def sample(runs: Sequence[Labelled], count: int) -> list[Labelled]:
    """Up to `count` runs whose label is known; a run's place in its group hangs on its key alone.

    Half of them are healthy, more where there are not enough faulty ones. The faulty ones are taken in turn from those
    with each of the four main faults and from those with each injected fault.
    """
    ordered = sorted(runs, key=lambda run: hashlib.sha256(run.spec.key.encode()).hexdigest())
    healthy = [run for run in ordered if run.faulty is False]
    faulty = _in_turn([_main(ordered), _injected(ordered)])
    half = faulty[: count // 2]
    return healthy[: count - len(half)] + half


def _main(ordered: Sequence[Labelled]) -> list[Labelled]:
    natural = [run for run in ordered if run.faulty and run.spec.fault == "none"]
    groups = [[run for run in natural if run.labels[rule]] for rule in MAIN]
    return _in_turn([*groups, [run for run in natural if not any(run.labels[rule] for rule in MAIN)]])


def _injected(ordered: Sequence[Labelled]) -> list[Labelled]:
    found = [run for run in ordered if run.faulty and run.spec.fault != "none"]
    faults = sorted({run.spec.fault for run in found})
    return _in_turn([[run for run in found if run.spec.fault == fault] for fault in faults])


def _in_turn(groups: Sequence[Sequence[Labelled]]) -> list[Labelled]:
    """One of each group, then the next of each; nothing twice."""
    runs = {run.spec.key: run for run in chain.from_iterable(zip_longest(*groups)) if run is not None}
    return list(runs.values())
