"""What becomes of a softmax head when one of its points is left out.

Leaving point i out takes A_i (x) e_i e_i^T / n from the Hessian, with A_i = diag p_i - p_i p_i^T, of rank C - 1. With
J_i = I (x) e_i and M_i = J_i^T H^-1 J_i / n, which is C x C, Woodbury's identity gives all that is needed: by one
Newton step the head moves by (H - J A J^T / n)^-1 J r / n, and the point's own scores by (I - M A)^-1 M r, with
r = p - onehot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_interp.functional.influence_hessian import Curvature, HeadLoss, apply_softmax_jacobian, chunks
from lightning_interp.functional.influence_solvers import CholeskySolver, ConjugateGradientSolver, Product
from lightning_interp.functional.softmax_head import minimise

_AT_REST = 0.01
"""A way left that is longer than this fraction of the way so far says that the head has not arrived."""

_TOLERANCE = 1e-10
"""Relative residual of single steps by conjugate gradients."""
_STEP_TOLERANCE = 1e-5
"""Relative residual of the Newton steps by conjugate gradients: each step makes up for the errors of the one before."""

Part = tuple[slice | Tensor, Tensor, Tensor]
"""Points, their self-influence and the change of their scores."""


def left_out(
    curvature: Curvature, solver: CholeskySolver | ConjugateGradientSolver, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Self-influence of points, and their own loss when they are left out, by one Newton step.

    Args:
        curvature: Of the head at its optimum.
        solver: Of the same.
        indices: (k,), exact; None: all points, exact if the solver is, else by the preconditioner.

    Returns:
        (k,) or (n,), twice.
    """
    if indices is not None:
        parts = _by_solving(curvature, solver, indices)
    elif isinstance(solver, CholeskySolver):
        parts = _by_inverse(curvature, solver)
    else:
        parts = _by_axes(curvature, solver)
    influences, losses = [], []
    for rows, influence, shift in parts:
        scores = curvature.loss.features[rows] @ curvature.weight.T + shift
        influences.append(influence)
        losses.append(cross_entropy(scores, curvature.loss.labels[rows], reduction="none"))
    return torch.cat(influences), torch.cat(losses)


