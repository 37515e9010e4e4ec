"""What eval mode can't tell: whether a silent filter fires where batch normalisation goes by the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_interp.callbacks._lightning import training_modes
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
        norms = _lagging(trainer, model)
        if not norms:
            return
        for images in self._samples(trainer, model):
            layers = {layer for name in doubtful for layer in units[name].layers}
            tracer = ActivationTracer(model, window.feed_life, units=units, follow=layers)
            try:
                with undisturbed(model), _by_the_batch(norms), tracer:
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


def _lagging(trainer: Any, model: nn.Module) -> list[_NormBase]:
    """Modules that train with statistics of the batch, and evaluate with running ones; a frozen one does not."""
    modes = training_modes(trainer)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and modes.get(name, False)
    ]


@contextmanager
def _by_the_batch(norms: list[_NormBase]) -> Iterator[None]:
    """Takes the running statistics away, inside `undisturbed`, which brings them back.

    Not through training mode: in that, SyncBatchNorm waits for the other ranks.
    """
    tracking = [(norm, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm._buffers["running_mean"] = norm._buffers["running_var"] = None
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracks in tracking:
            norm.track_running_stats = tracks
