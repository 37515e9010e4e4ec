"""Batches of images with a window over each, and how a model is asked about them in the least time.

Shapes: N images, C channels, H x W pixels, B covered copies of the images, window of h x w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_interp.functional.incremental import PatchedTensor, Patches
from lightning_interp.functional.regions import Regions
from lightning_interp.functional.small_maps import faster_small_maps
from lightning_interp.functional.windows import Grid

# With so many images, or more, convolutions on a CPU are 1.3 to 2.4 times as fast with the channels last.
_LARGE_BATCH = 32


class CoveredImages:
    """B copies of images, copy b with a window at position b.

    Args:
        images: (N, C, H, W).
        cover: (N, C, H, W), what a window shows.
        grid: Positions of the window.
        image: (B,), which image each is a copy of.
        position: (B,), position of the window in the grid; None covers nothing.
    """

    def __init__(self, images: Tensor, cover: Tensor, grid: Grid, image: Tensor, position: Tensor | None) -> None:
        self._images, self._image = images, image
        if position is not None:
            self._sources, self._regions, self._patches = _windows(images, cover, grid, image, position)
        self.are_covered = position is not None

    def __len__(self) -> int:
        return len(self._image)

    def made(self, layout: torch.memory_format, *, patched: bool) -> Tensor:
        """(B, C, H, W) in memory of its own, since a model may write over its input."""
        if patched and self.are_covered:
            content = Patches(_laid_out(self._images[self._sources], layout), self._patches, self._regions)
            return PatchedTensor(content._replace(values=content.values.clone(memory_format=content.layout)))
        batch = _laid_out(self._images[self._image], layout)
        if self.are_covered:
            self._regions.write(self._patches, batch)
        return batch


def _laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    return images if layout is torch.preserve_format else images.contiguous(memory_format=layout)


def _windows(
    images: Tensor, cover: Tensor, grid: Grid, image: Tensor, position: Tensor
) -> tuple[Tensor, Regions, Tensor]:
    """The images that occur, where the windows are in them, and (B, C, h, w), what is there."""
    sources, source = torch.unique(image, return_inverse=True)
    row, column = np.divmod(position.cpu().numpy(), len(grid.columns))
    top, left = (np.array([each.start for each in slices]) for slices in (grid.rows, grid.columns))
    height, width = grid.rows[0].stop, grid.columns[0].stop
    # A window that the edge cuts off becomes a whole one further in, of which only the part at the edge is covered.
    at = Regions(
        source.cpu().numpy(),
        np.minimum(top[row], images.shape[2] - height),
        np.minimum(left[column], images.shape[3] - width),
        height,
        width,
    )
    rows = at.top[:, None] + np.arange(height) >= top[row][:, None]
    columns = at.left[:, None] + np.arange(width) >= left[column][:, None]
    is_covered = torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
    return sources, at, torch.where(is_covered, at.read(cover[sources]), at.read(images[sources]))


class FastestCaller:
    """Calls the model in the way that saves most time, of those that the model takes.

    On a CPU: with `PatchedTensor`, which computes only what a window changes, and with the channels last for large
    batches, but for small maps (`functional/small_maps.py`). After an error, as of a model that calls `view` on what a
    convolution returns, the next way is taken from there on; the last one is as the images are.

    Attributes:
        patched: Whether patched tensors are tried at all.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.patched = device.type == "cpu" and not any(map(_needs_ordinary, model.modules()))
        layouts = [torch.channels_last, torch.preserve_format] if device.type == "cpu" else [torch.preserve_format]
        self._ways = [
            (patched, layout) for patched in ([True, False] if self.patched else [False]) for layout in layouts
        ]

    def __call__(self, batch: CoveredImages) -> Any:
        """What the model returns; raises what it raises in the last way."""
        tried: dict[tuple[bool, torch.memory_format], Exception] = {}
        while True:
            patched, layout = self._ways[0]
            way = patched and batch.are_covered, layout if len(batch) >= _LARGE_BATCH else torch.preserve_format
            if way not in tried:
                try:
                    with faster_small_maps():
                        return self.model(batch.made(way[1], patched=way[0]))
                except Exception as error:
                    tried[way] = error
            if len(self._ways) == 1:
                raise tried[way]
            del self._ways[0]


def _needs_ordinary(module: nn.Module) -> bool:
    """Scripts, which are specialised to what they meet first, and statistics of the batch, which the patches lack."""
    own_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    return own_statistics or isinstance(module, torch.jit.ScriptModule)
