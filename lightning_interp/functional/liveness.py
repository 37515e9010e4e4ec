"""Which filters have fired: exact over all batches, and next to free once all have.

A filter that fired once is alive; that can't be taken back. After the first batch nearly all are proven alive, so from
then on only the *suspects* are read, and a layer without suspects is not read at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp.functional import ops
from lightning_interp.functional.tracing import End
from lightning_interp.functional.transfer import HostCopy

_FEW = 8  # one in so many samples is read first
_LISTED, _LISTED_ON_GPU = 1 / 2, 1 / 16


def fired(channels: Tensor, activation: str | None) -> Tensor:
    """Which channels show life in one forward.

    Behind a non-linearity with an exact zero (ReLU and its kin) a channel lives if it is anywhere different from zero,
    otherwise if it is not constant over batch and positions. NaN counts as life: it is not zero.

    Args:
        channels: (P, C, Q), positions before and after the channel axis.
        activation: Name of the non-linearity, or None.

    Returns:
        (C,), bool.
    """
    high = _extreme(channels, largest=True)
    if activation in ops.EXACT_ZERO and activation in ops.NON_NEGATIVE:
        return high != 0
    low = _extreme(channels, largest=False)
    if activation in ops.EXACT_ZERO:
        return (high != 0) | (low != 0)
    return high != low


def _extreme(channels: Tensor, *, largest: bool) -> Tensor:
    """(P, C, Q) -> (C,). The inner axis first: that reads memory in order, three times as fast on a CPU."""
    reduce = torch.amax if largest else torch.amin
    return reduce(reduce(channels, dim=2) if channels.shape[2] > 1 else channels[:, :, 0], dim=0)


def _fired_soon(channels: Tensor, activation: str | None) -> Tensor:
    """As `fired`, on a CPU: what the first few samples do proves nearly all filters alive."""
    few = channels.shape[0] // _FEW
    alive = fired(channels[:few], activation)
    if not bool(alive.all()):
        suspects = (~alive).nonzero().flatten()
        # Where a value that changes is life, one that is constant among the first may be another among the rest.
        rest = channels[few:] if activation in ops.EXACT_ZERO else channels
        alive.index_copy_(0, suspects, fired(rest.index_select(1, suspects), activation))
    return alive


def _silent(channels: Tensor, activation: str | None) -> bool:
    """Whether no channel at all has fired, where one number on a CPU says so; True is certain, False is not."""
    one_tells = activation in ops.EXACT_ZERO and activation in ops.NON_NEGATIVE
    return one_tells and channels.device.type == "cpu" and channels.numel() > 0 and not bool(channels.max())


class _Watch:
    """Evidence about one unit in the current window.

    Attributes:
        alive: (C,) bool, on the device of the activations; what `evidence` adds may be missing.
        suspects: Indices of the channels to read, on the device; None reads all.
        evidence: (S,) bool, on the device: which of the suspects have fired since they are read; None if nothing is
            known of them.
        num_suspects: Their number, as the host knows it; -1 if it knows nothing.
        forwards: Forwards that could tell life from death.
    """

    def __init__(self, alive: Tensor, forwards: int = 0) -> None:
        self.alive = alive
        self.forwards = forwards
        self.num_suspects = -1
        self.evidence: Tensor | None = None
        self.suspects: Tensor | None = None
        self._listed: Tensor | None = None  # the suspects, on the CPU

    def read(self, channels: Tensor, activation: str | None) -> None:
        """Takes note of (P, C, Q), without a wait for the device."""
        if self.suspects is not None:
            chosen = channels.index_select(1, self.suspects)
            if self.evidence is not None and _silent(chosen, activation):
                return  # as on most batches: the dead are still dead
            now = fired(chosen, activation)
            self.evidence = now if self.evidence is None else self.evidence.logical_or_(now)
            return
        soon = channels.device.type == "cpu" and channels.shape[0] >= 2 * _FEW
        now = _fired_soon(channels, activation) if soon else fired(channels, activation)
        self.alive = self.alive.logical_or_(now) if self.forwards > 1 else now

    def merge(self) -> None:
        """Brings `alive` up to date."""
        if self.evidence is not None and self.suspects is not None:
            # A suspect of a list that arrived late may have fired before it was listed.
            before = self.alive.index_select(0, self.suspects)
            self.alive.index_copy_(0, self.suspects, before.logical_or_(self.evidence))

    def narrow(self, seen: Tensor) -> None:
        """Drops suspects.

        Args:
            seen: On the CPU; which of the suspects, or of all channels where all are read, have fired.
        """
        left = (~seen).nonzero().flatten()
        if left.numel() == self.num_suspects:
            return
        self.merge()
        self.num_suspects = left.numel()
        left = left if self._listed is None else self._listed[left]
        # Reading so large a share of the channels by index costs as much as reading all of them: on a CPU half of them,
        # on a GPU, where channels-last stands in the way of an index, next to none.
        share = _LISTED_ON_GPU if self.alive.is_cuda else _LISTED
        self._listed = left if left.numel() <= share * self.alive.numel() else None
        self.suspects = None if self._listed is None else self._listed.to(self.alive.device, non_blocking=True)
        self.evidence = None

    def forget_suspects(self) -> None:
        """Reads all channels again."""
        self.merge()
        self.num_suspects, self.suspects, self.evidence, self._listed = -1, None, None, None


class _Report:
    """What is known of all suspects at one moment, on its way to the host.

    On a GPU it arrives some batches later, without a wait. A stale report only leaves suspects too many, so the result
    stays exact.
    """

    def __init__(self, watches: list[_Watch]) -> None:
        parts = [watch.alive if watch.suspects is None else watch.evidence for watch in watches]
        known = [(watch, part) for watch, part in zip(watches, parts, strict=True) if part is not None]
        self._about = [(watch, watch.suspects, part.numel()) for watch, part in known]
        self._copy = HostCopy(torch.cat([part for _, part in known]) if known else torch.empty(0, dtype=torch.bool))

    @property
    def arrived(self) -> bool:
        """Whether it can be read without a wait."""
        return self._copy.arrived

    def read(self) -> None:
        """Narrows those whose suspects are still the same."""
        flat = self._copy.get()
        if all(suspects is not None for _, suspects, _ in self._about) and not bool(flat.any()):
            return  # as on most batches: the dead are still dead
        sizes = [count for _, _, count in self._about]
        for (watch, suspects, count), seen in zip(self._about, torch.split(flat, sizes), strict=True):
            if watch.suspects is suspects and watch.num_suspects != count - int(seen.count_nonzero()):
                watch.narrow(seen)


class Liveness:
    """Collects evidence of life over a window of forwards.

    Feed it with `read` (a reader for `ActivationTracer`), call `narrow` between batches, and read `dead` at the end.
    Nothing in `read` waits for the device.
    """

    def __init__(self) -> None:
        self._watches: dict[str, _Watch] = {}
        self._report: _Report | None = None

    def read(self, end: End) -> None:
        """Takes note of one activation."""
        tensor, size = end.tensor, end.layout.size
        watch = self._watches.get(end.unit)
        if watch is None or watch.alive.numel() != size:  # new, or replaced by the user in mid-window
            alive = torch.zeros(size, dtype=torch.bool, device=tensor.device)
            watch = self._watches[end.unit] = _Watch(alive)
        if watch.num_suspects == 0:
            watch.forwards += 1
            return
        if watch.alive.device != tensor.device:  # evidence from before a resume lies on the CPU
            watch.forget_suspects()
            watch.alive = watch.alive.to(tensor.device)
        channels = end.layout.channels_first(tensor)
        if end.activation not in ops.EXACT_ZERO and channels.shape[0] * channels.shape[2] < 2:
            return  # a single value per channel is constant whatever the filter does
        watch.forwards += 1
        watch.read(channels, end.activation)

    def narrow(self) -> None:
        """Drops proven filters from the list of suspects. On a GPU the list arrives some batches later."""
        if self._report is None:
            doubtful = [watch for watch in self._watches.values() if watch.num_suspects != 0]
            if len({watch.alive.device for watch in doubtful}) != 1:
                return  # nothing is doubtful, or not all layers have been read since a resume
            self._report = _Report(doubtful)
        if self._report.arrived:
            report, self._report = self._report, None
            report.read()

    def suspects(self) -> set[str]:
        """Units that may still hold dead filters, as far as the host knows."""
        return {name for name, watch in self._watches.items() if watch.num_suspects != 0}

    def seen(self) -> set[str]:
        """Units that at least one forward could judge."""
        return {name for name, watch in self._watches.items() if watch.forwards}

    def alive(self) -> dict[str, Tensor]:
        """Unit to (C,) bool on the CPU: True where life was seen. Units that no forward could judge are left out."""
        for watch in self._watches.values():
            watch.merge()
        return {name: watch.alive.cpu() for name, watch in self._watches.items() if watch.forwards}

    def dead(self) -> dict[str, Tensor]:
        """The contrary of `alive`."""
        return {name: ~alive for name, alive in self.alive().items()}

    def absorb(self, alive: dict[str, Tensor]) -> None:
        """Adds evidence collected elsewhere: before a resume, or on another rank. `alive`: unit to (C,) bool."""
        for name, mask in alive.items():
            watch = self._watches.get(name)
            if watch is None:
                self._watches[name] = _Watch(mask.clone(), forwards=1)
            else:
                watch.forget_suspects()
                watch.alive |= mask.to(watch.alive.device)
                watch.forwards += 1

    def __len__(self) -> int:
        return len(self._watches)
