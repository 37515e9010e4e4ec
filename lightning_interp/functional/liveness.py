"""Which filters have fired: exact over all batches, and next to free once all have.

A filter that fired once is alive; that can't be taken back. After the first batch nearly all are proven alive, so from
then on only the *suspects* are read, and a layer without suspects is not read at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp.functional import ops
from lightning_interp.functional.tracing import End


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
    if channels.shape[2] > 1:
        channels = reduce(channels, dim=2)
    return reduce(channels.reshape(channels.shape[0], -1), dim=0)


@dataclass
class _Watch:
    """Evidence about one unit in the current window.

    Attributes:
        alive: (C,) bool, on the device of the activations.
        suspects: Indices of the channels to read, on the device; None reads all.
        num_suspects: Their number, as the host knows it.
        forwards: Forwards that could tell life from death.
    """

    alive: Tensor
    suspects: Tensor | None = None
    num_suspects: int = -1
    forwards: int = 0


class Liveness:
    """Collects evidence of life over a window of forwards.

    Feed it with `read` (a reader for `ActivationTracer`), call `narrow` between batches, and read `dead` at the end.
    Nothing in `read` waits for the device.
    """

    def __init__(self) -> None:
        self._watches: dict[str, _Watch] = {}
        self._copies: tuple[Tensor, torch.cuda.Event, list[str]] | None = None

    def read(self, end: End) -> None:
        """Takes note of one activation."""
        watch = self._watches.get(end.unit)
        if watch is None or watch.alive.numel() != end.layout.size:  # new, or replaced by the user in mid-window
            alive = torch.zeros(end.layout.size, dtype=torch.bool, device=end.tensor.device)
            watch = self._watches[end.unit] = _Watch(alive)
        if watch.num_suspects == 0:
            watch.forwards += 1
            return
        if watch.alive.device != end.tensor.device:  # evidence from before a resume lies on the CPU
            watch.alive = watch.alive.to(end.tensor.device)
            watch.suspects = None if watch.suspects is None else watch.suspects.to(end.tensor.device)
        channels = end.layout.channels_first(end.tensor)
        if end.activation not in ops.EXACT_ZERO and channels.shape[0] * channels.shape[2] < 2:
            return  # a single value per channel is constant whatever the filter does
        watch.forwards += 1
        if watch.suspects is None:
            watch.alive |= fired(channels, end.activation)
        else:
            watch.alive[watch.suspects] |= fired(channels.index_select(1, watch.suspects), end.activation)

    def narrow(self) -> None:
        """Drops proven filters from the list of suspects. On a GPU the list arrives some batches later, without a wait.

        A stale list only holds suspects too many, so the result stays exact.
        """
        if not self._watches:
            return
        devices = {watch.alive.device for watch in self._watches.values()}
        if len(devices) > 1:
            return  # not all layers have been read since a resume
        first = next(iter(self._watches.values())).alive
        if not first.is_cuda:
            self._set_suspects(list(self._watches), torch.cat([watch.alive for watch in self._watches.values()]))
            return
        if self._copies is None:
            flat = torch.cat([watch.alive for watch in self._watches.values()])
            pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            pinned.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copies = pinned, event, list(self._watches)
        elif self._copies[1].query():  # type: ignore[no-untyped-call]
            pinned, _, names = self._copies
            self._copies = None
            self._set_suspects(names, pinned)

    def _set_suspects(self, names: list[str], alive: Tensor) -> None:
        start = 0
        for name in names:
            watch = self._watches[name]
            count = watch.alive.numel()
            suspects = (~alive[start : start + count]).nonzero().flatten()
            start += count
            if suspects.numel() == watch.num_suspects:
                continue
            watch.num_suspects = suspects.numel()
            # Reading half of the channels by index costs as much as reading all of them.
            few = suspects.numel() * 2 <= count
            watch.suspects = suspects.to(watch.alive.device, non_blocking=True) if few else None

    def suspects(self) -> set[str]:
        """Units that may still hold dead filters, as far as the host knows."""
        return {name for name, watch in self._watches.items() if watch.num_suspects != 0}

    def seen(self) -> set[str]:
        """Units that at least one forward could judge."""
        return {name for name, watch in self._watches.items() if watch.forwards}

    def alive(self) -> dict[str, Tensor]:
        """Unit to (C,) bool on the CPU: True where life was seen. Units that no forward could judge are left out."""
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
                watch.alive |= mask.to(watch.alive.device)
                watch.forwards += 1
                watch.num_suspects = -1

    def __len__(self) -> int:
        return len(self._watches)
