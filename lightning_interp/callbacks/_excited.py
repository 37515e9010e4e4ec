"""Reads, while the validation loop runs, which of its images excite the filters most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._followed_sampler import plain_class
from lightning_interp.callbacks.batches import UnreadableError, read_batch
from lightning_interp.callbacks.guard import generators_kept
from lightning_interp.callbacks.samples import first_indexable
from lightning_interp.functional.patches import PatchRanker, PatchRanking, merge_rankings
from lightning_interp.functional.reach import Reached, channels_second
from lightning_interp.functional.tracing import End, Unit

_FIELDS = 3


def index_of(trainer: Any) -> Callable[[int], int] | None:
    """How the n-th image that this rank validates on is numbered in the data set; None if that can't be known."""
    loader = first_indexable(trainer.val_dataloaders)
    batches: Any = getattr(loader, "batch_sampler", None)
    if loader is None or plain_class(batches) is not BatchSampler or batches.sampler is not loader.sampler:
        return None
    sampler, size = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    if plain_class(sampler) is SequentialSampler:
        return partial(_every, 1, 0, size) if trainer.world_size == 1 else None
    if isinstance(sampler, DistributedSampler) and not sampler.shuffle and size:
        return partial(_every, sampler.num_replicas, sampler.rank, size)
    return None


def _every(world: int, rank: int, size: int, n: int) -> int:
    """The n-th image of a rank: past the end it starts again, so that all ranks see equally many."""
    return (n * world + rank) % size


class Excited:
    """The strongest images of one run through the validation set.

    Attributes:
        grids: Unit to the axes of its activation behind the channels.
        count: Images seen.
    """

    def __init__(self, k: int, num_filters: int, number: Callable[[int], int] | None) -> None:
        """Starts empty.

        Args:
            k: Images per filter.
            num_filters: The first filters of each unit are ranked.
            number: From `index_of`; None keeps the images themselves.
        """
        self.grids: dict[str, tuple[int, ...]] = {}
        self.count = 0
        self.images: dict[int, Tensor] = {}
        self._k, self._num_filters, self._number = k, num_filters, number
        self._rankers: dict[str, PatchRanker] = {}
        self._size = 0
        self._read: set[str] = set()

    def begin_batch(self, size: int) -> None:
        """Says how many images the coming forward has."""
        self._size, self._read = size, set()

    def read(self, end: End) -> None:
        """Takes one activation; a second one of the same unit in a batch (another branch, another call) is left."""
        if end.unit in self._read or end.layout.axis == 0 or end.tensor.shape[0] != self._size:
            return
        self._read.add(end.unit)
        activation = channels_second(Reached(end.tensor, end.layout), self._size)[:, : self._num_filters]
        if self.grids.setdefault(end.unit, tuple(activation.shape[2:])) != tuple(activation.shape[2:]):
            raise ValueError("images of different sizes have no common positions to be ranked by")
        numbers = range(self.count, self.count + self._size)
        indices = [n if self._number is None else self._number(n) for n in numbers]
        ranker = self._rankers.setdefault(end.unit, PatchRanker(self._k))
        ranker.update(activation, torch.tensor(indices))

    def end_batch(self, images: Tensor | None, units: Sequence[str] | None) -> None:
        """Closes the batch; where images can't be read again, keeps those that are among the best so far.

        Args:
            images: The images of the batch, or None if they can be read by index.
            units: The units that will be shown; None if that is not known yet.
        """
        self.keep_only(units)
        first, self.count = self.count, self.count + self._size
        if images is None:
            return
        named = {int(i) for ranker in self._rankers.values() for i in ranker.ranking.indices.flatten().tolist()}
        self.images = {index: image for index, image in self.images.items() if index in named}
        for index in named:
            if first <= index < self.count:
                self.images[index] = images[index - first].detach().cpu().clone()

    def keep_only(self, units: Sequence[str] | None) -> None:
        """Forgets the units that are not to be shown."""
        if units is not None:
            self._rankers = {name: ranker for name, ranker in self._rankers.items() if name in units}

    def rankings(self) -> dict[str, PatchRanking]:
        """Unit to its ranking on the CPU."""
        return {name: PatchRanking(*(part.cpu() for part in ranker.ranking)) for name, ranker in self._rankers.items()}

    # ------------------------------------------------------------------ over ranks

    def pack(self, units: Sequence[str], filters: Mapping[str, int]) -> Tensor:
        """All rankings as one flat float64 vector, the same length on all ranks: one may have seen no batch."""
        found = self.rankings()
        parts = []
        for name in units:
            block = torch.full((_FIELDS, min(filters[name], self._num_filters), self._k), -1.0, dtype=torch.float64)
            block[0] = -torch.inf
            if name in found:
                ranking = torch.stack([part.double() for part in found[name]])
                block[:, :, : ranking.shape[2]] = ranking
            parts.append(block.flatten())
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def unpack(
        self, packed: Tensor, units: Sequence[str], filters: Mapping[str, int], trainer: Any
    ) -> dict[str, PatchRanking]:
        """One ranking for all ranks. Collective; after `agree` only."""
        gathered = torch.zeros(trainer.world_size, packed.numel(), dtype=torch.float64)
        gathered[trainer.global_rank] = packed
        gathered = _ranks.total(trainer, gathered)
        merged: dict[str, PatchRanking] = {}
        start = 0
        for name in units:
            shape = (_FIELDS, min(filters[name], self._num_filters), self._k)
            size = shape[0] * shape[1] * shape[2]
            blocks = gathered[:, start : start + size].reshape(-1, *shape)
            start += size
            rankings = [PatchRanking(b[0], b[1].long(), b[2].long()) for b in blocks]
            merged[name] = merge_rankings(rankings, k=self._k)
        return merged


def firing(ranking: PatchRanking, unit: Unit) -> PatchRanking:
    """Without the places of filters that did not fire: there the first images of the set stand, for no reason."""
    silent = ranking.values <= (0.0 if unit.exact_zero else -torch.inf)
    return PatchRanking(
        ranking.values.masked_fill(silent, -torch.inf),
        ranking.indices.masked_fill(silent, -1),
        ranking.positions.masked_fill(silent, -1),
    )


def turnover_of(before: list[list[int]], now: list[list[int]]) -> float | None:
    """Mean over filters of the share of images that were not among the strongest before; None where nothing fires.

    None too where the filters are not as many as before: the user has put another layer in its place.
    """
    if len(before) != len(now):
        return None
    shares = [len(set(new) - set(old)) / len(new) for old, new in zip(before, now, strict=True) if new]
    return sum(shares) / len(shares) if shares else None


def images_of(model: nn.Module, batch: Any) -> Tensor:
    """The images of a batch.

    Raises:
        UnreadableError: If there are none.
    """
    with generators_kept():  # a user's `interp_batch` may draw
        images, _ = read_batch(model, batch)
    if not isinstance(images, Tensor):
        raise UnreadableError(f"Expected images as one tensor, but got {type(images).__name__}.")
    return images
