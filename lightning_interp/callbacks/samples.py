"""The fixed images that pictures are made of: the same ones for the whole run, without touching the user's loaders."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_interp.callbacks.batches import UnreadableError, read_batch
from lightning_interp.callbacks.guard import generators_kept, undisturbed


def fixed_samples(trainer: Any, model: nn.Module, count: int) -> tuple[Tensor, Tensor | None]:
    """The first `count` images of the validation set, else of the training set, as the model would receive them.

    They are read by index from a copy of the data set, so that no sampler, generator or worker of the user's moves.

    Args:
        trainer: A Trainer whose loaders are set up.
        model: The LightningModule.
        count: Number of images; fewer where the data set is smaller.

    Returns:
        Images (N, ...) and labels (N, ...) or None, on the model's device.

    Raises:
        UnreadableError: If no data set can be read by index, or its samples hold no images.
    """
    loader = _first_loader(trainer.val_dataloaders) or _first_loader(trainer.train_dataloader)
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UnreadableError(
            "Expected a data set that can be read by index for the fixed samples, but got "
            f"{type(dataset).__name__}; use a map-style data set for them."
        )
    with generators_kept():
        twin = _copy(dataset)
        items = [twin[index] for index in range(min(count, len(twin)))]
        collate = getattr(loader, "collate_fn", None) or default_collate
        batch = collate(items)
    with undisturbed(model, training=None):
        images, labels = read_batch(model, trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)))
        return images.detach().clone(), None if labels is None else labels.detach().clone()


def _first_loader(loaders: Any) -> DataLoader[Any] | None:
    if loaders is None or isinstance(loaders, DataLoader):
        return loaders
    nested: Iterable[Any] = loaders.values() if isinstance(loaders, dict) else loaders
    if isinstance(loaders, dict | list | tuple):
        return next((found for item in nested if (found := _first_loader(item)) is not None), None)
    return loaders if hasattr(loaders, "dataset") else None  # a loader of another library


def _copy(dataset: Any) -> Any:
    """A copy whose reading moves nothing of the original; tensors and arrays, which are large, are shared."""
    memo: dict[int, Any] = {}
    _share(dataset, memo, depth=4)
    try:
        return copy.deepcopy(dataset, memo)
    except Exception:  # an open file or a database handle can't be copied
        return copy.copy(dataset)


def _share(value: Any, memo: dict[int, Any], depth: int) -> None:
    if isinstance(value, Tensor | np.ndarray):
        memo[id(value)] = value
    elif isinstance(value, torch.Generator | random.Random | np.random.Generator) or depth == 0:
        return
    elif isinstance(value, list | tuple) and len(value) <= 64:  #  - a long list of paths holds no arrays
        for item in value:
            _share(item, memo, depth - 1)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            _share(item, memo, depth - 1)
