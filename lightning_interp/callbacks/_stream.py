"""Samples of a stream: the first ones that the training delivers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_interp.callbacks._points import Points
from lightning_interp.callbacks.samples import FixedSamples, keep

_BYTES = 1 << 26
_IN_CHECKPOINT = 1 << 22  # bytes; more is collected anew after a resume


class StreamedSamples:
    """Keeps samples of delivered batches until there are enough of them, on the device that they came on."""

    def __init__(self, count: int) -> None:
        """Begins empty.

        Args:
            count: Most samples.
        """
        self._missing = count
        self._bytes = 0
        self._parts: list[FixedSamples] = []

    def keep(self, model: nn.Module, batch: Any) -> None:
        """Takes what is still missing, up to 64 MB in all.

        Raises:
            UnreadableError: If the batch holds no images.
        """
        if self._missing <= 0 or self._bytes >= _BYTES:
            return
        part = keep(model, batch, self._missing)
        if self._parts and self._parts[0].images.shape[1:] != part.images.shape[1:]:
            return
        self._parts.append(part)
        self._missing -= len(part.images)
        self._bytes += part.images.numel() * part.images.element_size()

    def points(self) -> Points | None:
        """What has been kept, and no more from now on; None as long as there is nothing."""
        if not self._parts:
            return None
        self._missing = 0
        images, labels = torch.cat([part.images.cpu() for part in self._parts]), None
        if all(part.labels is not None for part in self._parts):
            labels = torch.cat([part.labels.cpu() for part in self._parts if part.labels is not None])
        return Points(range(len(images)), from_training=True, source=FixedSamples(images, labels, None))

    def state_dict(self) -> dict[str, Any] | None:
        """The samples, if they are few."""
        if not self._parts or self._bytes > _IN_CHECKPOINT:
            return None
        parts = [[None if tensor is None else tensor.cpu() for tensor in part] for part in self._parts]
        return {"parts": parts, "missing": self._missing, "bytes": self._bytes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._parts = [FixedSamples(*part) for part in state["parts"]]
        self._missing, self._bytes = state["missing"], state["bytes"]
