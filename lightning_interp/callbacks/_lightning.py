"""The only file that knows that Lightning comes under two names.

`pytorch_lightning.Callback` and `lightning.pytorch.Callback` are different classes, and each namespace's LightningCLI
accepts its own only; a class that inherits from both is accepted everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.sinks import is_tensorboard

__all__ = [
    "CallbackBase", "LightningModule", "Trainer", "accumulates", "axis_step", "fits", "log_directory", "planned_steps",
    "training_modes",
]  # fmt: skip

if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
    from pytorch_lightning import LightningModule, Trainer
else:
    LightningModule = Trainer = Any  # for annotations: which of the two namespaces is in use is not known
    _BOTH = ("pytorch_lightning", "lightning.pytorch")
    _NAMES = [name for name in _BOTH if importlib.util.find_spec(name.split(".")[0])]
    if not _NAMES:
        raise ModuleNotFoundError("lightning_interp needs PyTorch Lightning: pip install pytorch-lightning")
    CallbackBase = type("CallbackBase", tuple(importlib.import_module(name).Callback for name in _NAMES), {})


def fits(trainer: Any) -> bool:
    """Whether `trainer.fit` is running. Lightning's own comparison with a string takes 3 us, in each of our hooks."""
    return getattr(trainer.state.fn, "_value_", None) == "fit"


def axis_step(trainer: Any) -> int:
    """The step that `self.log` uses now: batches that stepped, not `global_step` (which counts every optimizer).

    At the end of a training epoch the count already stands one further than the last logged step; callers there
    subtract one.
    """
    steps = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if steps is None else steps)


def accumulates(trainer: Any) -> bool:
    """Whether the current batch ends without an optimizer step; the same on all ranks."""
    return trainer.accumulate_grad_batches != 1 and bool(trainer.fit_loop._should_accumulate())


def planned_steps(trainer: Any) -> float:
    """Optimizer steps that the run is going to take, infinity when that is unknown."""
    steps = trainer.max_steps if trainer.max_steps is not None and trainer.max_steps >= 0 else float("inf")
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and batches != float("inf"):
        per_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
        steps = min(steps, trainer.max_epochs * per_epoch)
    return float(steps)


def log_directory(trainer: Any) -> str | None:
    """Where a run's files belong: beside its TensorBoard events, else the first logger's folder, else nowhere.

    Not `trainer.log_dir`, which is a collective: a rank that failed before would be waited for. So only rank zero knows
    the right version of the folder, and only rank zero may write there.
    """
    if trainer.fast_dev_run or not trainer.loggers:
        return None
    logger = next((logger for logger in trainer.loggers if is_tensorboard(logger)), trainer.loggers[0])
    directory = getattr(logger, "log_dir", None)
    if directory is None and logger.save_dir is not None:
        # As ModelCheckpoint does: these loggers' runs share a folder.
        directory = Path(logger.save_dir) / str(logger.name) / str(logger.version)
    return None if directory is None else str(directory)


def training_modes(trainer: Any) -> dict[str, bool]:
    """Module to its train/eval flag in training; during a validation, what Lightning will set again after it."""
    kept = getattr(trainer.fit_loop.epoch_loop.val_loop, "_module_mode", None)  # no public name leads there
    if trainer.validating and kept is not None:
        return dict(kept.mode)
    return {name: module.training for name, module in trainer.lightning_module.named_modules()}
