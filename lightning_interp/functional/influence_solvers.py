"""Solves H x = b for the Hessian of a softmax head: by Cholesky where it fits into memory, else by conjugate gradients.

Right-hand sides are gradients of losses, so they sum to zero over the classes; so do the solutions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_interp.functional.influence_hessian import Curvature, HeadLoss

DENSE_LIMIT = 6_000
"""Weights of the largest head that is factorised: its Hessian takes 288 MB."""
_CLASS_AXES_LIMIT = 256
_FEATURE_AXES_LIMIT = 2_500
_BLOCK = 1 << 22

Product = Callable[[Tensor], Tensor]


class CholeskySolver:
    """H factorised once. `failed` if H is singular in float64.

    Adding s (1 1^T) (x) I to H changes no solution whose right-hand side sums to zero over the classes, and takes away
    the directions in which H has nothing but the weight decay: adding one number to all scores.

    Args:
        curvature: The Hessian.
    """

    exact = True

    def __init__(self, curvature: Curvature) -> None:
        matrix = curvature.dense()
        C = curvature.loss.num_classes
        D = curvature.loss.features.shape[1]
        each = matrix.diagonal().view(C, D).mean(dim=0) / C
        matrix.view(C, D, C, D).diagonal(dim1=1, dim2=3).add_(each)
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        self.failed = bool(info != 0)

    def __call__(self, right: Tensor) -> Tensor:
        """(k, C, D) to (k, C, D)."""
        return torch.cholesky_solve(right.flatten(1).T, self.factor).T.reshape(right.shape)

    def inverse(self) -> Tensor:
        """(C * D, C * D), the inverse of H with the addition above."""
        return torch.cholesky_inverse(self.factor)


class Preconditioner:
    """The diagonal of H, inverted in the axes in which H is most nearly diagonal.

    Features are taken along their principal axes, classes along the eigenvectors of the mean of diag p - p p^T: those
    of the Kronecker approximation (George et al. 2018, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis"). With more than 2,500 features or 256 classes their own axes are kept; with both, it
    is Jacobi's preconditioner.

    Args:
        curvature: The Hessian.
        feature_axes: (D, D), from `feature_axes`, or None.
    """

    def __init__(self, curvature: Curvature, feature_axes: Tensor | None) -> None:
        self.features = feature_axes
        self.classes: Tensor | None = None
        if curvature.loss.num_classes <= _CLASS_AXES_LIMIT:
            self.classes = torch.linalg.eigh(curvature.class_curvature())[1]
        self.diagonal = curvature.diagonal((self.classes, self.features))

    def __call__(self, vectors: Tensor) -> Tensor:
        """(k, C, D) to (k, C, D)."""
        moved = vectors if self.features is None else vectors @ self.features
        if self.classes is not None:
            moved = self.classes.T @ moved
        moved = moved / self.diagonal
        if self.classes is not None:
            moved = self.classes @ moved
        if self.features is not None:
            moved = moved @ self.features.T
        return moved - moved.mean(dim=1, keepdim=True)


def feature_axes(loss: HeadLoss) -> Tensor | None:
    """Principal axes of the features (not centred), (D, D) in columns; None where that would take too long."""
    if loss.features.shape[1] > _FEATURE_AXES_LIMIT:
        return None
    axes: Tensor = torch.linalg.eigh(loss.features.T @ loss.features)[1]
    return axes


class ConjugateGradientSolver:
    """Solves each time anew, to a relative residual of `tolerance`.

    Args:
        curvature: The Hessian.
        axes: From `feature_axes`.
        tolerance: |H x - b| / |b|.
        max_iterations: Products with H for each block of right-hand sides.

    Attributes:
        worst_residual: Largest relative residual above what was asked for that a solution was left with; 0 if none.
    """

    exact = False

    def __init__(
        self, curvature: Curvature, axes: Tensor | None, *, tolerance: float = 1e-10, max_iterations: int = 2_000
    ) -> None:
        self.curvature = curvature
        self.precondition = Preconditioner(curvature, axes)
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.worst_residual = 0.0

    def __call__(self, right: Tensor) -> Tensor:
        """(k, C, D) to (k, C, D), in blocks of bounded memory."""
        each = max(1, min(64, _BLOCK // self.curvature.loss.size))
        blocks = torch.split(right, each)
        return torch.cat([self.solve(self.curvature.product, block, self.tolerance) for block in blocks])

    def solve(self, product: Product, right: Tensor, tolerance: float) -> Tensor:
        """The same for a matrix near H, given by its product, in one block."""
        # Near an optimum rounding is all there is of the mean over the classes, which the preconditioner leaves out.
        found, residuals = conjugate_gradients(
            product,
            right - right.mean(dim=1, keepdim=True),
            self.precondition,
            tolerance=tolerance,
            max_iterations=self.max_iterations,
        )
        worst = float(residuals.max())
        self.worst_residual = max(self.worst_residual, worst if worst > tolerance else 0.0)
        return found


def conjugate_gradients(
    product: Product, right: Tensor, precondition: Product, *, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Preconditioned conjugate gradients for several right-hand sides at once.

    Args:
        product: A symmetric positive definite matrix: (k, ...) to (k, ...).
        right: (k, ...), right-hand sides.
        precondition: An approximate inverse of the matrix, symmetric and positive definite.
        tolerance: Where to stop: |A x - b| / |b|.
        max_iterations: Where to stop in any case.

    Returns:
        (k, ...), the solutions, and (k,), the relative residuals that they really have: computed from the solution,
        since the running residual drifts away from it; where they are above the tolerance it goes on from there.

    Source: Hestenes and Stiefel 1952; Golub and Van Loan, "Matrix Computations", section 11.5.

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> found, _ = conjugate_gradients(
        ...     lambda x: x @ matrix, torch.tensor([[1.0, 2.0]]), lambda x: x, tolerance=1e-6, max_iterations=9
        ... )
        >>> found
        tensor([[0.0909, 0.6364]])
    """
    shape = (len(right),) + (1,) * (right.ndim - 1)
    scale = right.flatten(1).norm(dim=1).clamp(min=torch.finfo(right.dtype).tiny)
    solution, residual = torch.zeros_like(right), right
    left = max_iterations
    while True:
        spent, change = _descend(product, residual, precondition, tolerance * scale, left)
        solution = solution + change
        left -= spent
        previous, residual = residual, right - product(solution)
        relative = residual.flatten(1).norm(dim=1) / scale
        fell = residual.flatten(1).norm(dim=1) < 0.5 * previous.flatten(1).norm(dim=1)
        if left <= 0 or bool(((relative <= tolerance) | ~fell).all()):
            return solution, relative
        residual = residual * (relative > tolerance).view(shape)


def _descend(
    product: Product, right: Tensor, precondition: Product, goal: Tensor, iterations: int
) -> tuple[int, Tensor]:
    """Iterations until the running residuals are below `goal`, (k,), and how many these were."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1).view((len(a),) + (1,) * (a.ndim - 1))

    solution, residual = torch.zeros_like(right), right
    direction = preconditioned = precondition(residual)
    rz = dot(residual, preconditioned)
    for iteration in range(iterations):
        if bool((residual.flatten(1).norm(dim=1) <= goal).all()):
            return iteration, solution
        moved = product(direction)
        curvature = dot(direction, moved)
        # A right-hand side that is solved to the last bit has no direction left.
        step = torch.where(curvature > 0, rz / curvature, 0.0)
        solution, residual = solution + step * direction, residual - step * moved
        preconditioned = precondition(residual)
        before, rz = rz, dot(residual, preconditioned)
        direction = preconditioned + torch.where(before > 0, rz / before, 0.0) * direction
    return iterations, solution
