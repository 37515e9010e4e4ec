"""Section `fits` on a GPU: seconds of whole fits with `Interp()` and without, one after the other.

The images lie on the GPU and are picked there, so that no loader hides what the callbacks cost. Wall time from the
first step to the end of the fit, with the GPU's work done.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
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


class Epochs(pl.Callback):
    """Seconds of each epoch, validation and callbacks included, and of the whole fit from its first step on."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.end = 0.0

    def on_train_epoch_start(self, *args: Any) -> None:
        torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def on_fit_end(self, *args: Any) -> None:
        torch.cuda.synchronize()
        self.end = time.perf_counter()

    @property
    def seconds(self) -> list[float]:
        """Of each epoch."""
        return [b - a for a, b in zip(self.starts, [*self.starts[1:], self.end], strict=True)]


@dataclass
class GpuFit:
    """Wall seconds.

    Attributes:
        plain: Of each epoch without the callbacks, but for the first.
        watched: Of each epoch with them.
        reported: Callback to the seconds that it logs itself as `interp.cost`.
    """

    plain: list[float]
    watched: list[float]
    reported: dict[str, float]


def fit(case: Case, folder: Path, callbacks: list[pl.Callback], epochs: int, steps: int) -> list[float]:
    """Trains in bf16 and channels-last; seconds of each epoch."""
    torch.manual_seed(0)
    clock = Epochs()
    trainer = pl.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        accelerator="gpu",
        devices=1,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        callbacks=[clock, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(case.make()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loaders = [
        DataLoader(OnDevice(count * case.batch, case), case.batch, collate_fn=tuple)
        for count in (steps, max(1, steps // VALIDATION))
    ]
    trainer.fit(model, *loaders)
    return clock.seconds


def measure(case: Case, epochs: int, steps: int) -> GpuFit:
    """Without the callbacks, then with them."""
    interp = Interp()
    with tempfile.TemporaryDirectory() as scratch:
        plain = fit(case, Path(scratch) / "plain", [], 3, steps)[1:]
        watched = fit(case, Path(scratch) / "watched", [interp], epochs, steps)
        costs = reported(Path(scratch) / "watched", interp)
    return GpuFit(plain, watched, costs)


def rows(case: Case, epochs: int, steps: int) -> list[list[str]]:
    """The lines of the table for one network."""
    found = measure(case, epochs, steps)
    epoch = statistics.mean(found.plain)
    share = sum(found.watched) / (epochs * epoch) - 1
    later = statistics.mean(found.watched[1:]) / epoch - 1 if epochs > 1 else float("nan")
    lines = [
        [
            case.name,
            f"whole fit, {epochs} epochs of {steps} steps, wall time",
            table.share(share),
            _GOAL.verdict(share),
        ],
        [case.name, "of it, epochs after the first", table.share(later), _GOAL.verdict(later)],
        [case.name, "an epoch without, twice", " and ".join(map(table.duration, found.plain)), ""],
    ]
    for name in sorted(found.reported, key=found.reported.__getitem__, reverse=True):
        lines.append(
            [case.name, f"of it, `interp.cost/{name}`", table.share(found.reported[name] / (epochs * epoch)), ""]
        )
    return lines


def text(cases: list[Case], epochs: int, steps: int) -> str:
    """The whole section."""
    return table.markdown(
        "A whole fit with `Interp()` on a GPU", HEAD, [line for case in cases for line in rows(case, epochs, steps)]
    )
