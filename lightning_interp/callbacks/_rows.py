"""One tensor on the CPU, filled part by part."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Takes parts in turn. In place of a list: small tensors that stay between large ones that go would pin the memory.

    Example:
        >>> rows = Rows(3)
        >>> rows.add(torch.tensor([1.0, 2.0]))
        >>> rows.add(torch.tensor([3.0]))
        >>> rows.whole()
        tensor([1., 2., 3.])
    """

    def __init__(self, count: int) -> None:
        """Begins empty.

        Args:
            count: Rows in all.
        """
        self._count = count
        self._filled = 0
        self._rows: Tensor | None = None
        self._fits = True

    def add(self, part: Tensor) -> None:
        """Copies (n, ...) behind what is there."""
        if self._rows is None and self._fits:
            self._rows = torch.empty((self._count, *part.shape[1:]), dtype=part.dtype)
        end = self._filled + len(part)
        if self._rows is None or part.shape[1:] != self._rows.shape[1:] or end > self._count:
            self.drop()
            return
        self._rows[self._filled : end] = part
        self._filled = end

    def drop(self) -> None:
        """Gives up: `whole` will be None."""
        self._rows, self._fits = None, False

    def whole(self) -> Tensor | None:
        """(count, ...); None if parts were of different shapes, or not as many."""
        return self._rows if self._filled == self._count else None
