"""Rectangles in feature maps: which part of a layer's output can differ when a part of its input does.

Shapes: M feature maps of K channels and H x W positions, B rectangles of h x w in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Pair = tuple[int, int]

# Rectangles that make up more of a map than this are not worth their copies (measured: 0.4 to 0.85 differ little).
LARGEST_SHARE = 0.6


class EverywhereError(Exception):
    """Nearly all of a map can differ, or nobody can tell what."""


class Sliding(NamedTuple):
    """A convolution or pooling; each pair is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)
    ) -> Sliding:
        """From arguments of PyTorch's operators, where one number means two and no stride means the kernel."""
        return cls(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))

    @property
    def pointwise(self) -> bool:
        """Whether each output reads one input, at its own position."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)


@dataclass(frozen=True, eq=False)
class Regions:
    """One rectangle in each of B maps, all of the same size.

    Attributes:
        source: (B,), which of M maps the rectangle lies in.
        top: (B,), its first row.
        left: (B,), its first column.
        height: Rows.
        width: Columns.
    """

    source: Indices
    top: Indices
    left: Indices
    height: int
    width: int

    def check_share(self, size: Pair) -> None:
        """Raises EverywhereError if the rectangles are most of maps of H x W."""
        if self.height * self.width > LARGEST_SHARE * size[0] * size[1]:
            raise EverywhereError

    def read(self, maps: Tensor) -> Tensor:
        """(M, K, H, W) to (B, K, h, w); its channels are last in memory."""
        rows, columns = _span(self.top, self.height), _span(self.left, self.width)
        return _channels_last(maps)[_index(self.source, rows, columns, maps.device)].permute(0, 3, 1, 2)

    def write(self, patches: Tensor, maps: Tensor) -> None:
        """Puts (B, K, h, w) into (B, K, H, W), one rectangle in each map; what lies outside of a map is left out."""
        each = np.arange(len(patches))
        rows, columns = _span(self.top, self.height), _span(self.left, self.width)
        inside_rows, inside_columns = (
            np.clip(i, 0, n - 1) for i, n in zip((rows, columns), maps.shape[2:], strict=True)
        )
        if (inside_rows != rows).any() or (inside_columns != columns).any():
            # Indices outside become the nearest one inside, with its value, so that all rectangles stay of one size.
            from_rows, from_columns = inside_rows - self.top[:, None], inside_columns - self.left[:, None]
            if not (_within(from_rows, self.height) and _within(from_columns, self.width)):
                raise EverywhereError  # a rectangle that lies outside altogether
            patches = _channels_last(patches)[_index(each, from_rows, from_columns, maps.device)].permute(0, 3, 1, 2)
        _channels_last(maps)[_index(each, inside_rows, inside_columns, maps.device)] = _channels_last(patches)

    def within(self, frame: Regions) -> Regions:
        """The same rectangles, counted from the corners of others."""
        return replace(self, top=self.top - frame.top, left=self.left - frame.left)

    def moved(self, rows: int, columns: int) -> Regions:
        """The same rectangles, further down and to the right."""
        return replace(self, top=self.top + rows, left=self.left + columns)

    def after(self, sliding: Sliding, size: Pair) -> tuple[Regions, Regions]:
        """What a convolution or pooling over maps of H x W makes of the rectangles.

        Returns:
            The rectangles of the output that hold all that can differ, and those of the *padded* input that they read.

        Raises:
            EverywhereError: If they are most of the output, or nothing reads the rectangles.
        """
        geometry = zip((self.top, self.left), (self.height, self.width), size, *sliding, strict=True)
        (top, height, from_top, from_height, full_height), (left, width, from_left, from_width, full_width) = (
            _reach(*axis) for axis in geometry
        )
        found = Regions(self.source, top, left, height, width)
        found.check_share((full_height, full_width))
        return found, Regions(self.source, from_top, from_left, from_height, from_width)


def union(regions: Sequence[Regions], size: Pair) -> Regions:
    """The smallest rectangles around several in the same maps of H x W, enlarged to one size.

    Raises:
        EverywhereError: If they are most of the map.
    """
    top = np.minimum.reduce([each.top for each in regions])
    left = np.minimum.reduce([each.left for each in regions])
    height = int((np.maximum.reduce([each.top + each.height for each in regions]) - top).max())
    width = int((np.maximum.reduce([each.left + each.width for each in regions]) - left).max())
    top, left = np.minimum(top, size[0] - height), np.minimum(left, size[1] - width)
    found = Regions(regions[0].source, top, left, height, width)
    found.check_share(size)
    return found


def _reach(  # noqa: PLR0913, PLR0917 - one axis of a rectangle and of a sliding window
    start: Indices, length: int, size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Indices, int, Indices, int, int]:
    """Output `o` reads the padded inputs `o * stride` to `o * stride + extent - 1`."""
    extent = dilation * (kernel - 1) + 1
    outputs = (size + 2 * padding - extent) // stride + 1
    first = np.maximum(-((extent - 1 - start - padding) // stride), 0)
    last = np.minimum((start + length - 1 + padding) // stride, outputs - 1)
    count = int((last - first + 1).max())
    if count < 1:
        raise EverywhereError
    first = np.clip(first, 0, outputs - count)
    return first, count, first * stride, (count - 1) * stride + extent, outputs


def _pair(values: Sequence[int]) -> Pair:
    return int(values[0]), int(values[-1])


def _span(starts: Indices, length: int) -> Indices:
    return starts[:, None] + np.arange(length)


def _within(indices: Indices, length: int) -> bool:
    return bool((indices >= 0).all() and (indices < length).all())


def _channels_last(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)


def _index(source: Indices, rows: Indices, columns: Indices, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of (B, h, w) positions: the maps, (B, 1, 1), the rows, (B, h, 1), and the columns, (B, 1, w)."""
    each = (source[:, None, None], rows[:, :, None], columns[:, None, :])
    source_b11, rows_bh1, columns_b1w = (torch.from_numpy(i).to(device) for i in each)
    return source_b11, rows_bh1, columns_b1w
