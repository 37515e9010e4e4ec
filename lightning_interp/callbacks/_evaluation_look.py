"""What a high validation loss comes from: how far running statistics and averaged weights lag behind the training."""

from __future__ import annotations

import random
from collections.abc import Sized
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_interp.callbacks._batch_statistics import by_the_batch, training_norms
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import first_indexable, read_samples
from lightning_interp.callbacks.scores import ScoreModel, sample_losses
from lightning_interp.rules import History
from lightning_interp.rules.validation_mismatch import explains_validation, in_doubt

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
        self._batches: dict[bool, list[tuple[Tensor, Tensor]]] = {}  # of the training set or not
        self._evaluated: tuple[float, float, float | None] | None = None
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
            on_training = self._training_lag(trainer, model, norms) if running > batch else None
            self._evaluated = running, batch, on_training

    def after(self, trainer: Any, model: nn.Module, history: History, *, step: int) -> None:
        """To be called at the end of the validation, when what the user logged is in the history."""
        evaluated, self._evaluated = self._evaluated, None
        trained = None if evaluated is None else self._loss(trainer, model, training_norms(trainer, model))
        if evaluated is None or trained is None:
            return
        running, batch, on_training = evaluated
        if on_training is not None:
            history.record("training_statistics_lag", on_training, step=step)
        history.record("statistics_lag", running - batch, step=step)
        history.record("weights_lag", batch - trained, step=step)
        self._pause = 0 if explains_validation(history) else _PAUSE

    def _training_lag(self, trainer: Any, model: nn.Module, norms: list[_NormBase]) -> float | None:
        """How far running statistics raise the loss of training images: little, if only the validation's are unlike."""
        running = self._loss(trainer, model, [], training=True)
        batch = self._loss(trainer, model, norms, training=True)
        return None if running is None or batch is None else running - batch

    def _loss(self, trainer: Any, model: nn.Module, norms: list[_NormBase], *, training: bool = False) -> float | None:
        """Mean cross-entropy in nats, with these modules normalising by the batch."""
        losses = []
        try:
            for images, labels in self._samples(trainer, model, training):
                with undisturbed(model), torch.no_grad(), by_the_batch(norms):
                    losses.append(_required(sample_losses(ScoreModel(model)(images), labels)))
            return float(torch.cat(losses).mean()) if losses else None
        except Exception:  # its forward takes something else, or the labels are no classes
            self._batches[training] = []
            return None

    def _samples(self, trainer: Any, model: nn.Module, training: bool) -> list[tuple[Tensor, Tensor]]:
        if training not in self._batches:
            try:
                self._batches[training] = _drawn(trainer, model, training=training)
            except Exception:  # none can be read
                self._batches[training] = []
        return self._batches[training]


def _drawn(trainer: Any, model: nn.Module, *, training: bool) -> list[tuple[Tensor, Tensor]]:
    """Batches of nearly equal size, about that of the training, drawn from all of the data set.

    Many data sets are sorted by class, and the statistics of one class are not those of the training.
    """
    size = getattr(first_indexable(trainer.train_dataloader), "batch_size", None) or _BATCH
    loaders = trainer.train_dataloader if training else trainer.val_dataloaders
    total = len(cast("Sized", _required(first_indexable(loaders)).dataset))
    indices = random.Random(0).sample(range(total), min(_SAMPLES, total))
    images, labels, _ = read_samples(trainer, model, len(indices), indices, training=training)
    parts = max(1, len(images) // min(size, _BATCH))  # none smaller: a batch of one may have no statistics
    return list(zip(images.tensor_split(parts), _required(labels).tensor_split(parts), strict=True))


def _required(value: _T | None) -> _T:
    if value is None:
        raise UnreadableError("Expected labelled images of a data set that can be read by index.")
    return value
