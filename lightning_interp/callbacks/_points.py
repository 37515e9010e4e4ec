"""Many fixed samples, in parts: the points of an embedding, which would not fit on the device all at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate
from torch.utils.data._utils.collate import default_convert

from lightning_interp.callbacks._rows import Rows
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.samples import (
    Chosen,
    FixedSamples,
    checked,
    copy_of,
    first_indexable,
    keep,
    load,
    received,
)

# What is read is kept in memory up to so many bytes; more is read again each time, with the user's number of workers.
_KEPT = 1 << 27
_BATCH = 64
_SEED = 0

Split = Literal["val", "train"]


class Points:
    """The samples of a data set that are followed for a whole run.

    They are read by index from a copy of the data set, with the same random numbers each time, so that a random
    transform gives the same image each time as long as it draws from the generators of torch, numpy or python.

    Attributes:
        indices: Of the samples in their data set, in the order of the rows.
        from_training: Whether they are from the training set.
    """

    def __init__(self, indices: Sequence[int], *, from_training: bool, source: DataLoader[Any] | FixedSamples) -> None:
        """Reads nothing yet.

        Args:
            indices: Of the samples.
            from_training: Whether they are from the training set.
            source: The loader of the data set, or the samples themselves.
        """
        self.indices = list(indices)
        self.from_training = from_training
        self._given = source if isinstance(source, FixedSamples) else None
        self._loader = None if isinstance(source, FixedSamples) else source
        self._dataset: Any = None if self._loader is None else copy_of(self._loader.dataset)
        self._kept: FixedSamples | None = None
        self._places: dict[int, int] = {}  # row to its place in what is kept

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, trainer: Any, model: nn.Module, rows: Sequence[int]) -> Iterator[FixedSamples]:
        """The samples of these rows in their order, in batches on the device, as the model receives them.

        To be called inside `undisturbed`: it seeds the generators, and the model's own hooks for batches run.

        Args:
            trainer: A Trainer whose loaders are set up.
            model: The LightningModule.
            rows: Positions in `indices`.

        Raises:
            UnreadableError: If a batch holds no images.
        """
        parts = [list(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
        if self._given is not None:
            for part in parts:
                yield received(trainer, model, _raw(self._given, part), own_reader=False)
        elif self._kept is not None and all(row in self._places for row in rows):
            for part in parts:
                places = [self._places[row] for row in part]
                yield _to(_chosen(self._kept, places), trainer.strategy.root_device)
        else:
            yield from self._read_anew(trainer, model, list(rows))

    def _read_anew(self, trainer: Any, model: nn.Module, rows: list[int]) -> Iterator[FixedSamples]:
        images, labels, start = Rows(len(rows)), Rows(len(rows)), 0
        for raw in self._batches([self.indices[row] for row in rows]):
            batch = received(trainer, model, raw)
            if self._kept is None and _bytes(batch) * len(rows) <= _KEPT * len(batch.images):
                images.add(batch.images)
                if batch.labels is not None:
                    labels.add(batch.labels)
            else:
                images.drop()
            start += len(batch.images)
            yield batch
        if start != len(rows):
            raise UnreadableError(
                f"Expected the collate_fn of the loader to give {len(rows)} samples for as many indices, but got "
                f"{start}. Use one that neither drops nor adds samples."
            )
        kept = images.whole()
        if kept is not None:
            self._kept, self._places = FixedSamples(kept, labels.whole(), None), {row: i for i, row in enumerate(rows)}

    def images_at(self, trainer: Any, model: nn.Module, indices: Sequence[int]) -> list[Tensor]:
        """Images of the data set, also those that are not among the points, for pictures.

        A random transform may give them otherwise than `read` did, unless they are kept in memory. To be called inside
        `undisturbed`.

        Args:
            trainer: A Trainer whose loaders are set up.
            model: The LightningModule.
            indices: Into the data set; positions, where the points were given as tensors.

        Returns:
            (C, H, W) on the CPU, one for each index.
        """
        if self._given is not None:
            return [self._given.images[index].cpu() for index in indices]
        rows = {index: row for row, index in enumerate(self.indices)}
        known = {index: self._places[rows[index]] for index in indices if rows.get(index) in self._places}
        images = {} if self._kept is None else {index: self._kept.images[at] for index, at in known.items()}
        missing = [index for index in dict.fromkeys(indices) if index not in images]
        if missing:
            found = [image for raw in self._batches(missing) for image in received(trainer, model, raw).images.cpu()]
            images.update(zip(missing, found, strict=True))
        return [images[index] for index in indices]

    def _batches(self, indices: list[int]) -> Iterator[Any]:
        """Raw batches of the data set, read as the user's loader does, by a loader of our own."""
        loader = self._loader
        torch.manual_seed(_SEED)
        np.random.seed(_SEED)
        random.seed(_SEED)
        collate = getattr(loader, "collate_fn", None) or default_collate
        workers = getattr(loader, "num_workers", 0)
        size = getattr(loader, "batch_size", None) or _BATCH
        yield from DataLoader(
            Subset(self._dataset, indices),
            batch_size=size,
            num_workers=min(workers, -(-len(indices) // size)),
            collate_fn=default_collate if collate is default_convert else collate,
            generator=torch.Generator().manual_seed(_SEED),
            worker_init_fn=getattr(loader, "worker_init_fn", None),
            multiprocessing_context=getattr(loader, "multiprocessing_context", None) if workers else None,
        )


def choose_points(
    trainer: Any, count: int, samples: Chosen | None = None, *, split: Split = "val", first: bool = False
) -> Points:
    """The points that are followed, spread evenly over their data set: a sorted one holds one class at its head.

    Args:
        trainer: A Trainer whose loaders are set up.
        count: Most points where `samples` is None.
        samples: Indices into the data set; the path of a `.pt` file; (images, labels); None takes `count` of the data
            set.
        split: `"val"` takes the validation set, or the training set where that can't be read by index.
        first: Whether to take the first ones instead, as the other callbacks do that show few images.

    Raises:
        UnreadableError: If no data set can be read by index.
        ArgumentError: If an index is beyond the data set, or the file can't be read.
    """
    if isinstance(samples, str) or (isinstance(samples, tuple) and isinstance(samples[0], Tensor)):
        given = keep(nn.Identity(), load(samples) if isinstance(samples, str) else samples)
        return Points(range(len(given.images)), from_training=False, source=given)
    loader = first_indexable(trainer.val_dataloaders) if split == "val" else None
    from_training = loader is None
    loader = first_indexable(trainer.train_dataloader) if loader is None else loader
    if loader is None:
        raise UnreadableError(
            "Expected a data set that can be read by index (one with `__getitem__` and `__len__`), but got a stream. "
            "Use a map-style data set, or give the points as tensors: `samples=(images, labels)`."
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    indices = (
        (range(min(size, count)) if first else spread_indices(size, count))
        if samples is None
        else checked(samples, size)
    )
    return Points(indices, from_training=from_training, source=loader)


def is_stream(trainer: Any, samples: Chosen | None) -> bool:
    """Whether points can only be had from what the training delivers; the same on all ranks."""
    loaders = (trainer.val_dataloaders, trainer.train_dataloader)
    return samples is None and all(first_indexable(each) is None for each in loaders)


def spread_indices(size: int, count: int) -> list[int]:
    """At most `count` of the indices 0 to `size` - 1, evenly spaced.

    Example:
        >>> spread_indices(10, 4), spread_indices(3, 4)
        ([0, 2, 5, 7], [0, 1, 2])
    """
    if size <= count:
        return list(range(size))
    return [row * size // count for row in range(count)]


def _raw(samples: FixedSamples, rows: list[int]) -> tuple[Tensor, Tensor] | Tensor:
    images, labels, _ = _chosen(samples, rows)
    return images if labels is None else (images, labels)


def _chosen(samples: FixedSamples, rows: list[int]) -> FixedSamples:
    return FixedSamples(samples.images[rows], None if samples.labels is None else samples.labels[rows], None)


def _bytes(samples: FixedSamples) -> int:
    return samples.images.numel() * samples.images.element_size()


def _to(samples: FixedSamples, device: torch.device) -> FixedSamples:
    images, labels, masks = samples
    moved = [None if tensor is None else tensor.to(device) for tensor in (labels, masks)]
    return FixedSamples(images.to(device, copy=True), *moved)
