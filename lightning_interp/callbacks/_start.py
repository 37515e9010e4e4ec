"""The weights of some layers before the first step, kept over checkpoints."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Up to so many numbers (4 MB in float32) lie in each checkpoint; more are written once to a file beside the log.
IN_CHECKPOINT = 1_000_000


class StartWeights:
    """A snapshot on the CPU, in the types of the weights.

    Attributes:
        weights: Layer to weight; empty before `take`.
        path: File that holds the snapshot when it is too large for a checkpoint.
        sha256: Of that file.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.weights: dict[str, Tensor] = {}
        self.path: str | None = None
        self.sha256: str | None = None

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copies the weights."""
        self.weights = {layer: weight.detach().to("cpu", copy=True) for layer, weight in weights.items()}
        self.path = self.sha256 = None

    def write(self, directory: str | None) -> str | None:
        """Writes a large snapshot to a file of its own, whole or not at all.

        Args:
            directory: Folder of the run's files; None writes nothing.

        Returns:
            What is wrong, None when nothing is: a full disk costs the snapshot, not the callback.
        """
        if self._small or self.path is not None:
            return None
        if directory is None:
            return "there is no log folder"
        buffer = io.BytesIO()
        torch.save(self.weights, buffer)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        path = Path(directory) / f"interp_step0_{digest[:16]}.pt"
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return f"{path} can't be written ({error})"
        self.path, self.sha256 = str(path), digest
        return None

    def fill(self, weights: Mapping[str, Tensor], directory: str | None) -> str | None:
        """After a resume: reads the file if there is one; layers without a start begin now.

        Args:
            weights: The layers and their weights now.
            directory: Folder of the new run's files, where a file that was moved is looked for too.

        Returns:
            What is wrong, None when all layers have their start.
        """
        problem = self._read(directory) if self.path is not None else None
        fits = {layer for layer, weight in weights.items() if self.fits(layer, weight)}
        if len(fits) == len(weights):
            return problem
        self.take({layer: self.weights[layer] if layer in fits else weight for layer, weight in weights.items()})
        missing = [layer for layer in weights if layer not in fits]
        return problem or f"the checkpoint does not hold it for {', '.join(repr(layer) for layer in missing[:4])}"

    def state_dict(self) -> dict[str, Any]:
        """Tensors, or where they lie; safe in a checkpoint."""
        if self.path is not None:
            return {"path": self.path, "sha256": self.sha256}
        return {"weights": dict(self.weights)} if self._small else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; a file is read by `fill`."""
        self.weights = {layer: weight.cpu() for layer, weight in state.get("weights", {}).items()}
        self.path, self.sha256 = state.get("path"), state.get("sha256")

    @property
    def _small(self) -> bool:
        return sum(weight.numel() for weight in self.weights.values()) <= IN_CHECKPOINT

    def fits(self, layer: str, weight: Tensor) -> bool:
        """Whether there is a start for this layer, of the shape that its weight has now."""
        return layer in self.weights and self.weights[layer].shape == weight.shape

    def _read(self, directory: str | None) -> str | None:
        """Reads and verifies the file; what is wrong, or None."""
        path = Path(str(self.path))
        places = [path] if directory is None else [path, Path(directory) / path.name]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            self.path = None
            return f"{path} is missing"
        content = found.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            self.path = None
            return f"{found} is not the file that was written (its SHA-256 differs)"
        self.weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self.path = str(found)
        return None
