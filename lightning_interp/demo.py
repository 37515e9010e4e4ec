"""`lightning-interp demo`: one small CNN, trained well, too fast, not for long enough, and on labels that are wrong.

The images are the 1,797 handwritten digits (8x8) that scikit-learn ships: nothing is downloaded.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.alert_log import FILE_NAME, read_alerts
from lightning_interp.alert_table import alert_table
from lightning_interp.callbacks.interp import Interp
from lightning_interp.errors import InterpWarning
from lightning_interp.rules.alert import Alert

MARKER = ".lightning-interp-demo"
OWN_FILES = (  # all a run writes
    MARKER, "alerts.jsonl", "events.out.tfevents.*", "hparams.yaml", "interp_step0_*.pt", "suspect_labels.csv",
    "projector_config.pbtxt", "projector",
)  # fmt: skip
TRAIN_IMAGES = 1400
BATCH_SIZE = 50
STEPS_PER_EPOCH = TRAIN_IMAGES // BATCH_SIZE


class DemoError(Exception):
    """The demo can't be run as asked; the message says why."""


@dataclass(frozen=True)
class Run:
    """One of the demo's trainings.

    Attributes:
        name: Folder of the run.
        learning_rate: For plain gradient descent.
        shortened: Whether it is stopped after a fifteenth of the epochs.
        wrong_labels: Share of the training labels that are replaced by another one.
    """

    name: str
    learning_rate: float
    shortened: bool = False
    wrong_labels: float = 0.0

    def epochs(self, asked: int) -> int:
        """Epochs of this run, when `asked` are asked for."""
        return max(1, asked // 15) if self.shortened else asked


RUNS = (
    Run("healthy", 0.01),
    Run("learning-rate-too-high", 1.0),
    Run("stopped-too-soon", 0.01, shortened=True),
    Run("wrong-labels", 0.01, wrong_labels=0.1),
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its name, its validation accuracy in [0, 1], and the newest alert of each rule and layer."""

    name: str
    accuracy: float
    alerts: list[Alert]


class DigitsNet(pl.LightningModule):
    """Three convolutions, ReLU as a module and as a function, no normalisation: too high a rate kills its filters."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(32, 32, kernel_size=3, padding=1)
        self.head = nn.Linear(32 * 2 * 2, 10)
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 10) scores."""
        x = self.relu1(self.conv1(images))
        x = F.max_pool2d(self.relu2(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy."""
        images, labels = batch
        scores = self(images)
        self.log("val_loss", F.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain stochastic gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class _Ticks(pl.Callback):
    """Moves the progress bar by one at each training step."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.progress.advance(self.task)


def run_demo(out: Path, *, epochs: int = 30, seed: int = 0, console: Console | None = None) -> list[Outcome]:
    """Trains the four runs with `Interp("full")` and prints what it found.

    Args:
        out: Folder for the logs, one folder per run; runs of an earlier demo in it are replaced.
        epochs: Epochs of the longer runs, at least 1.
        seed: Of weights and of the order of the batches; the same seed gives the same numbers.
        console: Where to print; None is standard output.

    Returns:
        How the runs ended, in the order of `RUNS`.

    Raises:
        DemoError: If a folder in the way was not made by the demo.
        OSError: If `out` can't be written to.
    """
    console = console or Console()
    prepare(out)
    train, validation = load_digits()
    with _progress(console) as progress, _quiet(), _one_thread():
        task = progress.add_task("", total=STEPS_PER_EPOCH * sum(run.epochs(epochs) for run in RUNS))
        outcomes = []
        for run in RUNS:
            progress.update(task, description=run.name)
            ticks = _Ticks(progress, task)
            outcomes.append(train_run(run, out, train, validation, epochs=epochs, seed=seed, callbacks=[ticks]))
    rows = [((outcome.name, f"{outcome.accuracy:.1%}"), outcome.alerts) for outcome in outcomes]
    console.print(alert_table(rows, columns=["run", "accuracy"]))
    line = f"Now look inside:  {_tensorboard()} --logdir {shlex.quote(str(out))}"
    console.print(line, style="bold", soft_wrap=True, highlight=False, markup=False)
    return outcomes


def train_run(  # noqa: PLR0913 - a script's plumbing
    run: Run,
    out: Path,
    train: TensorDataset,
    validation: TensorDataset,
    *,
    epochs: int,
    seed: int,
    callbacks: list[pl.Callback],
) -> Outcome:
    """Trains one run; its logs lie in `out/<name>` afterwards. The global generators are left as they were."""
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet(run.learning_rate)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=run.epochs(epochs),
            log_every_n_steps=10,
            logger=TensorBoardLogger(save_dir=out, name="", version=run.name, default_hp_metric=False),
            callbacks=[Interp("full"), *callbacks],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(
            model,
            DataLoader(mislabeled(train, run.wrong_labels), batch_size=BATCH_SIZE, shuffle=True, generator=order),
            DataLoader(validation, batch_size=len(validation)),
        )
    logs = read_alerts(out / run.name)
    if not logs:
        raise DemoError(f"the run {run.name!r} wrote no {FILE_NAME}")
    return Outcome(run.name, float(trainer.callback_metrics["val_accuracy"]), logs[0].latest)


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """The digits as (N, 1, 8, 8) images of zero mean and unit variance, always split alike: 1,400 and 397."""
    from sklearn.datasets import load_digits as load

    digits = load()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None]
    labels = torch.tensor(digits.target)[order]
    seen = images[:TRAIN_IMAGES]
    images = (images - seen.mean()) / seen.std()
    return (
        TensorDataset(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]),
        TensorDataset(images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]),
    )


def mislabeled(data: TensorDataset, share: float) -> TensorDataset:
    """The same images, with this share of the labels replaced by another one, always the same."""
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    wrong = labels.clone()
    wrong[chosen] = (labels[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
    return TensorDataset(images, wrong)


def prepare(out: Path) -> None:
    """Makes `out` and an empty marked folder per run; removes what an earlier demo wrote there, and nothing else.

    Raises:
        DemoError: If a folder in the way was not made by the demo, or holds something that the demo did not write.
        OSError: If `out` can't be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass  # a folder may exist and be read-only
    folders = [out / run.name for run in RUNS]
    for folder in folders:
        foreign = _foreign(folder)
        if foreign is not None:
            raise DemoError(f"{str(foreign)!r} was not made by the demo, so it stays; choose another folder with --out")
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / MARKER).touch()


def _foreign(folder: Path) -> Path | None:
    """What stands in the way of a run and was not written by the demo; None if there is nothing of the kind."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return folder
    inside = sorted(folder.rglob("*")) if folder.exists() else []
    if inside and folder / MARKER not in inside:
        return folder
    own = (not path.is_symlink() and _is_own(path.relative_to(folder).parts[0]) for path in inside)
    return next((path for path, is_own in zip(inside, own, strict=True) if not is_own), None)


def _is_own(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in OWN_FILES)


def _tensorboard() -> str:
    """What starts TensorBoard: its plain name, or its path where this environment was never activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    if shutil.which("tensorboard") or not beside.exists():
        return "tensorboard"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Images of 8x8 are too small to share out: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(console: Console) -> Progress:
    """One bar for all runs; gone when they are done, so that the table stands alone."""
    columns = TextColumn("training {task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences log lines below ERROR, and warnings but this package's own; puts all back, also after an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", InterpWarning)
            yield
    finally:
        logging.disable(disabled)
