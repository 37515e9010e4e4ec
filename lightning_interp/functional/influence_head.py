"""`HeadInfluence`: fits a softmax head once and answers many questions about its training points; see `influence`."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from lightning_interp._options import check_choice, expected
from lightning_interp.errors import InterpWarning
from lightning_interp.functional.influence_hessian import Curvature, chunks
from lightning_interp.functional.influence_leave_one_out import left_out, left_out_weights
from lightning_interp.functional.influence_solvers import (
    DENSE_LIMIT,
    CholeskySolver,
    ConjugateGradientSolver,
    feature_axes,
)
from lightning_interp.functional.softmax_head import (
    SoftmaxHead,
    check_points,
    fit_softmax_head,
    head_loss,
    with_one,
)

_BLOCK = 1 << 22


class HeadInfluence:
    """Fits a softmax head, factorises its Hessian once, and answers questions about its training points.

    Sign: each change is "after" minus "before" the point is left out. Above 0: the loss would rise, so the point is
    *helpful*; below 0: *harmful*.

    Args:
        embeddings: (n, d), floating and finite.
        labels: (n,), integers in [0, C).
        weight_decay: Above 0. The smaller, the more the head follows single points, and the rougher the prediction.
        num_classes: C; None: the largest label plus 1.
        head: An earlier head, where fitting starts; only saves time.
        solver: "cholesky" takes 16 (C (d + 1))^2 bytes and is exact. "cg" needs no matrix: conjugate gradients, anew
            for each question, to a relative residual of 1e-10; an `InterpWarning` tells if that is not reached. "auto":
            Cholesky for up to 6,000 weights of features that are not dead.

    Attributes:
        head: At its optimum on these points.
        exact: False with "cg": then `self_influence()` and `leave_one_out_losses()` of *all* points come from an
            approximation of the Hessian, good for ranking; ask with `indices` for exact ones.

    Raises:
        ArgumentError: If an argument is wrong, or embeddings are not finite.

    Example:
        >>> points, labels = torch.tensor([[-1.0], [-2.0], [1.0]]), torch.tensor([0, 0, 1])
        >>> influence = HeadInfluence(points, labels, weight_decay=0.1)
        >>> influence.on(torch.tensor([[2.0]]), torch.tensor([1])).argmax(dim=1)  # the only point of class 1
        tensor([2])
    """

    @torch.no_grad()
    def __init__(  # noqa: PLR0913 - all but two by keyword
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        weight_decay: float = 1e-2,
        num_classes: int | None = None,
        head: SoftmaxHead | None = None,
        solver: Literal["auto", "cholesky", "cg"] = "auto",
    ) -> None:
        check_choice("solver", solver, ("auto", "cholesky", "cg"))
        start = None if head is None else head.weight
        self.head = fit_softmax_head(
            embeddings, labels, num_classes=num_classes, weight_decay=weight_decay, start=start
        )
        if not self.head.converged:
            _warn(
                f"The head is not at its optimum (gradient norm {self.head.gradient_norm:.1e}): influences are rough."
            )
        self.loss, self._kept = head_loss(embeddings, labels, num_classes, weight_decay)
        self.curvature = Curvature(self.loss, self.head.weight[:, with_one(self._kept)].contiguous())
        self._solver = _make_solver(self.curvature, solver)
        self.exact = self._solver.exact
        self._own: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """Number of training points."""
        return len(self.loss.features)

    @torch.no_grad()
    def on(self, test_embeddings: Tensor, test_labels: Tensor) -> Tensor:
        """Predicted change of the loss of each test point if a training point were left out.

        g_test^T H^-1 g_i / n, where g is the gradient of a point's loss (Koh and Liang 2017, equation 2, times -1/n).

        Args:
            test_embeddings: (m, d).
            test_labels: (m,).

        Returns:
            (m, n), float64, in nats; above 0: the training point is helpful.
        """
        features, labels = self._test(test_embeddings, test_labels)
        used = features[:, with_one(self._kept)]
        residual_mC = self._residuals(features, labels)
        result = used.new_empty(len(used), len(self))
        C, D = self.curvature.weight.shape
        for some in torch.split(torch.arange(len(used), device=used.device), max(1, _BLOCK // (C * D))):
            solved = self._solve(residual_mC[some, :, None] * used[some, None])
            for rows in chunks(self.loss.features, len(some) * C):
                e_BD = self.loss.features[rows]
                along = (e_BD @ solved.view(len(some) * C, D).T).view(len(e_BD), len(some), C)
                result[some, rows] = torch.einsum("bmc,bc->mb", along, self.curvature.residuals(rows)) / len(self)
        return result

    @torch.no_grad()
    def inverse_gradient(self, test_embeddings: Tensor, test_labels: Tensor) -> Tensor:
        """H^-1 g_test: how the head moves if it gets a little worse at a test point.

        Args:
            test_embeddings: (m, d).
            test_labels: (m,).

        Returns:
            (m, C, d + 1), float64; dead features, where H is weight_decay I, included.
        """
        features, labels = self._test(test_embeddings, test_labels)
        gradient = self._residuals(features, labels)[:, :, None] * features[:, None]
        result = gradient / self.head.weight_decay
        columns = with_one(self._kept)
        result[:, :, columns] = self._solve(gradient[:, :, columns])
        return result

    def self_influence(self, indices: Tensor | None = None) -> Tensor:
        """Predicted rise of each training point's own loss if it were left out: g_i^T H^-1 g_i / n.

        Args:
            indices: (k,), training points; None: all. Where `exact` is False, all of them are done with the diagonal of
                H in a Kronecker basis (see `influence_solvers.Preconditioner`), a ranking rather than values; those
                asked for by index are solved exactly, which takes a while each.

        Returns:
            (n,) or (k,), float64, >= 0, in nats. High: a point that the head has to make an effort for, often
            mislabelled.
        """
        return self._left_out(indices)[0]

    def leave_one_out_losses(self, indices: Tensor | None = None) -> Tensor:
        """Loss of each training point if it were left out, by one Newton step.

        The Hessian without the point's own term, in closed form (Woodbury): C x C numbers a point. Nearer to the truth
        than its loss plus its self-influence.

        Args:
            indices: As in `self_influence`.

        Returns:
            (n,) or (k,), float64, >= 0, in nats. High: a point that the others contradict.
        """
        return self._left_out(indices)[1]

    @torch.no_grad()
    def leave_one_out(self, test_embeddings: Tensor, test_labels: Tensor, indices: Tensor, *, steps: int = 4) -> Tensor:
        """Actual change of the loss of each test point if a training point is left out.

        Newton's method from the optimum, with the Hessian without the point's own term kept through all steps. Where
        more than 1 % of the way is left (points of great weight among few, or with hardly any weight decay) the head is
        really refitted, which takes longer.

        Args:
            test_embeddings: (m, d).
            test_labels: (m,).
            indices: (k,), training points, in [0, n).
            steps: At least 1. Each costs one pass over the training points for each point left out.

        Returns:
            (m, k), float64, in nats; above 0: the training point is helpful.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise expected("steps", "an integer of at least 1", steps)
        features, labels = self._test(test_embeddings, test_labels)
        used = features[:, with_one(self._kept)]
        chosen = self._indices(indices)
        before = torch.nn.functional.cross_entropy(used @ self.curvature.weight.T, labels, reduction="none")
        result = used.new_empty(len(used), len(chosen))
        if not len(chosen):
            return result
        C, D = self.curvature.weight.shape
        each = max(1, _BLOCK // (C * D * (C if self.exact else 1)))
        for some in torch.split(torch.arange(len(chosen), device=used.device), each):
            weights = left_out_weights(self.curvature, self._solver, chosen[some], steps)
            for place, weight in zip(some.tolist(), weights, strict=True):
                after = torch.nn.functional.cross_entropy(used @ weight.T, labels, reduction="none")
                result[:, place] = after - before
        self._tell()
        return result

    @torch.no_grad()
    def _left_out(self, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Self-influences and losses without the point itself."""
        if indices is not None:
            found = left_out(self.curvature, self._solver, self._indices(indices))
            self._tell()
            return found
        if self._own is None:
            self._own = left_out(self.curvature, self._solver, None)
        return self._own[0].clone(), self._own[1].clone()

    def _solve(self, right: Tensor) -> Tensor:
        solved = self._solver(right)
        self._tell()
        return solved

    def _tell(self) -> None:
        solver = self._solver
        if isinstance(solver, ConjugateGradientSolver) and solver.worst_residual > solver.tolerance:
            _warn(
                f"Conjugate gradients stopped at a relative residual of {solver.worst_residual:.1e} instead of "
                f"{solver.tolerance:.0e}, so influences have about that error. More `weight_decay` makes it easier."
            )
            solver.worst_residual = 0.0

    def _test(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        width, classes = len(self._kept), self.loss.num_classes
        features, targets = check_points(
            "test_embeddings", "test_labels", embeddings, labels, classes=classes, width=width
        )
        return features.to(self.head.weight.device), targets.to(self.head.weight.device)

    def _residuals(self, features: Tensor, labels: Tensor) -> Tensor:
        residual = torch.softmax(features @ self.head.weight.T, dim=1)
        residual[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        return residual

    def _indices(self, indices: Tensor) -> Tensor:
        chosen = torch.as_tensor(indices)
        whole = not chosen.is_floating_point() and not chosen.is_complex() and chosen.dtype != torch.bool
        right = chosen.ndim == 1 and (whole or not len(chosen))
        if not right or bool(((chosen < 0) | (chosen >= len(self))).any()):
            raise expected("indices", f"a vector of training points in [0, {len(self)})", indices)
        return chosen.to(self.loss.features.device, torch.int64)


def _make_solver(
    curvature: Curvature, choice: Literal["auto", "cholesky", "cg"]
) -> CholeskySolver | ConjugateGradientSolver:
    """The solver that was asked for; conjugate gradients where a factorisation is too large or fails."""
    if choice == "cholesky" or (choice == "auto" and curvature.loss.size <= DENSE_LIMIT):
        factorised = CholeskySolver(curvature)
        if not factorised.failed:
            return factorised
        if choice == "cholesky":
            decay = curvature.loss.weight_decay
            raise expected("weight_decay", "large enough for float64 to tell the Hessian from a singular one", decay)
    return ConjugateGradientSolver(curvature, feature_axes(curvature.loss))


def _warn(message: str) -> None:
    warnings.warn(message, InterpWarning, stacklevel=3)
