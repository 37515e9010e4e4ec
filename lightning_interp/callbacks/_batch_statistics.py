"""Batch normalisation in eval mode by the statistics of the batch, as in training, and not by the running ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_interp.callbacks._lightning import training_modes


def training_norms(trainer: Any, model: nn.Module) -> list[_NormBase]:
    """Modules that train with statistics of the batch, and evaluate with running ones; a frozen one does not."""
    modes = training_modes(trainer)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and modes.get(name, False)
    ]


@contextmanager
def by_the_batch(norms: Iterable[_NormBase]) -> Iterator[None]:
    """Takes the running statistics away, inside `undisturbed`, which brings them back.

    Not through training mode: in that, SyncBatchNorm waits for the other ranks.
    """
    tracking = [(norm, norm.track_running_stats) for norm in norms]
    try:
        for norm, _ in tracking:
            norm._buffers["running_mean"] = norm._buffers["running_var"] = None
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracks in tracking:
            norm.track_running_stats = tracks
