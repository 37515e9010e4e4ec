"""The fixed images that pictures are made of: the same ones for the whole run, without touching the user's loaders."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_interp._options import expected
from lightning_interp.callbacks._masks import read_masks
from lightning_interp.callbacks.batches import UnreadableError, read_batch
from lightning_interp.callbacks.guard import generators_kept, tensors_to, undisturbed

# Bytes of a tensor, and items of a list, that are too many to copy; how deep a data set is searched for them.
_LARGE, _LONG, _DEPTH = 1 << 20, 64, 4

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


def read_samples(
    trainer: Any, model: nn.Module, count: int, samples: Chosen | None = None, *, training: bool = False
) -> FixedSamples:
    """`fixed_samples` with the masks of the objects, where the batches hold any; if asked to, of the training set."""
    if isinstance(samples, str):
        return received(trainer, model, load(samples), own_reader=False)
    if isinstance(samples, tuple) and isinstance(samples[0], Tensor):
        return received(trainer, model, samples, own_reader=False)
    loader = None if training else first_indexable(trainer.val_dataloaders)
    if loader is None:  # not `or`: the truth of a loader is its length, and not all have one
        loader = first_indexable(trainer.train_dataloader)
    if loader is None:
        kind = type(getattr(_first_loader(trainer.train_dataloader), "dataset", None)).__name__
        raise UnreadableError(
            f"Expected a data set that can be read by index for the fixed samples, but got {kind}; use a map-style "
            "data set for them."
        )
    with generators_kept():
        twin = copy_of(loader.dataset)
        indices = range(min(count, len(twin))) if samples is None else checked(samples, len(twin))
        collate = getattr(loader, "collate_fn", None) or default_collate
        batch = collate([twin[index] for index in indices])
    return received(trainer, model, batch)


def received(trainer: Any, model: nn.Module, batch: Any, *, own_reader: bool = True) -> FixedSamples:
    """A batch as the model would receive it: moved, cast, and with the module's own hooks for batches."""
    with undisturbed(model, training=None):
        if own_reader:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
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


def checked(samples: Any, size: int) -> list[int]:
    """The indices as a list.

    Raises:
        ArgumentError: If one is beyond the data set.
    """
    beyond = [index for index in samples if index >= size]
    if beyond:
        raise expected("samples", f"indices below {size}, the size of the data set", beyond)
    return list(samples)


def load(path: str) -> Any:
    """The batch that a file holds: a tensor, (images, labels) or a dict.

    Raises:
        ArgumentError: If it can't be read.
    """
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


def first_indexable(loaders: Any) -> DataLoader[Any] | None:
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


def copy_of(dataset: Any) -> Any:
    """A copy of a data set, whose reading moves nothing of the original; what is large or uncopyable is shared."""
    memo: dict[int, Any] = {}
    _share(dataset, memo, _DEPTH)
    return _twin(dataset, memo, _DEPTH)


def _share(value: Any, memo: dict[int, Any], depth: int) -> None:
    """Notes what is not to be copied: large tensors and arrays, and the items of long lists."""
    if isinstance(value, Tensor | np.ndarray):
        if value.nbytes > _LARGE:
            memo[id(value)] = value
    elif isinstance(value, list | tuple | dict):
        if len(value) > _LONG:
            memo[id(value)] = copy.copy(value)
        elif depth:
            for item in value.values() if isinstance(value, dict) else value:
                _share(item, memo, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | FunctionType):
        for item in list(vars(value).values()):
            _share(item, memo, depth - 1)


def _twin(value: Any, memo: dict[int, Any], depth: int) -> Any:
    """A deep copy; where a part can't be copied (an open file, a lock), that part alone is shared."""
    try:
        return copy.deepcopy(value, dict(memo))  # a copy of the memo: a failed attempt leaves halves of objects in it
    except Exception:  # whatever the classes of users raise
        if not depth:
            return value
    if isinstance(value, list):
        return [_twin(item, memo, depth - 1) for item in value]
    if isinstance(value, dict):
        return {key: _twin(item, memo, depth - 1) for key, item in value.items()}
    try:
        twin = copy.copy(value)
        attributes = vars(twin)
    except Exception:
        return value
    if twin is not value:
        attributes.update({name: _twin(item, memo, depth - 1) for name, item in attributes.items()})
    return twin
