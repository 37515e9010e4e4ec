"""Section `fits`: what `Interp()` costs over a whole fit, over one without it, in turns.

Without it all epochs are alike, so there are fewer of them, spread over those of the watched fit, and their time is
scaled up.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead import goals, table
from benchmarks.overhead.direct import listening
from benchmarks.overhead.models import Case
from benchmarks.overhead.timing import Pairs, Stopwatch
from benchmarks.overhead.turns import PassOn, run_in_turns
from benchmarks.overhead.watch import require
from lightning_interp import Interp
from lightning_interp.callbacks._guarding import HOOKS, IN_BATCH
from lightning_interp.callbacks.base import InterpCallback

HEAD = ("network", "what", "measured", "goal")
_TURN = 10  # steps of the fit without the callbacks
_FEWER = 5  # times as many epochs are watched
VALIDATION = 5  # training batches for each of validation, as in CIFAR-10
_TAGS = ("interp.cost/", "interp.dead_filters/", "interp.filters/", "interp.saliency/", "interp.sparsity/",
         "interp.update_ratio/", "interp/knn_accuracy")  # fmt: skip


class Classifier(pl.LightningModule):
    """Any network with a cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("validation_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@dataclass
class FitCost:
    """Of one pair of fits, in processor seconds.

    Attributes:
        plain: Without the callbacks, scaled up to as many epochs.
        watched: With them.
        direct: Of that, inside their hooks and those that they put on the model.
        between: Of each step on which they put nothing on the model, inside their hooks.
        empty: Of each step without them, inside the hooks of a callback that does nothing in them.
        steps: Training steps.
        reported: Callback to the seconds that it logs itself as `interp.cost`.
    """

    plain: float
    watched: float
    direct: float
    between: list[float]
    empty: list[float]
    steps: int
    reported: dict[str, float] = field(default_factory=dict)


class _Empty(pl.Callback):
    """Does nothing in the hooks of a training step: the least that ours could cost, where steps empty the caches."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        for name in IN_BATCH:
            setattr(self, name, stopwatch.wrap(_nothing))


def _nothing(*args: Any) -> None:
    """Stands in for a hook."""


class _StepLog(pl.Callback):
    """Notes for each training step the time inside the watch, and what is on the model. To be the last callback."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.direct, self.hooks = [0.0], [0]  # the first entry: what comes before the first step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        modules = pl_module.modules()
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
        self.hooks.append(hooks + torch._C._len_torch_function_stack())

    def on_train_batch_end(self, *args: Any) -> None:
        self.direct.append(self.stopwatch.take())

    def on_validation_end(self, *args: Any) -> None:
        self.direct[0] += self.stopwatch.take()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.direct[0] += self.stopwatch.take()

    def on_fit_end(self, *args: Any) -> None:
        self.direct[0] += self.stopwatch.take()


def measure(case: Case, epochs: int, steps: int) -> FitCost:
    """One fit with `Interp()` and one without.

    Args:
        case: What is trained, on random images.
        epochs: Of each fit.
        steps: Training steps of an epoch.

    Raises:
        NothingMeasuredError: If a callback measured nothing.
    """
    generator = torch.Generator().manual_seed(0)
    count = steps * case.batch
    images = torch.randn(count, *case.shape, generator=generator)
    data = TensorDataset(images, torch.randint(0, case.classes, (count,), generator=generator))
    stopwatch, idle = Stopwatch(), Stopwatch()
    interp, log, empty_log = Interp(), _StepLog(stopwatch), _StepLog(idle)

    fewer = math.gcd(epochs, _FEWER)

    def fit(folder: Path, callbacks: list[pl.Callback], count: int) -> None:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=count,
            limit_val_batches=max(1, steps // VALIDATION),
            accelerator="cpu",
            logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(case.make()), DataLoader(data, case.batch, shuffle=True), DataLoader(data, case.batch))

    # What the callbacks report is wall time; here their clock is that of all the rest.
    own_clock = patch.object(InterpCallback, "clock", staticmethod(time.process_time))
    with tempfile.TemporaryDirectory() as scratch, listening(stopwatch), _timed(stopwatch), own_clock:
        folders = Path(scratch) / "plain", Path(scratch) / "watched"

        def plain(turn: PassOn) -> None:
            fit(folders[0], [turn, _Empty(idle), empty_log], epochs // fewer)

        def watched(turn: PassOn) -> None:
            fit(folders[1], [turn, interp, log], epochs)

        turns = run_in_turns([(plain, _TURN), (watched, _TURN * fewer)])
        costs = reported(folders[1], interp)
    between = [t for t, hooks in zip(log.direct[1:], log.hooks[1:], strict=True) if hooks == 0]
    before = turns.before[0] or 0.0  # the start is not repeated
    scaled = before + fewer * (turns.seconds[0] - before)
    return FitCost(scaled, turns.seconds[1], sum(log.direct), between, empty_log.direct[1:], len(log.direct) - 1, costs)


@contextmanager
def _timed(stopwatch: Stopwatch) -> Iterator[None]:
    """Counts the hooks of `Interp`, and what stands in for one of them while nothing is due."""
    with ExitStack() as stack:
        for name in (*HOOKS, "_while_dozing"):
            stack.enter_context(patch.object(Interp, name, stopwatch.wrap(getattr(Interp, name))))
        yield


def reported(folder: Path, interp: Interp) -> dict[str, float]:
    """What the callbacks say of their own time in the log, which must also hold what they measured."""
    require(not any(child.resting for child in interp.children), "Interp: a callback rests, and the fit")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1}).Reload()
    tags = [*events.Tags()["scalars"], *events.Tags()["images"]]
    for beginning in _TAGS:
        require(any(tag.startswith(beginning) for tag in tags), f"Interp: {beginning}")
    require(list(folder.rglob("projector_config.pbtxt")), "Interp: the projector")
    costs = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("interp.cost/")}
    return {tag.partition("/")[2]: seconds for tag, seconds in costs.items()}


