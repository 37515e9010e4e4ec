"""The loss of a softmax head and its first two derivatives, in closed form, over chunks of points.

Shapes: n points, C classes, D = features + 1 (the last one is the constant of the intercept), k weights at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 18
"""Numbers in one temporary: 2 MB, which stay in the processor's cache; measured up to 1.7 times as fast as 16 MB."""
_CHUNK_ELSEWHERE = 1 << 24
"""The same on other devices, where each call costs more than its memory."""
_KEPT = 1 << 25
"""Probabilities are kept up to this many numbers (256 MB); above they are computed again for each product."""


def chunks(points: Tensor, width: int) -> Iterator[slice]:
    """Slices of the first axis of `points` so that a temporary of `width` numbers a point stays small.

    Example:
        >>> list(chunks(torch.zeros(3, 1), 1 << 17))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    step = max(1, (_CHUNK if points.device.type == "cpu" else _CHUNK_ELSEWHERE) // max(1, width))
    for first in range(0, len(points), step):
        yield slice(first, min(len(points), first + step))


@dataclass(frozen=True)
class HeadLoss:
    """F(W) = mean over i of CE(W e_i, y_i) + weight_decay / 2 |W|^2.

    Attributes:
        features: (n, D), float64, the last column ones.
        labels: (n,), int64, in [0, num_classes).
        num_classes: C.
        weight_decay: Above 0.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    weight_decay: float

    @property
    def size(self) -> int:
        """Number of weights, C * D."""
        return self.num_classes * self.features.shape[1]

    def evaluate(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """F and its gradient at k weights.

        Returns:
            (k,) and (k, C, D).
        """
        k, C, _ = weights.shape
        n = len(self.features)
        flat = weights.reshape(k * C, -1)
        losses = 0.5 * self.weight_decay * weights.square().sum(dim=(1, 2))
        gradient = self.weight_decay * flat
        for rows in chunks(self.features, k * C):
            e_BD, y_B = self.features[rows], self.labels[rows]
            log_p = torch.log_softmax((e_BD @ flat.T).view(-1, k, C), dim=2)
            place = torch.arange(len(y_B), device=y_B.device)
            losses = losses - log_p[place, :, y_B].sum(dim=0) / n
            residual = log_p.exp_()
            residual[place, :, y_B] -= 1.0
            gradient = torch.addmm(gradient, residual.view(-1, k * C).T, e_BD, alpha=1 / n)
        return losses, gradient.view_as(weights)


class Curvature:
    """The Hessian of `HeadLoss` at one weight.

    H = mean over i of (diag p_i - p_i p_i^T) (x) e_i e_i^T + weight_decay I.

    Args:
        loss: The loss.
        weight: (C, D).
    """

    def __init__(self, loss: HeadLoss, weight: Tensor) -> None:
        self.loss = loss
        self.weight = weight
        n, C = len(loss.features), loss.num_classes
        self._kept: Tensor | None = None
        if n * C <= _KEPT:
            self._kept = torch.empty(n, C, dtype=weight.dtype, device=weight.device)
            for rows in chunks(loss.features, C):
                self._kept[rows] = torch.softmax(loss.features[rows] @ weight.T, dim=1)

    def probabilities(self, rows: slice | Tensor) -> Tensor:
        """(rows, C)."""
        if self._kept is not None:
            return self._kept[rows]
        return torch.softmax(self.loss.features[rows] @ self.weight.T, dim=1)

    def residuals(self, rows: slice | Tensor) -> Tensor:
        """Softmax minus one-hot label, (rows, C): the gradient of a point's loss is this times its features."""
        residual = self.probabilities(rows).clone()
        residual[torch.arange(len(residual), device=residual.device), self.loss.labels[rows]] -= 1.0
        return residual

    def product(self, vectors: Tensor) -> Tensor:
        """H times k vectors, (k, C, D); 4 n k C D operations."""
        k, C, _ = vectors.shape
        n = len(self.loss.features)
        flat = vectors.reshape(k * C, -1)
        result = self.loss.weight_decay * flat
        for rows in chunks(self.loss.features, k * C):
            e_BD, p_B1C = self.loss.features[rows], self.probabilities(rows)[:, None]
            moved = apply_softmax_jacobian(p_B1C, (e_BD @ flat.T).view(-1, k, C))
            result = torch.addmm(result, moved.view(-1, k * C).T, e_BD, alpha=1 / n)
        return result.view_as(vectors)

    def diagonal(self, axes: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """The diagonal of H, in the basis of orthonormal class axes (C, C) and feature axes (D, D), columns; (C, D).

        In the basis V (x) U: mean over i of (v_c^T (diag p_i - p_i p_i^T) v_c) (u_j^T e_i)^2 + weight_decay.
        """
        classes, features = axes
        loss = self.loss
        C, D = loss.num_classes, loss.features.shape[1]
        result = torch.full((C, D), loss.weight_decay, dtype=self.weight.dtype, device=self.weight.device)
        for rows in chunks(loss.features, C + D):
            p_BC, e_BD = self.probabilities(rows), loss.features[rows]
            if classes is None:
                spread = p_BC * (1 - p_BC)
            else:
                spread = (p_BC @ classes.square() - (p_BC @ classes).square()).clamp_(min=0.0)
            along = e_BD if features is None else e_BD @ features
            result.addmm_(spread.T, along.square(), alpha=1 / len(loss.features))
        return result

    def class_curvature(self) -> Tensor:
        """Mean over the points of diag p - p p^T, (C, C)."""
        C, n = self.loss.num_classes, len(self.loss.features)
        total = torch.zeros(C, C, dtype=self.weight.dtype, device=self.weight.device)
        for rows in chunks(self.loss.features, C):
            p_BC = self.probabilities(rows)
            total += torch.diag(p_BC.sum(dim=0)) - p_BC.T @ p_BC
        return total / n

    def dense(self) -> Tensor:
        """H as a matrix, (C * D, C * D), classes slowest; n (C D)^2 operations."""
        loss = self.loss
        n, C, D = len(loss.features), loss.num_classes, loss.features.shape[1]
        matrix = torch.zeros(C * D, C * D, dtype=self.weight.dtype, device=self.weight.device)
        for rows in chunks(loss.features, C * D):
            e_BD, p_BC = loss.features[rows], self.probabilities(rows)
            spread = (p_BC[:, :, None] * e_BD[:, None]).view(len(e_BD), C * D)
            for c in range(C - 1):
                own, later = slice(c * D, (c + 1) * D), slice((c + 1) * D, C * D)
                matrix[own, later].addmm_(spread[:, own].T, spread[:, later], alpha=-1 / n)
        # Only the blocks above the diagonal were added up. Probabilities sum to 1, so each row of blocks sums to 0.
        for c in range(C):
            own, later = slice(c * D, (c + 1) * D), slice((c + 1) * D, C * D)
            matrix[later, own] = matrix[own, later].T
            matrix[own, own] = -matrix[own].view(D, C, D).sum(dim=1)
        matrix.diagonal().add_(loss.weight_decay)
        return matrix


def apply_softmax_jacobian(probabilities: Tensor, vectors: Tensor) -> Tensor:
    """(diag p - p p^T) v along the last axis.

    Args:
        probabilities: (..., C), sums to 1.
        vectors: (..., C).

    Returns:
        (..., C); sums to 0.

    Example:
        >>> apply_softmax_jacobian(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
        tensor([ 0.2500, -0.2500])
    """
    weighted = probabilities * vectors
    return weighted - probabilities * weighted.sum(dim=-1, keepdim=True)
