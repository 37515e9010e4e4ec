"""How the cost of each callback grows: with the layers, the filters, the images, the epochs; and what it keeps.

    python -m benchmarks.growth [--quick] [--only Alerts FilterGrid] [--seconds 40] > growth.md

All times are CPU times of this process with one thread, as the callbacks count them themselves (`cost`), over short
fits of tiny networks that log to TensorBoard; a cost that grows with the square would show here as anywhere.

- *Layers*: a chain of convolutions with four filters each, 8 to 500 of them.
- *Filters*: convolutions from 4 channels to 8 ... 512 filters, each followed by one back to 4, so that the number of
  weights grows with that of the filters and not with its square.
- *Images*: `num_samples`, `max_points` or `num_train`, 4 to 2000.
- *Epochs*: one fit of up to 1000 epochs of two steps, all of them due; cost of an epoch around the 10th, 100th and
  1000th. A callback that has taken `--seconds` stops earlier, and the table says where.
- *Memory*: its state as it lies in a checkpoint, after as many epochs. `History` is what the rules read.

The *exponent* is the slope of a line through log(cost) over log(size), over the three largest sizes, if their cost is
above the floor of 5 ms: 1 is linear, 0 is a cost that stays. The promise is linear or better; an exponent
above 1.25, which leaves room for noise, is named at the end, and the exit status is 1. (Those of `--quick` say little.)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import math
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_interp as interp
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.callbacks.session import Session
from lightning_interp.rules import AlertBook, History, default_rules

FLOOR = 5e-3  # seconds
LINEAR, PROMISED = 1.1, 1.25  # exponents: up to which a cost is called linear, and above which the promise is broken
CLASSES, SIDE, BATCH, FILTERS = 3, 8, 4, 4
SIZES = {
    "layers": (8, 32, 125, 500),
    "filters": (8, 32, 128, 512),
    "images": (4, 30, 250, 2000),
    "epochs": (10, 100, 1000),
}
QUICK = {"layers": (4, 8, 16), "filters": (4, 8, 16), "images": (4, 8, 16), "epochs": (2, 5, 10)}

Make = Callable[..., InterpCallback]
# How each callback is made, and the option that counts its images.
CALLBACKS: dict[str, tuple[Make, str | None]] = {
    "TrainingDynamics": (interp.TrainingDynamics, None),
    "DeadFilters": (interp.DeadFilters, None),
    "Alerts": (interp.Alerts, None),
    "FilterGrid": (interp.FilterGrid, None),
    "ActivationSparsity": (interp.ActivationSparsity, "num_samples"),
    "SaliencyMaps": (interp.SaliencyMaps, "num_samples"),
    "OcclusionMaps": (interp.OcclusionMaps, "num_samples"),
    "ClassImages": (interp.ClassImages, "num_samples"),
    "TopPatches": (interp.TopPatches, None),
    "EmbeddingProjection": (interp.EmbeddingProjection, "max_points"),
    "Influence": (interp.Influence, "num_train"),
    "Interp": (interp.Interp, None),
}
# What keeps the fits short; not in the dimension that is measured.
OPTIONS: dict[str, dict[str, Any]] = {
    "SaliencyMaps": {"num_samples": 2, "curve_steps": 0},
    "OcclusionMaps": {"num_samples": 2, "window": 4, "stride": 4},
    "ClassImages": {"num_samples": 8, "steps": 4},
    "TopPatches": {"k": 2, "filters_per_layer": 2},
    "EmbeddingProjection": {"max_points": 12},
    "Influence": {"num_test": 2, "num_train": 12, "top_k": 2, "neighbors": 3},
}


class Chain(pl.LightningModule):
    """Convolutions one after the other, each with a ReLU; filters that fire on average, whatever the depth."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(images)
        return result

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class EachEpoch(pl.Callback):
    """Notes cost and size of state by epoch; ends the fit when the callback has had its time."""

    def __init__(self, callback: InterpCallback, marks: tuple[int, ...], seconds: float) -> None:
        self.callback, self.marks, self.seconds = callback, marks, seconds
        self.costs: list[float] = []
        self.sizes: dict[int, tuple[int, int]] = {}
        self._ends = time.process_time() + seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.costs.append(self.callback.cost)
        trainer.should_stop = time.process_time() > self._ends
        if len(self.costs) in self.marks or trainer.should_stop:
            state, history = self.callback.state_dict(), Session.of(trainer).history.state_dict()
            self.sizes[len(self.costs)] = len(pickle.dumps(state)), len(pickle.dumps(history))


