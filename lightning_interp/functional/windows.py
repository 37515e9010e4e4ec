"""Where a window stands on an image, and what its positions say about pixels.

Shapes: N images, H x W pixels, P = p x q positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp._options import expected


class Grid:
    """Positions of the window, row by row.

    Example:
        >>> grid = Grid.of((1, 5), (1, 2), (1, 2))
        >>> [grid[place][1] for place in range(len(grid))]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """

    def __init__(self, rows: list[slice], columns: list[slice]) -> None:
        """Takes what each position covers in either direction."""
        self.rows, self.columns = rows, columns

    @classmethod
    def of(cls, size: tuple[int, int], window: int | tuple[int, int], stride: int | tuple[int, int] | None) -> Grid:
        """The positions for an image.

        Args:
            size: (H, W).
            window: See `occlusion`.
            stride: See `occlusion`.

        Raises:
            ArgumentError: If the window does not fit into the image, or the stride leaves gaps.
        """
        windows = _two("window", window)
        strides = (max(1, windows[0] // 2), max(1, windows[1] // 2)) if stride is None else _two("stride", stride)
        if windows[0] > size[0] or windows[1] > size[1]:
            raise expected("window", f"at most the image, {size}", window)
        if strides[0] > windows[0] or strides[1] > windows[1]:
            raise expected("stride", f"at most the window, {windows}, so that every pixel is covered", stride)
        rows, columns = (_slices(*each) for each in zip(size, windows, strides, strict=True))
        return cls(rows, columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __getitem__(self, place: int) -> tuple[slice, slice]:
        return self.rows[place // len(self.columns)], self.columns[place % len(self.columns)]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the windows that cover a pixel: (P, N) to (N, H, W)."""
        # In float64 on the CPU: matrix products on a GPU may be allowed to round.
        rows, columns = _covers(self.rows), _covers(self.columns)
        values_pqN = values.cpu().double().reshape(len(self.rows), len(self.columns), -1)
        sums = torch.einsum("pqn,ph,qw->nhw", values_pqN, rows, columns)
        return (sums / (rows.sum(dim=0)[:, None] * columns.sum(dim=0))).to(values)

    def nearest(self, values: Tensor) -> Tensor:
        """Value of the window whose centre is nearest to a pixel: (P, N) to (N, H, W)."""
        values_pqN = values.reshape(len(self.rows), len(self.columns), -1)
        return values_pqN[_nearest(self.rows)][:, _nearest(self.columns)].permute(2, 0, 1)


def _slices(size: int, window: int, stride: int) -> list[slice]:
    count = -(-(size - window) // stride) + 1
    return [slice(i * stride, min(i * stride + window, size)) for i in range(count)]


def _covers(slices: list[slice]) -> Tensor:
    """(p, H): 1 where a window covers a row."""
    covers = torch.zeros(len(slices), slices[-1].stop, dtype=torch.float64)
    for index, covered in enumerate(slices):
        covers[index, covered] = 1
    return covers


def _nearest(slices: list[slice]) -> list[int]:
    centres = [(covered.start + covered.stop - 1) / 2 for covered in slices]
    return [min(range(len(centres)), key=lambda i: abs(centres[i] - pixel)) for pixel in range(slices[-1].stop)]


def _two(argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    whole = isinstance(pair, tuple | list) and len(pair) == 2
    if not whole or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in pair):
        raise expected(argument, "a positive integer or a pair of them, (height, width)", value)
    return pair[0], pair[1]
