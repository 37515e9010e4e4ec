"""Fetches small tensors from a GPU without making it wait for the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host.

    On a GPU the copy stands in the queue behind what the tensor needs, and the host goes on. Whoever reads it a step
    later finds it there, or waits for the step before only; reading it at once waits until all of the queue is done,
    and then the GPU has nothing to do until the host has queued more.

    Args:
        tensor: Must not be written to by the host from now on; elsewhere than on a GPU it is taken as it is.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._values.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def arrived(self) -> bool:
        """Whether it can be read without a wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def get(self) -> Tensor:
        """The values, once they are there; on the CPU if the tensor was there or on a GPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


class Parcel:
    """Many small tensors on their way to the host, in one copy for each device and dtype.

    Args:
        tensors: Real tensors of any shape.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sizes = [tensor.numel() for tensor in tensors]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
        self._copies = [
            (indices, HostCopy(torch.cat([tensors[index].detach().reshape(-1) for index in indices])))
            for indices in groups.values()
        ]

    def wait(self) -> None:
        """Until all of it has arrived."""
        for _, copy in self._copies:
            copy.get()

    def open(self) -> list[list[float]]:
        """One flat list of numbers for each tensor, in order; waits for what has not arrived yet."""
        values: list[list[float]] = [[] for _ in self._sizes]
        for indices, copy in self._copies:
            flat, start = copy.get().tolist(), 0
            for index in indices:
                values[index] = [float(value) for value in flat[start : start + self._sizes[index]]]
                start += self._sizes[index]
        return values


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Values of many small tensors, at once.

    Args:
        tensors: Real tensors of any shape.

    Returns:
        One flat list of numbers for each tensor, in order.

    Example:
        >>> to_host([torch.tensor(1.0), torch.tensor([2.0, 3.0])])
        [[1.0], [2.0, 3.0]]
    """
    return Parcel(tensors).open()
