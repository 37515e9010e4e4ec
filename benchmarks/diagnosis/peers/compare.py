"""`python -m benchmarks.diagnosis peers DIR`: a sample of the finished runs, trained anew with the peers on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.diagnosis.cells import is_sampled
from benchmarks.diagnosis.labels import label_all
from benchmarks.diagnosis.peers import table
from benchmarks.diagnosis.peers.observe import run
from benchmarks.diagnosis.peers.sample import sample
from benchmarks.diagnosis.replay import replay
from benchmarks.diagnosis.runner import Record, read_plan, read_records, run_all
from benchmarks.diagnosis.spec import Spec

LINES = "peers.jsonl"


def compare(
    directory: Path,
    *,
    count: int = 200,
    jobs: int = 2,
    hours: float = 4.0,
    train: Callable[[Spec], Record] = run,
) -> tuple[str, int]:
    """Trains what is missing in `DIR/peers.jsonl`.

    Returns:
        The tables, and how many runs failed.
    """
    runs = [run for run in label_all(read_records(directory), read_plan(directory)) if is_sampled(run.spec)]
    chosen = sample(runs, count)
    judged = zip(chosen, replay((each.record for each in chosen), directory), strict=True)
    # What our rules say now, not what they said when the run was trained.
    chosen = [replace(each, record=record) for each, record in judged]
    specs = [labelled.spec for labelled in chosen]
    failed = run_all(specs, directory, jobs=jobs, hours=hours, train=train, name=LINES)
    return table.report(chosen, read_records(directory, LINES)), failed
