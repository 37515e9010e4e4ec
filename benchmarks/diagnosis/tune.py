"""Leave one architecture out: thresholds chosen on all others, figures from the one that was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.diagnosis.cells import is_held_out, is_sampled
from benchmarks.diagnosis.labels import Labelled, label_all
from benchmarks.diagnosis.replay import judge_moments, moments, read_history
from benchmarks.diagnosis.runner import read_plan, read_records
from benchmarks.diagnosis.score import Interval, spoke, wilson
from benchmarks.diagnosis.tables import percent, table
from lightning_interp.rules import (
    DeadFiltersRule,
    History,
    LearningRateTooHighRule,
    LearningRateTooLowRule,
    Rule,
    UndertrainedRule,
)

# Each threshold at a smaller, the default, and a larger value.
GRIDS: dict[type[Rule], dict[str, tuple[float, ...]]] = {
    LearningRateTooHighRule: {"recovered": (0.8, 0.9, 1.0), "halfway": (0.5, 0.6, 0.7)},
    LearningRateTooLowRule: {"ratio": (0.9, 0.92, 0.96), "far_ratio": (0.8, 0.85, 0.9), "loss": (0.2, 0.3, 0.4)},
    UndertrainedRule: {"fall": (0.06, 0.09, 0.12), "certainty": (2.5, 3.0, 4.0)},
    DeadFiltersRule: {"warning": (0.2, 0.25, 0.3)},
}


def variants(kind: type[Rule]) -> list[Rule]:
    """The rule with every combination of the thresholds in its grid."""
    grid = GRIDS[kind]
    return [kind(**dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


def leave_one_out(runs: Sequence[Labelled], said: Mapping[str, Sequence[bool]], rule: str) -> tuple[Interval, Interval]:
    """Recall and precision over all left-out architectures.

    Args:
        runs: Labelled runs of several architectures.
        said: By key, whether each variant of the rule warned.
        rule: Its name.

    Returns:
        Recall and precision of the variant that did best on the others by F1; of equals the one in the middle, which
        is the furthest from where it would get worse.
    """
    hits = positives = spoken = 0
    count = len(next(iter(said.values())))
    for name in sorted({run.spec.architecture for run in runs}):
        others, left = (
            [run for run in runs if (run.spec.architecture == name) is out and run.labels[rule] is not None]
            for out in (False, True)
        )
        scores = [_f1(others, said, rule, variant) for variant in range(count)]
        equals = [variant for variant, score in enumerate(scores) if score == max(scores)]
        best = equals[len(equals) // 2]
        positives += sum(bool(run.labels[rule]) for run in left)
        spoken += sum(said[run.spec.key][best] for run in left)
        hits += sum(bool(run.labels[rule]) and said[run.spec.key][best] for run in left)
    return wilson(hits, positives), wilson(hits, spoken)


def _f1(runs: Sequence[Labelled], said: Mapping[str, Sequence[bool]], rule: str, variant: int) -> float:
    hits = sum(bool(run.labels[rule]) and said[run.spec.key][variant] for run in runs)
    wrong = sum(bool(run.labels[rule]) != said[run.spec.key][variant] for run in runs)
    return 2 * hits / max(1, 2 * hits + wrong)


def tune(directory: Path, jobs: int = 2) -> str:
    """The table, from the histories of a finished suite; without long versions, and runs without a ladder."""
    labelled = label_all(read_records(directory), read_plan(directory))
    runs = [run for run in labelled if not is_held_out(run.spec) and is_sampled(run.spec)]
    rows = []
    with ProcessPoolExecutor(jobs) as pool:
        said = dict(zip([run.spec.key for run in runs], pool.map(partial(_ask, directory), runs), strict=True))
    for kind in GRIDS:
        recall, precision = leave_one_out(runs, {key: each[kind.name] for key, each in said.items()}, kind.name)
        rows.append([f"`{kind.name}`", str(len(variants(kind))), percent(recall), percent(precision)])
    return "## One architecture left out\n\n" + table(["rule", "variants", "recall", "precision"], rows)


def _ask(directory: Path, run: Labelled) -> dict[str, list[bool]]:
    """By rule, what each of its variants would have said."""
    known = moments(read_history(directory, run.spec.key), run.record["steps"])
    return {kind.name: [_said(known, run, rule) for rule in variants(kind)] for kind in GRIDS}


def _said(known: Sequence[History], run: Labelled, rule: Rule) -> bool:
    return spoke(replace(run, record={**run.record, "alerts": judge_moments(known, [rule])}), rule.name)
