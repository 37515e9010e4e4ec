"""Section `fits` on a GPU: a fit with `Interp()`, stretch by stretch, over one without.

The images lie on the GPU and are picked there, so that no loader hides what the callbacks cost. Wall time, with
the GPU's work done at both ends of each stretch and nowhere else.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.overhead import goals, table
from benchmarks.overhead.fits import HEAD, VALIDATION, Classifier, reported
from benchmarks.overhead.models import Case
from lightning_interp import Interp

_POOL = 1024  # different images
_DENSE, _THINNING = 50, 150  # ends of the stretches in which most steps are probed, and some
_WARM = 20  # steps of the fit without, before those that count
_GOAL = goals.percent(0.01)


class OnDevice(Dataset[tuple[Tensor, Tensor]]):
    """So many samples out of a few images, which lie on the GPU; a batch is picked at once."""

    def __init__(self, count: int, case: Case) -> None:
        self.count = count
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(_POOL, *case.shape, generator=generator).to(case.device)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, case.classes, (_POOL,), generator=generator).to(case.device)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % _POOL], self.labels[index % _POOL]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        at = torch.tensor(indices).remainder(_POOL).to(self.images.device, non_blocking=True)
        return self.images[at].contiguous(memory_format=torch.channels_last), self.labels[at]


class Stretches(pl.Callback):
    """Seconds between certain moments of each epoch.

    Args:
        marks: Steps of an epoch before which there is one; another stands after its last step.
    """

    def __init__(self, marks: Sequence[int]) -> None:
        self.marks = marks
        self.begin: list[float] = []  # before and after what comes before the first step
        self.moments: list[list[float]] = []  # of each epoch; the last one of each is the end of all that follows it

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_start(self, *args: Any) -> None:
        self.begin.append(self._now())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 0:
            self._end_epoch()
            if not self.moments:
                self.begin.append(self._now())
            self.moments.append([])
        if index in self.marks:
            self.moments[-1].append(self._now())

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.is_last_batch:
            self.moments[-1].append(self._now())

    def on_fit_end(self, *args: Any) -> None:
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self.moments:
            self.moments[-1].append(self._now())

    def seconds(self, epoch: int) -> list[float]:
        """Of each stretch of an epoch; the last one is its validation and whatever else comes before the next."""
        return [b - a for a, b in pairwise(self.moments[epoch])]


@dataclass
class GpuFit:
    """Wall seconds.

    Attributes:
        step: Of a step without the callbacks.
        end: Of the end of an epoch without them.
        begin: Of what comes before the first step with them, from `on_train_start` on.
        watched: Of each epoch with them, and in it of each stretch.
        steps: Of each stretch.
        reported: Callback to the seconds that it logs itself as `interp.cost`.
    """

    step: float
    end: float
    begin: float
    watched: list[list[float]]
    steps: list[int]
    reported: dict[str, float]

    def share(self, stretch: int, epochs: slice) -> float:
        """What the steps of a stretch took more than without, over what they took without."""
        seconds = statistics.mean(epoch[stretch] for epoch in self.watched[epochs])
        return seconds / (self.steps[stretch] * self.step) - 1

    @property
    def total(self) -> float:
        """What a fit without would have taken."""
        return len(self.watched) * (sum(self.steps) * self.step + self.end)


def fit(  # noqa: PLR0913
    case: Case, folder: Path, callbacks: list[pl.Callback], *, epochs: int, steps: int, validation: int
) -> None:
    """Trains in bf16 and channels-last; `steps` and `validation`: batches of an epoch."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        accelerator="cpu" if case.device == "cpu" else "gpu",
        devices=1,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(case.make()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loaders = [
        DataLoader(OnDevice(count * case.batch, case), case.batch, collate_fn=tuple) for count in (steps, validation)
    ]
    trainer.fit(model, *loaders)


def measure(case: Case, epochs: int, steps: int) -> GpuFit:
    """Two short epochs without the callbacks, then the fit with them."""
    marks = [mark for mark in (0, _DENSE, _THINNING) if mark < steps]
    interp, plain, watched = Interp(), Stretches((0, _WARM)), Stretches(marks)
    short = min(steps, 3 * _WARM)
    with tempfile.TemporaryDirectory() as scratch:
        folder, validation = Path(scratch), max(1, steps // VALIDATION)
        fit(case, folder / "plain", [plain], epochs=2, steps=short, validation=validation)
        fit(case, folder / "watched", [watched, interp], epochs=epochs, steps=steps, validation=validation)
        costs = reported(Path(scratch) / "watched", interp)
    *_, stretch, end = plain.seconds(1)
    each = stretch / (short - _WARM if short > _WARM else short)
    lengths = [b - a for a, b in pairwise([*marks, steps])]
    begin = watched.begin[1] - watched.begin[0]
    return GpuFit(each, end, begin, [watched.seconds(epoch) for epoch in range(epochs)], lengths, costs)


def rows(case: Case, found: GpuFit) -> list[list[str]]:
    """The lines of the table for one network."""
    first, later = slice(0, 1), slice(1, None)
    names = [f"{a + 1} to {a + n}" for a, n in zip(accumulate([0, *found.steps]), found.steps, strict=False)]
    lines = [[case.name, "a step without", table.duration(found.step), ""]]
    lines.append([case.name, "before the first step", table.duration(found.begin), ""])
    for epochs, which in ((first, "first epoch"), (later, "later epochs")):
        for stretch, name in enumerate(names):
            if found.watched[epochs]:
                share = found.share(stretch, epochs)
                lines.append([case.name, f"{which}, steps {name}", table.share(share), _GOAL.verdict(share)])
    ends = statistics.mean(epoch[-1] for epoch in found.watched) - found.end
    lines.append([case.name, "the end of an epoch, more than without", table.duration(ends), ""])
    whole = (found.begin + sum(map(sum, found.watched))) / found.total - 1
    title = f"whole fit, {len(found.watched)} epochs of {sum(found.steps)} steps"
    lines.append([case.name, title, table.share(whole), _GOAL.verdict(whole)])
    for name in sorted(found.reported, key=found.reported.__getitem__, reverse=True):
        lines.append([case.name, f"of it, `interp.cost/{name}`", table.share(found.reported[name] / found.total), ""])
    return lines


def text(cases: list[Case], epochs: int, steps: int) -> str:
    """The whole section."""
    lines = [line for case in cases for line in rows(case, measure(case, epochs, steps))]
    return table.markdown("A fit with `Interp()` on a GPU, wall time", HEAD, lines)
