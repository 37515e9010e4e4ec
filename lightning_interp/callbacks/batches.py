"""Reads images and labels out of whatever a data loader delivers, and scores out of whatever a model returns.

| batch | images | labels |
|---|---|---|
| tensor | the tensor | none |
| tuple or list | the first item | the second item, if it is a tensor |
| dict or other mapping | the first of `IMAGE_KEYS` that it has | the first of `LABEL_KEYS` |
| anything else | what `interp_batch(batch)` of the LightningModule returns: (images, labels) | |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_KEYS = ("image", "images", "x", "input", "inputs", "pixel_values", "img")
LABEL_KEYS = ("label", "labels", "y", "target", "targets")


class UnreadableError(ValueError):
    """A batch or an output can't be read; the message says what to do."""


class NoScoresError(UnreadableError):
    """A model gives no scores for images; the message says what to do."""


class NoClassesError(UnreadableError):
    """The labels are not one class an image; the message says what to do."""


def call_with_images(model: nn.Module, images: Tensor) -> Any:
    """What the model returns for images.

    Raises:
        NoScoresError: If it can't be called with them.
    """
    try:
        return model(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a forward that takes something else than images
        raise NoScoresError(f"calling the model with images raised {type(error).__name__}: {error}") from error


def read_batch(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch.

    Args:
        model: The LightningModule; its method `interp_batch(batch)` wins if it has one.
        batch: As the data loader delivers it.

    Returns:
        Images (N, ...), labels (N, ...) or None.

    Raises:
        UnreadableError: If no images are found.
    """
    own = getattr(model, "interp_batch", None)
    if own is not None:
        images, labels = own(batch)
        return images, labels
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        images = _first(batch, IMAGE_KEYS)
        if images is not None:
            return images, _first(batch, LABEL_KEYS)
    elif isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        labels = batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
        return batch[0], labels
    keys = f" with keys {list(batch)!r}" if isinstance(batch, Mapping) else ""
    raise UnreadableError(
        f"Expected a batch with images (a tensor, (images, labels), or a dict with {', '.join(IMAGE_KEYS)}), but "
        f"got {type(batch).__name__}{keys}. Give the LightningModule a method `interp_batch(batch)` that returns "
        "(images, labels)."
    )


def _first(batch: Mapping[str, Any], keys: tuple[str, ...]) -> Tensor | None:
    for key in keys:
        if key in batch and isinstance(batch[key], Tensor):
            found: Tensor = batch[key]
            return found
    return None
