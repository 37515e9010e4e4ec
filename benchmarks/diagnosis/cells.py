"""What is run: ladders of learning rates for the counterfactual labels, and injected faults beside their twins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.diagnosis.faults import FAULTS
from benchmarks.diagnosis.models import ARCHITECTURES
from benchmarks.diagnosis.spec import Spec

DATA = ("digits", "photos", "textures")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "warmup", "onecycle")
BASE = {"sgd": 0.03, "adam": 2e-3, "adamw": 2e-3}  # known to work for all of these networks
STEP, RUNGS, NARROW = 4.0, range(-3, 4), range(-1, 2)
EPOCHS, SHORT_EPOCHS = {"digits": 16, "textures": 16, "photos": 28}, 5  # the photographs take longer


def suite(*, reduced: bool = False) -> list[Spec]:
    """All runs in their order: whole cells, mixed, so that a part of the suite is a fair sample."""
    groups = _reduced() if reduced else _full()
    random.Random(0).shuffle(groups)
    return list(dict.fromkeys(spec for group in groups for spec in group))


def ladder(cell: Spec, rungs: Sequence[int] = RUNGS) -> list[Spec]:
    """The cell at all rates, each at its own length and three times as long."""
    rates = [float(f"{BASE[cell.optimizer] * STEP**rung:.3g}") for rung in rungs]
    return [replace(cell, rate=rate, long=long) for rate in rates for long in (False, True)]


def with_faults(cell: Spec, faults: list[str]) -> list[Spec]:
    """The cell at its base rate with each fault; the twins are in its ladder."""
    return [replace(cell, rate=BASE[cell.optimizer], fault=fault) for fault in faults]


def _full() -> list[list[Spec]]:
    groups = []
    for number, cell in enumerate(_cells()):
        rungs = NARROW if cell.seed else RUNGS  # most runs with a wrong rate come from the first seed
        turn, chosen = divmod(number, 9)
        faults = _share_of_faults(turn) if chosen == 2 * turn % 9 else []
        # Some faults strike late, so their cells are never short ones.
        full = replace(cell, epochs=EPOCHS[cell.data]) if faults else cell
        groups.append(ladder(full, rungs) + with_faults(full, faults))
    return groups + [ladder(cell, NARROW) for cell in _hard()]


def _share_of_faults(turn: int) -> list[str]:
    """Half of the faults, the other half in the next turn; there are four turns for each network."""
    return [fault for i, fault in enumerate(FAULTS) if i % 2 == turn % 2]


def _cells() -> list[Spec]:
    """Each network with each optimizer on each data set; the rest varies so that every value meets every other."""
    cells = []
    for seed in range(4):
        for a, architecture in enumerate(ARCHITECTURES):
            for d, data in enumerate(DATA):
                for o, optimizer in enumerate(OPTIMIZERS):
                    i = a + 2 * d + 3 * o + 5 * seed
                    cells.append(
                        Spec(
                            architecture,
                            data,
                            optimizer,
                            SCHEDULES[(a + d + o + 2 * seed) % 4],
                            seed=seed,
                            epochs=SHORT_EPOCHS if i % 6 == 0 else EPOCHS[data],
                            clip=1.0 if i % 5 == 1 else 0.0,
                            precision="bf16" if i % 7 == 2 else "32",
                        )
                    )
    return cells


def _hard() -> list[Spec]:
    """Healthy runs that look ill, at a range of rates; a rate at which one is ill indeed is labelled so."""
    cells = []
    for a, architecture in enumerate(ARCHITECTURES):
        optimizer = OPTIMIZERS[a % 3]
        plain = Spec(architecture, "digits", optimizer, seed=2, epochs=EPOCHS["digits"])
        cells += [
            replace(plain, optimizer="sgd", batch_size=400, epochs=120, trait="full_batch"),
            replace(plain, schedule="onecycle", trait="wide"),
            replace(plain, trait="sparse"),
            replace(plain, trait="pruned"),
            replace(plain, batch_size=4, epochs=1, trait="tiny_batch"),
            replace(plain, trait="fine_tuning"),
            replace(plain, data="positions", epochs=EPOCHS["photos"]),
        ]
    return cells


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
