"""What is run: ladders of learning rates for the counterfactual labels, and injected faults beside their twins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.diagnosis.faults import FAULTS
from benchmarks.diagnosis.fresh import FRESH
from benchmarks.diagnosis.models import ARCHITECTURES, HELD_OUT
from benchmarks.diagnosis.spec import Spec

DATA = ("digits", "photos", "textures")
EASY, ALONE = ("digits", "textures"), (6, 7, 8, 9, 10, 13)  # data and seeds of the runs without a ladder
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "warmup", "onecycle")
# Rates that are known to work for all of these networks.
BASE = {
    "sgd": 0.03, "adam": 2e-3, "adamw": 2e-3, "plain_sgd": 0.3, "nadam": 4e-3, "rmsprop": 2e-3, "adagrad": 0.05,
    "nesterov": 0.03, "radam": 4e-3, "adamax": 8e-3,
}  # fmt: skip
STEP, RUNGS, NARROW = 4.0, range(-2, 4), range(-1, 2)
# At the lowest and the highest rate, three times the steps would tell nothing that the other labels do not.
LONG_RUNGS = range(-1, 3)
# Of runs without a ladder; what these mean stands in `traits.py`.
HARD = ("none", "wide", "sparse", "none", "pruned", "fine_tuning")
EPOCHS = {
    "digits": 9, "textures": 9, "photos": 12, "positions": 12, "glyphs": 12, "turns": 15, "zooms": 12, "counts": 12,
}  # fmt: skip
SHORT_EPOCHS = 3


class Elsewhere(NamedTuple):
    """Networks, data and optimizers other than those on which thresholds were chosen; `seed` and the one after it."""

    networks: Sequence[str]
    data: Sequence[str]
    optimizers: Sequence[str]
    seed: int
    batch_sizes: Sequence[int] = (32,)


ELSEWHERE = (
    Elsewhere(tuple(HELD_OUT), ("glyphs", "turns"), ("plain_sgd", "nadam", "rmsprop", "adagrad"), seed=4),
    Elsewhere(tuple(FRESH), ("zooms", "counts"), ("nesterov", "radam", "adamax"), seed=11, batch_sizes=(32, 64)),
)


def suite(*, reduced: bool = False) -> list[Spec]:
    """All runs in their order: whole cells, mixed, so that a part of the suite is a fair sample."""
    groups = _reduced() if reduced else _full()
    random.Random(0).shuffle(groups)
    return list(dict.fromkeys(spec for group in groups for spec in group))


def ladder(cell: Spec, rungs: Sequence[int] = RUNGS) -> list[Spec]:
    """The cell at all rates, each at its own length and, where that can tell something, three times as long."""
    specs = []
    for rung in rungs:
        rate = float(f"{BASE[cell.optimizer] * STEP**rung:.3g}")
        specs += [replace(cell, rate=rate, long=long) for long in (False, True) if not long or rung in LONG_RUNGS]
    return specs


def with_faults(cell: Spec, faults: list[str]) -> list[Spec]:
    """The cell at its base rate with each fault; the twins are in its ladder."""
    return [replace(cell, rate=BASE[cell.optimizer], fault=fault) for fault in faults]


def _full() -> list[list[Spec]]:
    groups = [ladder(cell, NARROW if cell.seed else RUNGS) for cell in _cells()]
    groups += [ladder(cell, NARROW) for cell in _hard()]
    groups += [[cell] for cell in _alone(tuple(ARCHITECTURES), OPTIMIZERS, ALONE)]
    # Brute force does not know which of the filters of these networks are pruned, see `census`.
    groups += [[cell] for cell in _alone(tuple(FRESH), ELSEWHERE[1].optimizers, ALONE[:-1]) if cell.trait != "pruned"]
    groups += [ladder(cell, NARROW) + with_faults(cell, faults) for cell, faults in _faulty()]
    for there in ELSEWHERE:
        groups += [ladder(cell) for cell in _elsewhere(there)]
        groups += [ladder(cell, NARROW) + with_faults(cell, faults) for cell, faults in _faulty_elsewhere(there)]
    return groups


def _cells() -> list[Spec]:
    """Each network with each optimizer on each data set; the rest varies so that every value meets every other."""
    cells = []
    for seed in range(2):
        for a, architecture in enumerate(ARCHITECTURES):
            for d, data in enumerate(DATA):
                for o, optimizer in enumerate(OPTIMIZERS):
                    i = a + 2 * d + 3 * o + 5 * seed
                    if seed and (a + d + o) % 2:  # the second seed asks only whether the first one was luck
                        continue
                    cells.append(
                        Spec(
                            architecture,
                            data,
                            optimizer,
                            SCHEDULES[(a + d + o + 2 * seed) % 4],
                            seed=seed,
                            epochs=SHORT_EPOCHS if i % 6 == 0 else EPOCHS[data],
                            clip=1.0 if i % 5 == 1 else 0.0,
                            precision="bf16" if seed and i % 7 == 2 else "32",  # five times as slow on a CPU
                        )
                    )
    return cells


def _faulty() -> list[tuple[Spec, list[str]]]:
    """Where faults are injected: all of them in each network once, and half of them on other data."""
    cells = []
    for a, architecture in enumerate(ARCHITECTURES):
        cell = Spec(architecture, "digits", OPTIMIZERS[a % 3], SCHEDULES[a % 3], seed=2, epochs=EPOCHS["digits"])
        other = replace(cell, data="textures", optimizer=OPTIMIZERS[(a + 1) % 3], schedule=SCHEDULES[(a + 1) % 3])
        cells += [(cell, list(FAULTS)), (other, [fault for f, fault in enumerate(FAULTS) if f % 2 == a % 2])]
    return cells


def _hard() -> list[Spec]:
    """Healthy runs that look ill, at a range of rates; a rate at which one is ill indeed is labelled so."""
    cells = []
    for a, architecture in enumerate(ARCHITECTURES):
        optimizer = OPTIMIZERS[a % 3]
        plain = Spec(architecture, "digits", optimizer, seed=3, epochs=EPOCHS["digits"])
        hard = [
            replace(plain, optimizer="sgd", batch_size=240, epochs=100, trait="full_batch"),
            replace(plain, schedule="onecycle", trait="wide"),
            replace(plain, trait="sparse"),
            replace(plain, trait="pruned"),
            replace(plain, batch_size=4, epochs=1, trait="tiny_batch"),
            replace(plain, trait="fine_tuning"),
            replace(plain, data="positions", epochs=EPOCHS["positions"]),
        ]
        cells += [cell for t, cell in enumerate(hard) if (a + t) % 2 == 0 or t == 5]  # fine-tuning is the commonest
    return cells


def _alone(networks: Sequence[str], optimizers: Sequence[str], seeds: Sequence[int]) -> list[Spec]:
    """Runs without a ladder, on data that is learned so well that arithmetic bears out their rate and their length.

    See `labels.settled`. At the base rate and at four times as much, where steps are near the edge of stability.
    """
    cells = []
    for seed in seeds:
        for a, architecture in enumerate(networks):
            for d, data in enumerate(EASY):
                for o, optimizer in enumerate(optimizers):
                    for rung in range(2):
                        spec = Spec(
                            architecture,
                            data,
                            optimizer,
                            SCHEDULES[(a + d + o + seed) % 4],
                            rate=float(f"{BASE[optimizer] * STEP**rung:.3g}"),
                            seed=seed,
                            epochs=EPOCHS[data],
                            trait=HARD[(a + o + rung + seed) % len(HARD)] if d == 0 else "none",
                        )
                        cells.append(replace(spec, schedule="onecycle") if spec.trait == "wide" else spec)
    return cells


def _elsewhere(there: Elsewhere) -> list[Spec]:
    """Each network on each data set with two optimizers."""
    cells = []
    for a, architecture in enumerate(there.networks):
        for d, data in enumerate(there.data):
            for turn in range(2):
                optimizer = there.optimizers[(a + d + 2 * turn) % len(there.optimizers)]
                schedule = SCHEDULES[(a + 2 * d + turn) % 4]
                epochs = SHORT_EPOCHS if (a + d + turn) % 5 == 0 else EPOCHS[data]
                size = there.batch_sizes[turn % len(there.batch_sizes)]
                cells.append(Spec(architecture, data, optimizer, schedule, 0.0, there.seed, epochs, size))
    return cells


def _faulty_elsewhere(there: Elsewhere) -> list[tuple[Spec, list[str]]]:
    """Half of the faults in each of the networks."""
    cells = []
    for a, architecture in enumerate(there.networks):
        data, optimizer = there.data[a % 2], there.optimizers[(a + 1) % len(there.optimizers)]
        cell = Spec(architecture, data, optimizer, SCHEDULES[a % 4], seed=there.seed + 1, epochs=EPOCHS[data])
        cells.append((cell, [fault for f, fault in enumerate(FAULTS) if f % 2 == a % 2]))
    return cells


def is_held_out(spec: Spec) -> bool:
    """Whether the run is one of those on which no threshold was chosen, though what failed on them was looked at."""
    return spec.architecture in HELD_OUT


def is_fresh(spec: Spec) -> bool:
    """Whether it was added when the rules were finished; the README says what its first look led to."""
    return spec.architecture in FRESH


def is_extra(spec: Spec) -> bool:
    """Whether it is a long version or has no ladder."""
    return spec.long or spec.seed in ALONE


def is_sampled(spec: Spec) -> bool:
    """Whether `cure` and `peers` may take it: no long version, with a ladder, and not fresh."""
    return not is_extra(spec) and not is_fresh(spec)


def _reduced() -> list[list[Spec]]:
    """One ladder for each network, a hard cell, and a few faults."""
    groups = []
    for i, architecture in enumerate(ARCHITECTURES):
        cell = Spec(architecture, ("digits", "textures")[i % 2], OPTIMIZERS[i % 3], SCHEDULES[i % 4])
        groups.append(ladder(cell, (-3, -1, 0, 3)))
        faults = [fault for f, fault in enumerate(FAULTS) if f % len(ARCHITECTURES) == i]
        groups[-1] += with_faults(cell, faults)
    hard = Spec("plain", "digits", "sgd", batch_size=4, epochs=1, trait="tiny_batch", seed=2)
    return [*groups, ladder(hard, range(-1, 1))]
