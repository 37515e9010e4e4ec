"""What a high validation loss comes from: how far running statistics and averaged weights lag behind the training."""

from __future__ import annotations

import random
from collections.abc import Sized
from math import ceil
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_interp.callbacks._batch_statistics import by_the_batch, training_norms
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import first_indexable, fixed_samples
from lightning_interp.callbacks.scores import ScoreModel, sample_losses
from lightning_interp.rules import History
from lightning_interp.rules.lagging_evaluation import explains_validation, in_doubt

_T = TypeVar("_T")
_SAMPLES, _BATCH = 64, 32
_PAUSE = 4  # validations that are left out after one that was as it seemed: the answer seldom changes


class EvaluationLook:
    """Passes fixed validation samples through the model as it is validated and as it is trained.

    Only where the last validation loss is far above the training loss. Averaged weights stand in the model from the
    beginning of the validation to its end, so the loss is taken once within and once after. A model or a data set that
    can't be read is left alone.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] | None = None
        self._evaluated: tuple[float, float] | None = None
        self._pause = 0

    def during(self, trainer: Any, model: nn.Module, history: History) -> None:
        """To be called once within a validation; nothing here waits for another rank."""
        self._evaluated = None
        if is_sharded(trainer) or not in_doubt(history):
            return
        if self._pause:
            self._pause -= 1
            return
        norms = training_norms(trainer, model)
        running = self._loss(trainer, model, [])
        batch = self._loss(trainer, model, norms) if norms else running
        if running is not None and batch is not None:
            self._evaluated = running, batch

    def after(self, trainer: Any, model: nn.Module, history: History, *, step: int) -> None:
        """To be called at the end of the validation, when what the user logged is in the history."""
        evaluated, self._evaluated = self._evaluated, None
        trained = None if evaluated is None else self._loss(trainer, model, training_norms(trainer, model))
        if evaluated is None or trained is None:
            return
        running, batch = evaluated
        history.record("statistics_lag", running - batch, step=step)
        history.record("weights_lag", batch - trained, step=step)
        self._pause = 0 if explains_validation(history) else _PAUSE

    def _loss(self, trainer: Any, model: nn.Module, norms: list[_NormBase]) -> float | None:
        """Mean cross-entropy in nats, with these modules normalising by the batch."""
        losses = []
        try:
            for images, labels in self._samples(trainer, model):
                with undisturbed(model), torch.no_grad(), by_the_batch(norms):
                    losses.append(_required(sample_losses(ScoreModel(model)(images), labels)))
            return float(torch.cat(losses).mean()) if losses else None
        except Exception:  # its forward takes something else, or the labels are no classes
            self._batches = []
            return None

    def _samples(self, trainer: Any, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        if self._batches is None:
            try:
                self._batches = _drawn(trainer, model)
            except Exception:  # none can be read
                self._batches = []
        return self._batches


def _drawn(trainer: Any, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Batches of nearly equal size, no larger than those of the training, drawn from all of the validation set.

    Many data sets are sorted by class, and the statistics of one class are not those of the training.
    """
    size = getattr(first_indexable(trainer.train_dataloader), "batch_size", None) or _BATCH
    total = len(cast("Sized", _required(first_indexable(trainer.val_dataloaders)).dataset))
    indices = random.Random(0).sample(range(total), min(_SAMPLES, total))
    images, labels = fixed_samples(trainer, model, len(indices), indices)
    parts = ceil(len(images) / min(size, _BATCH))
    return list(zip(images.tensor_split(parts), _required(labels).tensor_split(parts), strict=True))


def _required(value: _T | None) -> _T:
    if value is None:
        raise UnreadableError("Expected labelled images of a data set that can be read by index.")
    return value
