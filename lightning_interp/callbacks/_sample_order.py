"""Which samples a training batch holds, as indices into the data set: noted while the sampler hands them out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter, _SingleProcessDataLoaderIter

from lightning_interp.callbacks._followed_sampler import Draws, follow, unfollow

_ITERATORS = (_SingleProcessDataLoaderIter, _MultiProcessingDataLoaderIter)
_SPARE = 64  # batches that are kept besides those that workers have been asked for


class SampleOrder:
    """Knows the indices of the samples of each training batch; the user changes nothing.

    The sampler of the training loader is followed from before Lightning first iterates the loader: its object gets, for
    the length of the fit, a subclass of its own class whose `__iter__` notes what it yields. It is never iterated or
    asked for a number by us, and copies and pickles of it have the plain class. How many batches the loader has
    delivered is read off the iterator that Lightning uses, so neither another iteration of the same loader nor one that
    was left half-way nor a resume can shift the count.

    An index counts in the data set that the loader has: for a `Subset`, in the subset. A `collate_fn` or a transfer
    hook that changes the order within a batch, but not its length, goes unnoticed here; see `SampleLosses`.

    Attributes:
        reason: Why the indices can't be known and what to do, in one sentence; None as long as they can.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._size: int | None = None
        self._trainer: Any = None
        self._tap: _Tap | None = None
        self._samplers: list[tuple[Any, str | None]] = []  # with what keeps them from being followed
        self._loader: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, even one made during a fit, follows nothing."""
        return {**vars(self), "_trainer": None, "_tap": None, "_samplers": [], "_loader": None}

    def install(self, trainer: Any) -> None:
        """Waits for the training loader. To be called in `setup`; `remove` must follow, also after an exception."""
        self.remove()
        self.reason = self._size = None
        self._trainer = trainer
        self._tap = _Tap(trainer.strategy, self._watch)

    def remove(self) -> None:
        """Puts all back as it was. May be called at any time, more than once."""
        if self._tap is not None:
            self._tap.take_off()
        self._let_go()
        self._trainer = self._tap = self._loader = None

    @property
    def size(self) -> int | None:
        """Samples in the data set of the training loader, from `on_train_start` on; None if that can't be known."""
        self._look()
        return self._size

    def indices(self, size: int) -> Tensor | None:
        """The indices of the batch that the loop holds; between `on_train_batch_start` and `on_train_batch_end`.

        Args:
            size: Samples in the batch as it was delivered.

        Returns:
            (size,) int64 on the CPU, in the order of the batch; None if they can't be known, see `reason`.
        """
        self._look()
        if self._trainer is None or self.reason is not None:
            return None
        found: Tensor | None = None
        try:
            found = self._delivered()
        except (AttributeError, IndexError):  # private parts of Lightning and torch
            self.reason = "this version of Lightning or torch delivers batches in a way that is not known here"
        if found is not None and self._size is not None:
            self.reason = _misfit(found, size, self._size)
        return found if self.reason is None else None

    # ------------------------------------------------------------------ the loader

    def _watch(self, loader: Any) -> None:
        """Lightning is about to use this loader, perhaps for training."""
        if self._trainer is not None and self._trainer.training and isinstance(loader, DataLoader):
            sampler = _sampler_of(loader)
            if any(sampler is seen for seen, _ in self._samplers):
                return
            kept = loader.num_workers * (loader.prefetch_factor or 0) + _SPARE
            self._samplers.append((sampler, follow(sampler, kept)))

    def _let_go(self, but: Any = None) -> None:
        """Follows no sampler any more, but this one."""
        for sampler, problem in self._samplers:
            if problem is None and sampler is not but:
                unfollow(sampler)
        self._samplers = [entry for entry in self._samplers if entry[0] is but]

    def _look(self) -> None:
        """Which loader the loop uses now: another one after a reload."""
        if self._trainer is None or self.reason is not None:
            return
        combined = getattr(self._trainer.fit_loop, "_combined_loader", None)
        if combined is None:
            self.reason = "there is no training loader, or this version of Lightning keeps it in a place not known here"
        elif len(combined.flattened) != 1:
            self.reason = "a batch comes from several loaders, whose indices mean different samples; train with one"
        elif combined.flattened[0] is not self._loader:
            loader = self._loader = combined.flattened[0]
            self.reason = _unusable(loader)
            if self.reason is None:
                self._let_go(but=_sampler_of(loader))
                self.reason = next((problem for _, problem in self._samplers), None) or _another(loader, self._size)
                self._size = self._size or len(loader.dataset)

    def _delivered(self) -> Tensor | None:
        fetcher = self._trainer.fit_loop._data_fetcher
        if type(fetcher).__name__ == "_DataLoaderIterDataFetcher":
            self.reason = "`training_step` fetches its batches itself; let it take `batch` instead of `dataloader_iter`"
            return None
        iterators = fetcher.combined_loader._iterator.iterators
        draws = iterators[0]._sampler_iter if type(iterators[0]) in _ITERATORS else None
        if not isinstance(draws, Draws):
            self.reason = (
                "the training loader has an iterator of its own; use torch.utils.data.DataLoader, with a sampler "
                "that decides the order"
            )
            return None
        # Lightning fetches ahead where the length of the epoch is unknown.
        found = draws.at(iterators[0]._num_yielded - len(fetcher.batches) - 1)
        if found is None:
            self.reason = "the sampler yields something else than integers; use one that yields indices"
        return found


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """What decides which samples come when."""
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def _another(loader: DataLoader[Any], before: int | None) -> str | None:
    """What is wrong with a loader after a reload, or None."""
    now = len(loader.dataset)  # type: ignore[arg-type]
    if before in (None, now):
        return None
    return (
        f"the training data set had {before} samples and has {now} after it was reloaded; an index means the same "
        "sample for the whole run only if the data set stays the same"
    )


