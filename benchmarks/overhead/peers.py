"""Other tools that look at a training step, as published, each driven the way in which its own loop drives it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.overhead.watch import Watch, finite, load, require

_KINDS = ("gradients", "parameters")  # of what wandb logs of each weight


class FiredCounts(Watch):
    """What is often written by hand: how often each channel of a ReLU fires."""

    name = "by hand: a hook on each ReLU, (out > 0).sum() by channel"

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._counts: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            self._counts[name] = (output > 0).sum(dim=(0, 2, 3))

        return count

    def check(self) -> None:
        require(self._counts and all(counts.sum() > 0 for counts in self._counts.values()), self.name)


class FastaiStats(Watch):
    """fastai's `ActivationStats`; its Learner is stood in for by the three attributes that the callback reads."""

    def __init__(self, *, with_hist: bool = False) -> None:
        self.with_hist = with_hist
        self.name = "fastai ActivationStats" + (", with_hist" if with_hist else "")

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._callback = load("fastai.callback.hook").ActivationStats(with_hist=self.with_hist)
        self._callback.learn = SimpleNamespace(model=model, training=True, train_iter=0)
        self._callback.before_fit()

    def before_forward(self) -> None:
        self._callback.before_batch()

    def after_step(self, loss: Tensor) -> None:
        self._callback.after_batch()
        self._callback.learn.train_iter += 1

    def check(self) -> None:
        stats = self._callback.stats
        require(len(stats) and len(stats[-1]), self.name)
        require(all(finite([layer["std"]]) for layer in stats[-1]), self.name)
        if self.with_hist:
            require(all("hist" in layer for layer in stats[-1]), self.name)

    def close(self) -> None:
        self._callback.after_fit()


class WandbWatch(Watch):
    """`wandb.watch(log="all")` with the run offline, at a step that it logs, or between two of them."""

    def __init__(self, *, due: bool = True) -> None:
        self.due = due
        self.name = 'wandb.watch(log="all"), offline' + ("" if due else ", a step between")
        self.looks_at = 1000 if due else 1  # its default `log_freq`

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        os.environ["WANDB_SILENT"] = "true"
        wandb = load("wandb")
        self._folder = folder
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        self._run = wandb.init(mode="offline", dir=str(folder), project="overhead", settings=settings)
        self._run.watch(model, log="all", log_freq=1 if self.due else 1000)
        self._logged = [name for name, weight in model.named_parameters() if weight.requires_grad]

    def after_step(self, loss: Tensor) -> None:
        self._run.log({"loss": 0.0})

    def check(self) -> None:
        self.close()
        logs = [path.read_bytes() for path in self._folder.rglob("offline-run-*/*.wandb")]
        require(logs, self.name)
        for name in self._logged if self.due else ():
            # The second model that is watched in a process, and all later ones, are logged as `graph_<n>`.
            keys = [re.compile(rf"{kind}/(graph_\d+)?{re.escape(name)}".encode()) for kind in _KINDS]
            require(all(any(key.search(log) for log in logs) for key in keys), self.name)

    def close(self) -> None:
        """Twice does no harm."""
        self._run.finish()


class DelveSaturation(Watch):
    """delve's `SaturationTracker` at its defaults; what it computes at the end of an epoch is not in the step."""

    name = "delve SaturationTracker"

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        tracker = load("delve").SaturationTracker
        logging.getLogger("delve.logger").setLevel(logging.WARNING)
        device = str(next(model.parameters()).device)
        self._file = folder / "saturation.csv"
        self._tracker = tracker(str(folder / "saturation"), save_to="csv", modules=model, device=device)

    def check(self) -> None:
        self._tracker.add_saturations()
        require(self._file.is_file(), self.name)
        _, *rows = self._file.read_text().splitlines()
        require(rows and finite(rows[-1].split(";")[1:]), self.name)

    def close(self) -> None:
        self._tracker.close()


class ComposerMonitor(Watch):
    """composer's `ActivationMonitor`; State is stood in for by what it reads: the model and the time."""

    name = "composer ActivationMonitor"
    looks_at = 25  # its default interval, in batches

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        monitor = load("composer.callbacks").ActivationMonitor
        loggers, timestamp = load("composer.loggers"), load("composer.core").Timestamp()
        self._state = SimpleNamespace(model=model, timestamp=timestamp)
        self._memory = loggers.InMemoryLogger()
        self._logger = loggers.Logger(self._state, destinations=[self._memory])
        self._memory.init(self._state, self._logger)
        self._monitor = monitor(interval="1ba")

    def before_forward(self) -> None:
        self._monitor.before_forward(self._state, self._logger)

    def before_backward(self, loss: Tensor) -> None:
        self._monitor.after_forward(self._state, self._logger)
        self._state.timestamp = self._state.timestamp.to_next_batch()

    def check(self) -> None:
        latest = self._memory.most_recent_values
        require(finite(value for key, value in latest.items() if key.startswith("activations/l2_norm/")), self.name)


class WeightHistograms(Watch):
    """TensorBoard histograms of all weights."""

    name = "TensorBoard add_histogram of all weights"

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._model, self._folder, self._step = model, folder, 0
        self._writer = load("torch.utils.tensorboard").SummaryWriter(str(folder))

    def after_step(self, loss: Tensor) -> None:
        for name, weight in self._model.named_parameters():
            self._writer.add_histogram(name, weight, self._step)
        self._step += 1

    def check(self) -> None:
        self.close()
        found = load("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(self._folder))
        names = {name for name, _ in self._model.named_parameters()}
        require(set(found.Reload().Tags()["histograms"]) == names, self.name)

    def close(self) -> None:
        """Twice does no harm."""
        self._writer.close()


def watches() -> list[Callable[[], Watch]]:
    """All of them."""
    return [
        FiredCounts,
        FastaiStats,
        lambda: FastaiStats(with_hist=True),
        WandbWatch,
        lambda: WandbWatch(due=False),
        DelveSaturation,
        ComposerMonitor,
        WeightHistograms,
    ]
