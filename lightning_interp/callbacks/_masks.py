"""Where the objects are, in data sets that say so.

| batch | masks |
|---|---|
| dict with one of `MASK_KEYS` | (N, H, W) or (N, 1, H, W); not zero is object |
| dict with one of `BOX_KEYS` | (N, 4) or (N, K, 4): left, top, right, bottom in pixels, the latter two exclusive |
| (images, labels, masks) | (N, H, W) or (N, 1, H, W) |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MASK_KEYS = ("mask", "masks", "segmentation")
BOX_KEYS = ("box", "boxes", "bbox", "bboxes")


def read_masks(batch: Any, images: Tensor) -> Tensor | None:
    """The masks of a batch.

    Args:
        batch: As the data loader delivers it.
        images: (N, C, H, W), those of the batch.

    Returns:
        (N, H, W) bool, True on the object; None where the batch holds none that fit its images.
    """
    if images.ndim != 4:
        return None
    if isinstance(batch, Mapping):
        masks = (_mask(batch[key], images) for key in MASK_KEYS if isinstance(batch.get(key), Tensor))
        boxes = (_boxes(batch[key], images) for key in BOX_KEYS if isinstance(batch.get(key), Tensor))
        return next((found for found in (*masks, *boxes) if found is not None), None)
    if isinstance(batch, list | tuple) and len(batch) > 2 and isinstance(batch[2], Tensor):
        return _mask(batch[2], images)
    return None


def _mask(values: Tensor, images: Tensor) -> Tensor | None:
    values = values.squeeze(1) if values.ndim == 4 and values.shape[1] == 1 else values
    return values != 0 if values.shape == (len(images), *images.shape[2:]) else None


def _boxes(values: Tensor, images: Tensor) -> Tensor | None:
    values = values[:, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[0] != len(images) or values.shape[2] != 4:
        return None
    rows = torch.arange(images.shape[2], device=values.device)[:, None]
    columns = torch.arange(images.shape[3], device=values.device)
    left, top, right, bottom = values[..., None, None].unbind(2)
    inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    return inside.any(dim=1)