def _unusable(loader: Any) -> str | None:
    """What is wrong with a loader, or None."""
    if not isinstance(loader, DataLoader):
        return f"the training loader is a {type(loader).__name__}; use torch.utils.data.DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "the samples of an iterable data set have no index; use a map-style data set"
    try:
        len(loader.dataset)  # type: ignore[arg-type]
    except Exception:  # of the user's class
        return "the training data set has no length; give it a method `__len__`"
    if not getattr(loader, "in_order", True) and loader.num_workers > 1:
        return "the training loader may change the order of the batches; set in_order=True"
    return None


def _misfit(found: Tensor, size: int, limit: int) -> str | None:
    """What speaks against these being the indices of the batch, or None."""
    if len(found) != size:
        return (
            f"a batch held {size} samples where the sampler had asked for {len(found)}; use a collate_fn that "
            "neither drops nor adds samples"
        )
    if size and not 0 <= int(found.min()) <= int(found.max()) < limit:
        return f"the sampler yields indices outside of 0 to {limit - 1}; use one that stays within the data set"
    return None


class _Tap:
    """Sees every loader that Lightning makes ready, after the strategy has had its way with it and before its use."""

    def __init__(self, strategy: Any, see: Callable[[Any], None]) -> None:
        self.active = True
        self._strategy = strategy
        self._see = see
        self._before = strategy.process_dataloader
        self._on_instance = "process_dataloader" in vars(strategy)
        strategy.process_dataloader = self

    def __call__(self, loader: Any) -> Any:
        processed = self._before(loader)
        if self.active:
            with contextlib.suppress(Exception):  # it would end the fit; an order that has missed a loader says so
                self._see(processed)
        return processed

    def take_off(self) -> None:
        """Off the strategy; one that lies under another's stays there and does nothing until that one goes."""
        self.active = False
        attributes = vars(self._strategy)
        while isinstance(top := attributes.get("process_dataloader"), _Tap) and not top.active:
            if top._on_instance:
                attributes["process_dataloader"] = top._before
            else:
                del attributes["process_dataloader"]