def images(count: int, seed: int) -> DataLoader[Any]:
    """Noise with a little of its class in it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randn(count, 1, SIDE, SIDE, generator=generator) + labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(pixels, labels), batch_size=BATCH)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Nothing on the screen but the tables; alerts are not the matter here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def fit(name: str, widths: list[int], *, epochs: int = 2, samples: int = 12, val: int = 12, **options: Any) -> Any:
    """One fit with one callback; gives it back.

    Raises:
        RuntimeError: If it measured nothing: a callback that rests would look superb.
    """
    own = options.pop("beside", None)
    callback = CALLBACKS[name][0](**{"on_error": "raise", **OPTIONS.get(name, {}), **options})
    torch.manual_seed(0)
    watcher = own(callback) if own is not None else None
    with tempfile.TemporaryDirectory() as folder, quietly():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            logger=TensorBoardLogger(folder),  # without a logger, pictures are not even drawn
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, *([watcher] if watcher is not None else [])],
        )
        trainer.fit(Chain(widths), images(samples, 0), images(val, 1))
    if callback.resting or not callback.cost:
        raise RuntimeError(f"{name} has measured nothing")
    return watcher if watcher is not None else callback


def cost(name: str, dimension: str, size: int) -> float:
    """CPU seconds of a fit of two epochs at that size."""
    if dimension == "layers":
        return float(fit(name, [FILTERS] * size).cost)
    if dimension == "filters":
        return float(fit(name, [FILTERS, size] * 3).cost)
    count = max(size, 12)
    return float(fit(name, [FILTERS] * 3, samples=count, val=count, **{str(CALLBACKS[name][1]): size}).cost)


def exponent(costs: Mapping[int, float]) -> float | None:
    """Slope of log(cost) over log(size) of the three largest sizes, above the floor; None with fewer than two there.

    Example:
        >>> exponent({1: 0.001, 10: 0.1, 100: 1.0, 1000: 10.0})
        1.0
    """
    above = {size: costs[size] for size in sorted(costs)[-3:] if costs[size] >= FLOOR}
    if len(above) < 2:
        return None
    return round(float(np.polyfit([math.log(s) for s in above], [math.log(c) for c in above.values()], 1)[0]), 2)


def verdict(slope: float | None) -> str:
    """In words."""
    if slope is None:
        return f"below {1000 * FLOOR:.0f} ms"
    return "linear or better" if slope <= LINEAR else "**worse than linear**"


def around(costs: list[float], epoch: int) -> float:
    """Cost of one epoch: the mean of the last fifth of the epochs up to this one, but not of the first, which opens."""
    first = max(1, epoch - max(1, epoch // 5))
    return (costs[epoch - 1] - costs[first - 1]) / max(1, epoch - first)


def look_cost(layers: int, epochs: int, *, looks: int = 5) -> float:
    """CPU seconds of so many looks of all rules at a history of so many epochs of 20 steps."""
    history, steps = History(), 20 * epochs
    history.note("num_classes", 10)
    history.note("planned_steps", steps)
    for step in range(steps):
        loss = 0.5 + 1.8 / (1 + step / 50)
        history.record("loss", loss, step=step)
        if step < 50 or step % 10 == 0:
            numbers = {"loss_before": loss, "loss_after": 0.97 * loss, "step_ratio": 0.7, "learning_rate": 0.1}
            for quantity, value in {**numbers, "gradient_norm": 1.0}.items():
                history.record(quantity, value, step=step)
            for layer in range(layers):
                for quantity in ("gradient_norm", "update_norm", "update_ratio"):
                    history.record(quantity, 0.01, step=step, layer=f"conv{layer}")
        if step % 20 == 0:
            for layer in range(layers):
                history.record("dead_fraction", 0.0, step=step, layer=f"conv{layer}")
    book = AlertBook(default_rules())
    start = time.process_time()
    for _ in range(looks):
        book.update(history)
    return time.process_time() - start


def milliseconds(values: Mapping[int, float]) -> str:
    """`size: cost` for a cell."""
    return ", ".join(f"{size}: {1000 * value:.3g}" for size, value in values.items())


def growths(sizes: Mapping[str, tuple[int, ...]], names: list[str]) -> Iterator[tuple[str, str, dict[int, float]]]:
    """Name, dimension and cost by size, of each callback and dimension."""
    for name in names:
        dimensions = ["layers", "filters"] + (["images"] if CALLBACKS[name][1] else [])
        for dimension in dimensions:
            yield name, dimension, {size: cost(name, dimension, size) for size in sizes[dimension]}
    look = "five looks of all rules"
    yield look, "layers", {size: look_cost(size, max(sizes["epochs"])) for size in sizes["layers"]}
    yield look, "epochs", {size: look_cost(max(sizes["layers"]) // 10, size) for size in sizes["epochs"]}


def growth_row(name: str, dimension: str, costs: Mapping[int, float]) -> str:
    """For the table."""
    slope = exponent(costs)
    return f"| {name} | {dimension} | {milliseconds(costs)} | {'' if slope is None else slope} | {verdict(slope)} |"


def broken_promise(name: str, dimension: str, costs: Mapping[int, float]) -> str | None:
    """In words what grows faster than promised, or None.

    Example:
        >>> broken_promise("FilterGrid", "layers", {10: 0.01, 100: 0.1, 1000: 1.0})
        >>> broken_promise("FilterGrid", "layers", {10: 0.01, 100: 1.0, 1000: 100.0})
        'FilterGrid grows with the layers to the power of 2.0, where at most 1.25 is promised'
    """
    slope = exponent(costs)
    if slope is None or slope <= PROMISED:
        return None
    return f"{name} grows with the {dimension} to the power of {slope}, where at most {PROMISED} is promised"


def epoch_rows(marks: tuple[int, ...], names: list[str], seconds: float) -> Iterator[str]:
    """One row for each callback: cost of an epoch and size of the state, early and late."""
    for name in names:
        beside = functools.partial(EachEpoch, marks=marks, seconds=seconds)
        watcher = fit(name, [FILTERS] * 3, epochs=max(marks), samples=8, val=8, beside=beside)
        done = len(watcher.costs)
        costs = {mark: around(watcher.costs, mark) for mark in dict.fromkeys([*(m for m in marks if m < done), done])}
        own = ", ".join(f"{epoch}: {size / 1024:.3g}" for epoch, (size, _) in watcher.sizes.items())
        history = ", ".join(f"{epoch}: {size / 1024:.3g}" for epoch, (_, size) in watcher.sizes.items())
        yield f"| {name} | {milliseconds(costs)} | {own} | {history} |"


def main() -> int:
    """Prints two tables in Markdown, and what is broken on the error stream; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=CALLBACKS, default=list(CALLBACKS))
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds for the epochs of one callback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Their own clock shows the wall, which says little on a busy machine.
    InterpCallback.clock = staticmethod(time.process_time)  # type: ignore[method-assign]
    sizes = QUICK if options.quick else SIZES
    fit(options.only[0], [FILTERS] * 2)  # imports, and the first use of everything
    print("| callback | grows | CPU ms by size | exponent | |\n|---|---|---|---|---|")
    broken = []
    for growth in growths(sizes, options.only):
        print(growth_row(*growth), flush=True)
        broken += [problem] if (problem := broken_promise(*growth)) is not None else []
    print("\n| callback | CPU ms an epoch, by epoch | own state, KiB | history, KiB |\n|---|---|---|---|")
    for row in epoch_rows(sizes["epochs"], options.only, options.seconds):
        print(row, flush=True)
    for problem in broken:
        print(problem, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
