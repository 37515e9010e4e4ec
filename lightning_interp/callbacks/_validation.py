"""What the user's own validation said: for rules, without running the model again."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_interp.functional.transfer import to_host
from lightning_interp.rules.history import History

MOST = 64  # metrics that are kept; those logged first


def keep_validation(history: History, trainer: Any, *, step: int) -> None:
    """Records `validation_metric` and notes `validation_samples`. To be called when a validation has ended."""
    samples = validation_samples(trainer)
    if samples is not None:
        history.note("validation_samples", samples)
    for name, value in validation_metrics(trainer).items():
        history.record("validation_metric", value, step=step, layer=name)


def validation_metrics(trainer: Any) -> dict[str, float]:
    """The single numbers that `self.log` put into `trainer.callback_metrics`, without this package's own.

    Those logged in training are among them, as they last stood: where a number comes from can't be told.
    """
    found = {
        str(key): value.detach()
        for key, value in trainer.callback_metrics.items()
        if isinstance(value, Tensor) and value.numel() == 1 and not str(key).startswith("interp")
    }
    kept = dict(list(found.items())[:MOST])
    return {key: values[0] for key, values in zip(kept, to_host(list(kept.values())), strict=True)} if kept else {}


def validation_samples(trainer: Any) -> int | None:
    """Samples that one validation looks at, on all ranks; None where a length is not known."""
    total, batches = 0, list(tree_leaves(trainer.num_val_batches))
    loaders = tree_leaves(trainer.val_dataloaders)
    if not loaders or len(loaders) != len(batches):
        return None
    for loader, count in zip(loaders, batches, strict=True):
        data, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
        if not isinstance(data, Sized) or not isinstance(size, int) or count == float("inf"):
            return None
        total += min(len(data), int(count) * size * trainer.world_size)
    return total