def warm_up(case: Case) -> None:
    """Imports and caches: a first fit of three steps, not measured."""
    measure(case, epochs=1, steps=3)


def rows(case: Case, costs: list[FitCost]) -> Iterator[list[str]]:
    """The lines of the table for one network, from one or more pairs of fits."""
    pairs = Pairs([cost.plain for cost in costs], [cost.watched for cost in costs])
    share = statistics.median(cost.direct / cost.plain for cost in costs)
    goal = goals.FIT[case.size]
    yield [case.name, f"whole fit, ratio ({len(costs)} in turns)", f"{pairs.ratio:.3f}", goal.verdict(pairs.ratio - 1)]
    yield [case.name, "whole fit, direct share", table.share(share), goal.verdict(share)]
    for name in sorted(costs[0].reported, key=costs[0].reported.__getitem__, reverse=True):
        share = statistics.median(cost.reported[name] / cost.plain for cost in costs)
        yield [case.name, f"of it, `interp.cost/{name}`", table.share(share), ""]
    between = [seconds for cost in costs for seconds in cost.between]
    free = len(between) / sum(cost.steps for cost in costs)
    yield [case.name, "steps without any hook on the model", table.share(free), ""]
    if between:
        median = statistics.median(between)
        yield [case.name, "callbacks in such a step, median", table.duration(median), goals.BETWEEN.verdict(median)]
    median = statistics.median(seconds for cost in costs for seconds in cost.empty)
    yield [case.name, "there a callback with six empty hooks", table.duration(median), ""]


def text(cases: Iterable[Case], pairs: int, epochs: int, steps: int) -> str:
    """The whole section."""
    lines: list[list[str]] = []
    for case in cases:
        warm_up(case)
        lines += rows(case, [measure(case, epochs, steps) for _ in range(pairs)])
    plain = epochs // math.gcd(epochs, _FEWER)
    title = (
        f"A whole fit with `Interp()`: {epochs} epochs of {steps} steps and {max(1, steps // VALIDATION)} of "
        f"validation, over {plain} without, scaled up"
    )
    return table.markdown(title, HEAD, lines)
