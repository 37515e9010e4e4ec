"""Judges finished runs anew, by the rules as they are now, from the numbers that were kept: seconds, not hours."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from lightning_interp.callbacks.schedule import thinning_due
from lightning_interp.rules import AlertBook, History, Point, Rule, Series, default_rules

HISTORIES = "histories"
FIRST, EVERY = (20, 60, 100), 50  # when `Alerts` looks
RECORDED = 50  # steps that were all probed in the runs of the suite
OF_PROBES = (
    "loss_before", "loss_after", "step_ratio", "learning_rate", "gradient_norm", "update_norm", "update_ratio",
    "weight_norm",
)  # fmt: skip
_KEPT = ("rule", "severity", "status", "layer", "step", "value", "cause", "message", "advice", "evidence")


def write_history(history: dict[str, Any], directory: Path, key: str) -> None:
    """Keeps the state of a history."""
    (directory / HISTORIES).mkdir(exist_ok=True)
    with gzip.open(directory / HISTORIES / f"{key}.json.gz", "wt", compresslevel=4) as file:
        json.dump(history, file)


def read_history(directory: Path, key: str) -> History:
    """The history of a finished run."""
    history = History()
    with gzip.open(directory / HISTORIES / f"{key}.json.gz", "rt") as file:
        history.load_state_dict(json.load(file))
    return history


def replay(
    records: Iterable[dict[str, Any]], directory: Path, jobs: int = 1, *, dense_steps: int | None = None
) -> list[dict[str, Any]]:
    """The records with the alerts that the present default rules would have raised, asked in so many processes.

    With `dense_steps`: as if so many steps at the start had all been probed, and of the others those on the bridge of
    `TrainingDynamics`; later probes stay as they were recorded.

    Exact only for what does not depend on facts noted late in the run, which are known from the beginning here, and as
    long as a history keeps each loss: of more than a thousand steps the older ones are means of neighbours.
    """
    records = list(records)
    if jobs <= 1:
        said = [_ask(directory, record["key"], record["steps"], dense_steps) for record in records]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            runs = [[record[name] for record in records] for name in ("key", "steps")]
            said = list(pool.map(_ask, repeat(directory), *runs, repeat(dense_steps), chunksize=16))
    return [{**record, "alerts": alerts} for record, alerts in zip(records, said, strict=True)]


def _ask(directory: Path, key: str, steps: int, dense_steps: int | None) -> list[dict[str, Any]]:
    history = read_history(directory, key)
    return judge(history if dense_steps is None else thinned(history, dense_steps), default_rules(), steps)


def thinned(history: History, dense_steps: int) -> History:
    """Without what only the probes tell that a smaller `dense_steps` leaves out of the first 50 steps."""
    due = {step for step in range(RECORDED) if step < dense_steps or thinning_due(step, dense=dense_steps, every=200)}
    left_out = set(range(RECORDED)) - due
    known = History(facts=dict(history.facts), step=history.step, epoch=history.epoch, finished=history.finished)
    for (name, layer), series in history.series.items():
        points = [Point(*pair) for pair in zip(series.steps, series.values, strict=True)]
        kept = [point for point in points if point.step not in left_out] if name in OF_PROBES else points
        if kept:
            known.series[name, layer] = Series(points=kept)
    for (fact, layer), step in history.facts.items():
        if fact == "non_finite_step" and layer is not None and step in left_out:  # of a layer: found at the next probe
            known.facts[fact, layer] = float(min((each for each in due if each > step), default=RECORDED))
    return known


def judge(history: History, rules: Sequence[Rule], steps: int) -> list[dict[str, Any]]:
    """What the rules raise and clear while the run goes on, at the steps at which `Alerts` looks."""
    return judge_moments(moments(history, steps), rules)


def moments(history: History, steps: int) -> list[History]:
    """What was known at each of these steps, and at the end."""
    windows = {step for (name, _), s in history.series.items() if name.startswith("dead") for step in s.steps}
    looks = sorted({*FIRST, *range(FIRST[-1], steps, EVERY), *windows, steps - 1})
    running = [until(history, step, finished=False) for step in looks if step < steps]
    return [*running, until(history, steps - 1, finished=history.finished)]


def judge_moments(known: Iterable[History], rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """What the rules raise and clear on these histories, which must be of one run, in order."""
    book = AlertBook(list(rules))
    for history in known:
        book.update(history)
        if book.errors:
            raise book.errors[0][1]
    return [{name: asdict(alert)[name] for name in _KEPT} for alert in book.history]


def until(history: History, step: int, *, finished: bool) -> History:
    """What was known at a step."""
    known = History(facts=dict(history.facts), step=step, finished=finished)
    if history.fact("non_finite_step", -1.0) > step:
        known.facts = {key: value for key, value in known.facts.items() if key[0] != "non_finite_step"}
    for key, series in history.series.items():
        steps = series.steps
        pairs = zip(steps, series.values, strict=True)
        known.series[key] = Series(points=[Point(*pair) for pair in islice(pairs, bisect_right(steps, step))])
    known.step = step
    return known
