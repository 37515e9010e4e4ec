"""What watching costs: the same training steps with and without it, interleaved in one run.

    python benchmarks/overhead.py [--steps 60] [--fits 3] [--models resnet18]

All times are CPU times of this process with one thread, which a busy machine disturbs less than the clock. Two tables.
*Steps*: the median time of a training step with the watch of `DeadFilters` in a given state over the median
without it; the two kinds of step alternate, so that drift of the machine hits both. *Fits*: the time of a whole `fit`
with `Interp()` over one without, again alternating, and the share that the callbacks themselves report. Every watched
run is checked to have measured something: a watch that silently broke would look superb.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import Interp
from lightning_interp.callbacks.observer import Observer
from lightning_interp.callbacks.window import Window
from lightning_interp.functional.units import Unit


def small_cnn() -> nn.Module:
    """Four convolutions on 28x28 grey images."""
    layers: list[nn.Module] = []
    for channels, width in ((1, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        if channels == 32:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18() -> nn.Module:
    """The network for 32x32 colour images, ten classes."""
    return torchvision.models.resnet18(weights=None, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "small CNN, 28x28, batch 64": (small_cnn, (1, 28, 28), 64),
    "resnet18, 32x32, batch 64": (resnet18, (3, 32, 32), 64),
}


def kill(model: nn.Module, fraction: float) -> None:
    """Silences the first filters of every layer that a ReLU follows."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    owners = norms or [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for owner in owners:
            dead = round(fraction * len(owner.weight))
            owner.weight[:dead] = 0
            if owner.bias is not None:
                owner.bias[:dead] = -1


STATES = {"first batch of a window": 0.0, "steady, none dead": 0.0, "steady, 30 % dead": 0.3}


class Stepper:
    """Training steps of one model, each with or without the watch of `DeadFilters`."""

    def __init__(self, model: nn.Module, images: Tensor, *, new_window: bool) -> None:
        self.model, self.images, self.new_window = model, images, new_window
        self.labels = torch.randint(0, 10, (len(images),))
        self.observer, self.window = Observer(model), Window()

    def run(self, *, watched: bool) -> float:
        """Seconds of one step. The rate is zero, so that the same filters stay dead for the whole benchmark."""
        if self.new_window:
            self.window = Window()
        parameters = list(self.model.parameters())
        start = time.process_time()
        if watched:
            self.window.open(self.observer, counting)
        loss = F.cross_entropy(self.model(self.images), self.labels)
        if watched:
            self.window.stop_reading()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.add_(gradient, alpha=0.0)
        return time.process_time() - start


def counting(units: dict[str, Unit]) -> list[str]:
    """The layers that have filters."""
    return [name for name, unit in units.items() if unit.counts]


def step_times(make: Callable[[], nn.Module], shape: tuple[int, int, int], batch: int, steps: int) -> dict[str, float]:
    """Median time ratios of watched to plain steps, by state of the watch."""
    ratios = {}
    for state, dead in STATES.items():
        torch.manual_seed(0)
        model = make()
        kill(model, dead)
        stepper = Stepper(model, torch.randn(batch, *shape), new_window=state.startswith("first"))
        for _ in range(3):
            stepper.run(watched=True)
        pairs = [(stepper.run(watched=False), stepper.run(watched=True)) for _ in range(steps)]
        if not len(stepper.window.pack(counting(stepper.observer.units), stepper.observer.units)):
            raise RuntimeError("the watch has measured nothing")
        plain, watched = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios[state] = watched / plain
    return ratios


class Classifier(pl.LightningModule):
    """Any network with a cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("validation_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(
    make: Callable[[], nn.Module], data: TensorDataset, epochs: int, batch: int, *, watched: bool
) -> tuple[float, float]:
    """Seconds of one fit, and those that the callbacks report."""
    torch.manual_seed(0)
    interp = Interp()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(folder, default_hp_metric=False),
            callbacks=[interp] if watched else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = DataLoader(data, batch, shuffle=True), DataLoader(data, batch)
        start = time.process_time()
        trainer.fit(Classifier(make()), *loaders)
        seconds = time.process_time() - start
    if watched and not trainer.callback_metrics.keys() >= {"interp/dead_filters", "interp/update_ratio_median"}:
        raise RuntimeError("the callbacks have measured nothing")
    return seconds, sum(child.seconds for child in interp.children)


def main() -> None:
    """Runs both tables and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60, help="watched steps per state")
    parser.add_argument("--fits", type=int, default=3, help="pairs of fits; 0 leaves the second table out")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a fit, of 100 steps each")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    steps, fits = (
        Table("model", "state", "ratio"),
        Table("model", "ratio (median of pairs)", "share that callbacks report"),
    )
    for name, (make, shape, batch) in MODELS.items():
        if options.models not in name:
            continue
        for state, ratio in step_times(make, shape, batch, options.steps).items():
            steps.add_row(name, state, f"{ratio:.3f}")
        if options.fits:
            data = TensorDataset(torch.randn(100 * batch, *shape), torch.randint(0, 10, (100 * batch,)))
            pairs = []
            for _ in range(options.fits):
                plain, _ = fit(make, data, options.epochs, batch, watched=False)
                seen, own = fit(make, data, options.epochs, batch, watched=True)
                pairs.append((seen / plain, own / plain))
            ratio, share = (statistics.median(column) for column in zip(*pairs, strict=True))
            fits.add_row(name, f"{ratio:.3f}", f"{share:.1%}")
    console = Console()
    console.print(f"torch {torch.__version__}, one thread")
    console.print(steps)
    if options.fits:
        console.print(fits)


if __name__ == "__main__":
    main()
