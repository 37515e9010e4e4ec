"""The fixed images that pictures are made of: the same ones for the whole run, without touching the user's loaders."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_interp._options import expected
from lightning_interp.callbacks._masks import read_masks
from lightning_interp.callbacks.batches import UnreadableError, read_batch
from lightning_interp.callbacks.guard import generators_kept, tensors_to, undisturbed

Chosen = Sequence[int] | str | tuple[Tensor, Tensor]
"""What the option `samples` takes, but None."""


def check_samples(argument: str, value: Any) -> None:
    """Refuses everything but indices, a path that ends in `.pt`, a pair of tensors of equal length, and None.

    Raises:
        ArgumentError: For anything else.
    """
    if value is None or (isinstance(value, str) and value.endswith((".pt", ".pth"))):
        return
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
            return
        if len(value) == 2 and all(isinstance(item, Tensor) and item.ndim for item in value):
            if len(value[0]) == len(value[1]) > 0:
                return
            value = tuple(tuple(item.shape) for item in value)
    raise expected(
        argument, "a list of indices, the path of a `.pt` file, a pair (images, labels) of equal length, or None", value
    )


def fixed_samples(
    trainer: Any, model: nn.Module, count: int, samples: Chosen | None = None
) -> tuple[Tensor, Tensor | None]:
    """The images that are shown for the whole run, as the model would receive them.

    They are read by index from a copy of the data set, so that no sampler, generator or worker of the user's moves.

    Args:
        trainer: A Trainer whose loaders are set up.
        model: The LightningModule.
        count: Number of images where `samples` is None; fewer where the data set is smaller.
        samples: Indices into the data set; the path of a file that `torch.save` wrote (a tensor, (images, labels) or
            a dict, as a batch); tensors. None takes the first `count` of the data set. The data set is the validation
            set, or the training set where the validation set can't be read by index.

    Returns:
        Images (N, ...) and labels (N, ...) or None, on the model's device.

    Raises:
        UnreadableError: If no data set can be read by index, or its samples hold no images.
        ArgumentError: If an index is beyond the data set, or the file can't be read.
    """
    images, labels, _ = read_samples(trainer, model, count, samples)
    return images, labels


class FixedSamples(NamedTuple):
    """What the pictures are made of.

    Attributes:
        images: (N, ...), as the model receives them.
        labels: (N, ...) or None.
        masks: (N, H, W) bool, where the object is, or None; see `_masks.read_masks`.
    """

    images: Tensor
    labels: Tensor | None
    masks: Tensor | None


def read_samples(trainer: Any, model: nn.Module, count: int, samples: Chosen | None = None) -> FixedSamples:
    """`fixed_samples` with the masks of the objects, where the batches hold any."""
    if isinstance(samples, str):
        return _received(trainer, model, _load(samples), own_reader=False)
    if isinstance(samples, tuple) and isinstance(samples[0], Tensor):
        return _received(trainer, model, samples, own_reader=False)
    loader = _indexable(trainer.val_dataloaders) or _indexable(trainer.train_dataloader)
    if loader is None:
        kind = type(getattr(_first_loader(trainer.train_dataloader), "dataset", None)).__name__
        raise UnreadableError(
            f"Expected a data set that can be read by index for the fixed samples, but got {kind}; use a map-style "
            "data set for them."
        )
    with generators_kept():
        twin = _copy(loader.dataset)
        indices = range(min(count, len(twin))) if samples is None else _checked(samples, len(twin))
        collate = getattr(loader, "collate_fn", None) or default_collate
        batch = collate([twin[index] for index in indices])
    return _received(trainer, model, batch)


def _received(trainer: Any, model: nn.Module, batch: Any, *, own_reader: bool = True) -> FixedSamples:
    """A batch as the model would receive it: moved, cast, and with the module's own hooks for batches."""
    with undisturbed(model, training=None):
        if own_reader:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        else:
            batch = tensors_to(trainer.precision_plugin.convert_input(batch), trainer.strategy.root_device)
        return keep(model if own_reader else nn.Identity(), batch)


def keep(model: nn.Module, batch: Any, count: int | None = None) -> FixedSamples:
    """The first samples of a batch that is on the device, copied.

    Raises:
        UnreadableError: If no images are found.
    """
    images, labels = read_batch(model, batch)
    masks = read_masks(batch, images)
    copies = [None if tensor is None else tensor[:count].detach().clone() for tensor in (images, labels, masks)]
    return FixedSamples(images[:count].detach().clone(), *copies[1:])


def _checked(samples: Any, size: int) -> list[int]:
    beyond = [index for index in samples if index >= size]
    if beyond:
        raise expected("samples", f"indices below {size}, the size of the data set", beyond)
    return list(samples)


def _load(path: str) -> Any:
    try:
        batch = torch.load(path, map_location="cpu", weights_only=True)
        images, labels = read_batch(nn.Identity(), batch)
    except Exception as error:
        raise expected(
            "samples",
            "a file with a tensor of images, (images, labels) or a dict of them",
            path,
            f"Reading it raised {type(error).__name__}: {error}",
        ) from error
    return batch if labels is None or isinstance(batch, dict) else (images, labels)


def _indexable(loaders: Any) -> DataLoader[Any] | None:
    """The first loader, if its data set can be read by index."""
    loader = _first_loader(loaders)
    dataset = getattr(loader, "dataset", None)
    readable = dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__")
    return loader if readable and hasattr(dataset, "__len__") else None


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
