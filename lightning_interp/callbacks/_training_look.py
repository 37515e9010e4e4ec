"""What eval mode can't tell: whether a silent filter fires where batch normalisation goes by the batch."""

from __future__ import annotations

from math import ceil
from typing import Any

from torch import Tensor, nn

from lightning_interp.callbacks._batch_statistics import by_the_batch, training_norms
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import first_indexable, fixed_samples
from lightning_interp.callbacks.window import Units, Window
from lightning_interp.functional.tracing import ActivationTracer

_BATCHES, _BATCH = 4, 32


class TrainingLook:
    """Passes fixed samples through the model with the statistics of the batch, as the training forward normalises.

    The running statistics lag behind the weights, at a momentum of 0.01 by some hundred steps, and a filter that fires
    in training may be silent with them. All else stays in eval mode: a forward may ask for more in training than
    images, and the noise of dropout is no life. A model that can't be called with images is left at what was seen.
    """

    def __init__(self) -> None:
        self._batches: tuple[Tensor, ...] | None = None

    def run(self, trainer: Any, model: nn.Module, window: Window, names: list[str], units: Units) -> None:
        """Adds evidence of life to a window, if it lacks any of these units'; nothing here waits for another rank."""
        doubtful = window.doubtful() & set(names)
        if not doubtful or is_sharded(trainer):  # there, a forward on one rank waits for the others
            return
        norms = training_norms(trainer, model)
        if not norms:
            return
        for images in self._samples(trainer, model):
            layers = {layer for name in doubtful for layer in units[name].layers}
            tracer = ActivationTracer(model, window.feed_life, units=units, follow=layers)
            try:
                with undisturbed(model), by_the_batch(norms), tracer:
                    getattr(model, "interp_scores", model)(images)
            except Exception:  # its forward takes something else
                self._batches = ()
                return
            if tracer.error is not None:
                raise tracer.error
            doubtful &= window.doubtful()
            if not doubtful:
                return

    def _samples(self, trainer: Any, model: nn.Module) -> tuple[Tensor, ...]:
        """Batches of nearly equal size, no larger than those of the training: the memory allows these."""
        if self._batches is None:
            size = getattr(first_indexable(trainer.train_dataloader), "batch_size", None) or _BATCH
            size = min(size, _BATCH)
            try:
                images, _ = fixed_samples(trainer, model, _BATCHES * size)
                self._batches = images.tensor_split(ceil(len(images) / size))
            except Exception:  # none can be read
                self._batches = ()
        return self._batches
