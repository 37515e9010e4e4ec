"""The cure rate: faulty runs are trained anew with the advice of their primary alert, and judged like all others.

Healthy is a run of which nothing is wrong any more that was wrong with it, nor anything that brute force finds. No rule
is asked. Of every run:

- all losses are numbers, the first one is at most three times that of a guess, and every layer moves;
- less than a fifth of each layer is dead, or dormant, at the middle and the end.

Of a run without an injected fault, besides:

- its progress is at most 0.2 below the best that a run of its cell reached in the same number of epochs, unless all
  that was wrong was overfitting: whoever stops earlier, or learns from more images, ends at a higher training loss;
- if it was undertrained, its progress is at most 0.1 below that of its long version;
- it is not labelled as overfitting; if it was, its validation loss at the end is lower than before.

Of a run with an injected fault, besides, where its twin is the measure, and its own ills are forgiven:

- its progress is at most 0.2 below that of the twin;
- less than 2 % of the training labels are wrong; the bad batch is not among those that it was trained on;
- with few images: not labelled as overfitting, by the twin with all of them, and better in validation than before.

What is not known, as the progress in a cell whose ladder is not finished, is not asked. An alert without a proposal
that can be applied cures nothing, nor does silence. A second round applies the primary alert of the cured run on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.diagnosis.cells import is_held_out, is_sampled
from benchmarks.diagnosis.faults import ONSET
from benchmarks.diagnosis.labels import LABELLED, RATE_RULES, Labelled, label_all, memorised, overfitting, progress
from benchmarks.diagnosis.remedies import NONE, arguments, remedy_for
from benchmarks.diagnosis.replay import replay
from benchmarks.diagnosis.runner import Record, read_plan, read_records, run_all
from benchmarks.diagnosis.score import primary, wilson
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.tables import percent, table

CURES = "cures.jsonl"
BEHIND, BEHIND_LONG, DEAD, WRONG_LABELS, BAD_START = 0.2, 0.1, 0.2, 0.02, 3.0


@dataclass
class Patient:
    """A faulty run and what was tried.

    Attributes:
        run: As labelled, with the alerts of the present rules.
        remedies: One a round; what is done in all.
        records: Of the runs with them.
        ills: What is still wrong.
        healed: The round after which nothing was; 0 if that did not happen.
        open: Whether a run that was to be trained was not, or failed.
    """

    run: Labelled
    remedies: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    ills: list[str] = field(default_factory=lambda: ["nothing proposed"])
    healed: int = 0
    open: bool = False

    @property
    def spec(self) -> Spec:
        """Of the last run."""
        return replace(self.run.spec, remedy=self.remedies[-1]) if self.remedies else self.run.spec

    def prescribe(self) -> bool:
        """Adds the next remedy; returns whether there is one."""
        last = replace(self.run, record=(self.records or [self.run.record])[-1])
        text = remedy_for(primary(last), last.record["alerts"], self.spec.remedy)
        self.remedies += [text] if text is not None else []
        return text is not None


class Judge:
    """Compares cured runs with the others of their cell."""

    def __init__(self, records: Iterable[Mapping[str, Any]], runs: Sequence[Labelled]) -> None:
        self._runs = {run.spec.key: run for run in runs}
        self._long: dict[str, float] = {}  # loss by the key of the short version
        self._best: dict[str, float] = {}  # loss by cell
        self._short: dict[str, float] = {}  # progress by cell
        for record in records:
            spec = Spec.from_dict(record["spec"])
            if spec.long and record["final"] is not None:
                self._long[replace(spec, long=False).key] = record["final"]
                self._best[spec.cell] = min(record["final"], self._best.get(spec.cell, record["final"]))
        for run in runs:
            if run.spec.fault == "none" and run.progress is not None and not run.spec.long:
                self._short[run.spec.cell] = max(run.progress, self._short.get(run.spec.cell, 0.0))

    def reached(self, run: Labelled, record: Mapping[str, Any]) -> float | None:
        """Progress of a cured run, by the measure of its cell; None where that is not known."""
        if run.progress is None:
            return None
        return progress(record["final"], record["guess"], self._best[run.spec.cell])

    def ills(self, run: Labelled, record: Mapping[str, Any]) -> list[str]:
        """What is wrong with the cured version of a run."""
        if run.spec.fault == "none":
            return list(dict.fromkeys([*brute(record), *self._natural(run, record)]))
        twin = self._runs.get(run.spec.twin)
        forgiven = brute(twin.record) if twin is not None else []
        found = [ill for ill in brute(record) if ill not in forgiven]
        return list(dict.fromkeys([*found, *self._injected(run, record, twin)]))

    def _natural(self, run: Labelled, record: Mapping[str, Any]) -> list[str]:
        found = []
        reached, was = self.reached(run, record), {rule for rule in LABELLED if run.labels[rule]}
        if reached is not None and was != {"overfitting"} and reached < self._short[run.spec.cell] - BEHIND:
            found.append("progress")
        long = self._long.get(run.spec.key)
        if reached is not None and run.labels["undertrained"] and long is not None:
            best = self._best[run.spec.cell]
            found += ["still undertrained"] if reached < progress(long, record["guess"], best) - BEHIND_LONG else []
        if overfitting(record["val_losses"], record["final"], record["guess"]):
            found.append("overfitting")
        if run.labels["overfitting"] and not _validates_better(record, run.record):
            found.append("validation no better")
        return found

    def _injected(self, run: Labelled, record: Mapping[str, Any], twin: Labelled | None) -> list[str]:
        fault, found = run.spec.fault, []
        reached = self.reached(run, record)
        if fault == "few_images":
            found += ["overfitting"] if memorised(record, twin.record if twin else None) else []
            found += [] if _validates_better(record, run.record) else ["validation no better"]
        elif reached is not None and twin is not None and twin.progress is not None:
            found += ["progress"] if reached < twin.progress - BEHIND else []
        if fault.startswith("labels_") and record["wrong_labels"] >= WRONG_LABELS:
            found.append(f"{100 * record['wrong_labels']:.1f} % wrong labels")
        if fault == "corrupt_batch" and str(ONSET) not in arguments(Spec.from_dict(record["spec"]).remedy, "skip"):
            found.append("bad batch")
        return found


def brute(record: Mapping[str, Any]) -> list[str]:
    """What needs no other run to be seen."""
    if not record["finite"]:
        return ["not finite"]  # what is no number is neither dead nor alive
    late = record["counts"][1:] or record["counts"]
    first = record["early"][0]
    found = [name for i, name in enumerate(("dead", "dormant")) if max((c[i] for c in late), default=0.0) >= DEAD]
    found += ["untrained layer"] if record["still"] else []
    return found + (["bad start"] if first is None or first > BAD_START * record["guess"] else [])


def _validates_better(record: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    now, then = record["val_losses"][-1:], before["val_losses"][-1:]
    if now in ([], [None]):
        return False
    return then in ([], [None]) or now < then


def cure(  # noqa: PLR0913 - options, by keyword
    directory: Path,
    *,
    rounds: int = 2,
    jobs: int = 2,
    hours: float = 4.0,
    count: int | None = None,
    train: Callable[[Spec], Record] | None = None,
) -> tuple[str, int]:
    """Trains what is missing in `cures.jsonl`, and returns the tables and how many runs failed.

    Args:
        directory: Of a finished suite.
        rounds: How often the advice of what is still ill is followed.
        jobs: Processes.
        hours: No run is started later than this.
        count: So many faulty runs, chosen by their keys; None for all.
        train: From a specification to its record; by default `train.run`.
    """
    records, end, failed = read_records(directory), time.monotonic() + 3600 * hours, 0
    runs = [run for run in label_all(records, read_plan(directory)) if is_sampled(run.spec)]
    faulty = sorted((run for run in runs if run.faulty), key=lambda run: sha256(run.spec.key.encode()).digest())
    faulty = faulty[:count]
    judged = zip(faulty, replay((run.record for run in faulty), directory), strict=True)
    patients = [Patient(replace(run, record=record)) for run, record in judged]
    judge, ill = Judge(records, runs), patients
    for number in range(1, rounds + 1):
        ill = [patient for patient in ill if patient.prescribe()]
        specs = list(dict.fromkeys(patient.spec for patient in ill))
        left = max(0.0, end - time.monotonic()) / 3600
        failed += run_all(specs, directory, jobs=jobs, hours=left, train=train, name=CURES)
        done = {record["key"]: record for record in read_records(directory, CURES)}
        for patient in ill:
            _take(patient, done.get(patient.spec.key), directory, judge, number)
        ill = [patient for patient in ill if not patient.healed and not patient.open]
    return tables(patients, judge, rounds), failed


def _take(patient: Patient, record: Record | None, directory: Path, judge: Judge, number: int) -> None:
    """Judges the run of a round; its alerts are needed only if there is more to do."""
    if record is None:
        patient.open = True
        return
    patient.ills = judge.ills(patient.run, record)
    patient.healed = 0 if patient.ills else number
    patient.records += replay([record], directory) if patient.ills else [record]


def kind(run: Labelled) -> str:
    """What was injected, or else the first thing that is wrong; a rate before what it does."""
    if run.spec.fault != "none":
        return run.spec.fault
    return next(rule for rule in (*RATE_RULES, *LABELLED) if run.labels[rule])


def tables(patients: Sequence[Patient], judge: Judge, rounds: int) -> str:
    """Cure rates by kind and in all, and the runs that were not cured."""
    closed = [patient for patient in patients if not patient.open]
    groups = {name: [p for p in closed if kind(p.run) == name] for name in sorted({kind(p.run) for p in closed})}
    groups["all"] = closed
    groups["all with something proposed"] = [p for p in closed if p.remedies]
    groups["all of the held-out networks"] = [p for p in closed if is_held_out(p.run.spec)]
    rows = []
    for name, group in groups.items():
        healed = [sum(0 < p.healed <= number for p in group) for number in range(1, rounds + 1)]
        shares = [percent(wilson(count, len(group))) for count in healed]
        rows.append([name, str(len(group)), str(sum(bool(p.remedies) for p in group)), *shares])
    head = ["what was wrong", "runs", "with a remedy", *(f"healthy after round {i}" for i in range(1, rounds + 1))]
    left = f"\n\n{len(patients) - len(closed)} not trained yet." if len(patients) > len(closed) else ""
    return f"## Cured by their advice\n\n{table(head, rows)}{left}\n\n{_not_cured(closed, judge)}"


def _not_cured(patients: Sequence[Patient], judge: Judge) -> str:
    rows = []
    for patient in sorted((p for p in patients if not p.healed), key=lambda p: (kind(p.run), p.run.spec.name)):
        run, alert = patient.run, primary(patient.run)
        said = "nothing" if alert is None else f"{alert['rule']} ({alert['cause'] or 'no cause'})"
        reached = [judge.reached(run, record) for record in patient.records]
        path = " -> ".join("-" if value is None else f"{value:.2f}" for value in (run.progress, *reached))
        tried = " then ".join(patient.remedies) or NONE
        rows.append([kind(run), run.spec.name, said, tried, path, ", ".join(patient.ills), run.spec.key])
    head = ["what was wrong", "run", "primary alert", "remedy", "progress", "still wrong", "key"]
    return f"## Not cured: {len(rows)}\n\n{table(head, rows)}"
