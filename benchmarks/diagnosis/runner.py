"""Runs what is missing, in processes of one thread each; every finished run is one line of JSON at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.diagnosis.replay import write_history
from benchmarks.diagnosis.spec import Spec

RECORDS, PLAN = "runs.jsonl", "plan.json"
Record = dict[str, Any]


def read_records(directory: Path, name: str = RECORDS) -> list[Record]:
    """What has been run. A last line that was cut off by an interrupt is left out, and its run is done again."""
    path = directory / name
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def read_plan(directory: Path) -> dict[str, str]:
    """The cell of each run of the suite, by key, whether it has been run yet or not."""
    plan: dict[str, str] = json.loads((directory / PLAN).read_text())
    return plan


def missing(specs: Sequence[Spec], directory: Path, name: str = RECORDS) -> list[Spec]:
    """The runs that have no line yet, in order."""
    done = {record["key"] for record in read_records(directory, name)}
    return [spec for spec in specs if spec.key not in done]


def run_all(  # noqa: PLR0913
    specs: Sequence[Spec],
    directory: Path,
    *,
    jobs: int = 2,
    hours: float = 4.0,
    train: Callable[[Spec], Record] | None = None,
    name: str = RECORDS,
) -> int:
    """Runs what is missing and returns how many runs failed; those are tried again the next time.

    Args:
        specs: The suite.
        directory: Gets `runs.jsonl`, `plan.json` and `histories/`.
        jobs: Processes; 0 runs in this one.
        hours: No run is started later than this.
        train: From a specification to its record; by default `train.run`.
        name: The file that gets the lines. Only that of the suite itself gets a plan.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _end_last_line(directory / name)
    if name == RECORDS:
        (directory / PLAN).write_text(json.dumps({spec.key: spec.cell for spec in specs}))
    end = time.monotonic() + 3600 * hours
    todo, failures = missing(specs, directory, name), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times) as progress:
        task = progress.add_task("runs", total=len(specs), completed=len(specs) - len(todo))
        for spec, outcome in _outcomes(todo, train or _train, jobs, end):
            if isinstance(outcome, Exception):
                failures += 1
                print(f"failed: {spec.name}: {type(outcome).__name__}: {outcome}", file=sys.stderr)
            else:
                _keep(outcome, directory, name)
            progress.update(task, advance=1, description=spec.name)
    return failures


def _outcomes(todo: list[Spec], train: Callable[[Spec], Record], jobs: int, end: float) -> Any:
    """Pairs of a specification and its record, or the exception, as they come; at most `jobs` are ever under way."""
    if jobs == 0:
        for spec in todo:
            if time.monotonic() > end:
                return
            yield spec, _attempt(train, spec)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the children when they import torch
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = iter(todo)
        running: dict[Future[Record], Spec] = {}
        while True:
            while len(running) < jobs and time.monotonic() < end and (following := next(waiting, None)) is not None:
                running[pool.submit(train, following)] = following
            if not running:
                return
            finished: set[Future[Record]] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                yield running.pop(future), future.exception() or future.result()


def _attempt(train: Callable[[Spec], Record], spec: Spec) -> Record | Exception:
    try:
        return train(spec)
    except Exception as error:
        return error


def _train(spec: Spec) -> Record:
    from benchmarks.diagnosis.train import run  # imported in the process that trains

    return run(spec)


def _keep(record: Record, directory: Path, name: str) -> None:
    """The history goes to a file of its own: it is large, and only `replay` needs it."""
    history = record.pop("history", None)
    if history is not None:
        write_history(history, directory, record["key"])
    with (directory / name).open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _end_last_line(path: Path) -> None:
    """A line that was cut off must not swallow the next one."""
    if path.exists() and (text := path.read_text()) and not text.endswith("\n"):
        path.write_text(text + "\n")