def _by_inverse(curvature: Curvature, solver: CholeskySolver) -> Iterator[Part]:
    """M_i for all points from the inverse of H, above the diagonal only: n (C D)^2 operations."""
    loss = curvature.loss
    n, C, D = len(loss.features), loss.num_classes, loss.features.shape[1]
    inverse = solver.inverse()
    # Each chunk reads the whole inverse, so chunks of a few points would do nothing but that.
    for rows in chunks(loss.features, max(C * C, C * D // 16)):
        e_BD = loss.features[rows]
        M_BCC = e_BD.new_empty(len(e_BD), C, C)
        for c in range(C):
            along = (e_BD @ inverse[c * D : (c + 1) * D, c * D :]).view(-1, C - c, D)
            M_BCC[:, c, c:] = M_BCC[:, c:, c] = torch.bmm(along, e_BD[:, :, None])[:, :, 0] / n
        yield (rows, *_own_change(curvature, rows, M_BCC))


def _own_change(curvature: Curvature, rows: slice | Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Self-influence r^T M r, (B,), and the change of the scores (I - M A)^-1 M r, (B, C)."""
    p_BC, r_BC = curvature.probabilities(rows), curvature.residuals(rows)
    M_BCC = matrices
    moved = torch.bmm(M_BCC, r_BC[:, :, None])
    system = torch.eye(M_BCC.shape[1], dtype=M_BCC.dtype, device=M_BCC.device) - apply_softmax_jacobian(
        p_BC[:, None], M_BCC
    )
    return (moved[:, :, 0] * r_BC).sum(dim=1), torch.linalg.solve(system, moved)[:, :, 0]


def _by_axes(curvature: Curvature, solver: ConjugateGradientSolver) -> Iterator[Part]:
    """The same with the preconditioner's Hessian, for which M = V diag(q) V^T / n, where V are its class axes.

    Averaged over all points, it knows next to nothing of a single one, so it stands for the Hessian without the point:
    the scores move by M r. (Taking the own term out of it as well gives leverages above 1: on digits with a tenth of
    the labels wrong and a weight decay of 1e-4, Spearman's correlation with the exact losses was 0.33, and 0.996 so.)
    """
    loss, axes = curvature.loss, solver.precondition
    inverse_DC = (1 / axes.diagonal).T
    for rows in chunks(loss.features, loss.num_classes + loss.features.shape[1]):
        e_BD, r_BC = loss.features[rows], curvature.residuals(rows)
        q_BC = (e_BD if axes.features is None else e_BD @ axes.features).square() @ inverse_DC / len(loss.features)
        turned = r_BC if axes.classes is None else r_BC @ axes.classes
        shift = q_BC * turned
        yield rows, (shift * turned).sum(dim=1), shift if axes.classes is None else shift @ axes.classes.T


def _by_solving(
    curvature: Curvature, solver: CholeskySolver | ConjugateGradientSolver, indices: Tensor
) -> Iterator[Part]:
    """For the points asked for: two solutions each, with H and with H less the point's own term."""
    n = len(curvature.loss.features)
    for some in torch.split(indices, max(1, (1 << 22) // curvature.loss.size)):
        e_kD, r_kC = curvature.loss.features[some], curvature.residuals(some)
        gradient = r_kC[:, :, None] * e_kD[:, None] / n
        influence = torch.einsum("kcd,kcd->k", solver(gradient), gradient) * n
        moved = _without(curvature, solver, some, _TOLERANCE)(gradient)
        yield some, influence, torch.einsum("kcd,kd->kc", moved, e_kD)


def left_out_weights(
    curvature: Curvature, solver: CholeskySolver | ConjugateGradientSolver, indices: Tensor, steps: int
) -> Tensor:
    """The heads without one point each, (k, C, D): `steps` Newton steps, or a refit where these do not arrive."""
    loss = curvature.loss
    solve = _without(curvature, solver, indices, _STEP_TOLERANCE)
    weights = curvature.weight.expand(len(indices), -1, -1)
    gradients = _gradients_without(loss, weights, indices)
    step = solve(gradients)
    for _ in range(steps):
        weights, last = weights - step, step.flatten(1).norm(dim=1)
        step = solve(_gradients_without(loss, weights, indices))
    # The gradient alone would not tell: where there is hardly any curvature, little gradient is a long way. Steps with
    # a fixed Hessian shrink by a fixed factor, so the way that is left is a geometric series.
    ahead = step.flatten(1).norm(dim=1)
    gone = (weights - curvature.weight).flatten(1).norm(dim=1)
    # NaN compares false. Steps as small as rounding no longer shrink.
    at_rest = (ahead * last <= _AT_REST * gone * (last - ahead)) | (ahead <= 1e-7 * gone)
    for place in (~at_rest).nonzero()[:, 0].tolist():
        weights = weights.clone()
        weights[place] = _refit_without(loss, curvature.weight, int(indices[place]))
    return weights


def _gradients_without(loss: HeadLoss, weights: Tensor, indices: Tensor) -> Tensor:
    """Gradient of F less the term of one point each, at one weight each, (k, C, D)."""
    gradients = loss.evaluate(weights)[1]
    e_kD = loss.features[indices]
    residual = torch.softmax(torch.einsum("kcd,kd->kc", weights, e_kD), dim=1)
    residual[torch.arange(len(indices), device=indices.device), loss.labels[indices]] -= 1.0
    return gradients - residual[:, :, None] * e_kD[:, None] / len(loss.features)


def _without(
    curvature: Curvature, solver: CholeskySolver | ConjugateGradientSolver, indices: Tensor, tolerance: float
) -> Product:
    """Solves with the Hessian less the own term of one point each; `tolerance` is for conjugate gradients."""
    n = len(curvature.loss.features)
    e_kD, p_kC = curvature.loss.features[indices], curvature.probabilities(indices)
    if isinstance(solver, CholeskySolver):
        return _by_woodbury(solver, e_kD, p_kC, n)

    def solve(right: Tensor) -> Tensor:
        def product(vectors: Tensor) -> Tensor:
            own = apply_softmax_jacobian(p_kC, torch.einsum("kcd,kd->kc", vectors, e_kD))
            return curvature.product(vectors) - own[:, :, None] * e_kD[:, None] / n

        return solver.solve(product, right, tolerance)

    return solve


def _by_woodbury(solver: CholeskySolver, features: Tensor, probabilities: Tensor, n: int) -> Product:
    """(H - J A J^T / n)^-1 v = H^-1 v + H^-1 J A (I - M A)^-1 J^T H^-1 v / n."""
    e_kD, p_kC = features, probabilities
    (k, D), C = e_kD.shape, p_kC.shape[1]
    identity = torch.eye(C, dtype=e_kD.dtype, device=e_kD.device)
    unit = identity[None, :, :, None] * e_kD[:, None, None]
    moved = solver(unit.reshape(k * C, C, D)).view(k, C, C, D)
    M_kCC = torch.einsum("kabd,kd->kab", moved, e_kD) / n
    A_kCC = torch.diag_embed(p_kC) - p_kC[:, :, None] * p_kC[:, None]
    inner = torch.linalg.solve(identity - M_kCC @ A_kCC, A_kCC, left=False)

    def solve(right: Tensor) -> Tensor:
        plain = solver(right)
        own = torch.einsum("kcd,kd->kc", plain, e_kD) / n
        return plain + torch.einsum("ka,kabd->kbd", torch.einsum("kab,kb->ka", inner, own), moved)

    return solve


def _refit_without(loss: HeadLoss, start: Tensor, index: int) -> Tensor:
    """The optimum without one point; the others keep their weight of 1/n. Without the only point it is 0."""
    n = len(loss.features)
    if n == 1:
        return torch.zeros_like(start)
    rest = torch.arange(n, device=loss.labels.device) != index
    scaled = HeadLoss(loss.features[rest], loss.labels[rest], loss.num_classes, loss.weight_decay * n / (n - 1))
    return minimise(scaled, start, tolerance=1e-9).weight
