"""A softmax head on frozen embeddings, fitted to its optimum: where influence functions hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp._options import expected
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.influence_hessian import Curvature, HeadLoss, chunks
from lightning_interp.functional.influence_solvers import (
    DENSE_LIMIT,
    CholeskySolver,
    Preconditioner,
    conjugate_gradients,
    feature_axes,
)

_FACTORISE_AT_ONCE = 700
"""Weights up to which a factorisation costs less than finding out whether conjugate gradients would do."""
_LARGEST = 1e100


@dataclass(frozen=True)
class SoftmaxHead:
    """A head that is fitted; see `fit_softmax_head`.

    Attributes:
        weight: (C, d + 1), float64; the last column is the intercept. Dead features have weight 0.
        kept: (d,), bool; False for a feature that is 0 at every point.
        weight_decay: With which it was fitted.
        loss: Mean cross-entropy plus the penalty, in nats.
        gradient_norm: Norm of the gradient of `loss`; 0 at the optimum.
        converged: Whether `gradient_norm` is within the tolerance, or as small as float64 can tell.
        steps: Newton steps that it took.
    """

    weight: Tensor
    kept: Tensor
    weight_decay: float
    loss: float
    gradient_norm: float
    converged: bool
    steps: int

    def scores(self, embeddings: Tensor) -> Tensor:
        """Scores before the softmax.

        Args:
            embeddings: (m, d), floating.

        Returns:
            (m, C), float64.
        """
        return with_intercept(embeddings) @ self.weight.T

    def losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each point, without the penalty, in nats.

        Args:
            embeddings: (m, d), floating.
            labels: (m,), integers in [0, C).

        Returns:
            (m,), float64.
        """
        return torch.nn.functional.cross_entropy(self.scores(embeddings), labels.to(torch.int64), reduction="none")


@torch.no_grad()
def fit_softmax_head(  # noqa: PLR0913 - all but two by keyword
    embeddings: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    weight_decay: float = 1e-2,
    start: Tensor | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 200,
) -> SoftmaxHead:
    """Fits a softmax head to its optimum by Newton's method, in float64.

    F(W) = mean over i of CE(W e_i, y_i) + weight_decay / 2 |W|^2, where e_i is an embedding with a 1 appended, so that
    the intercept is part of W and penalised too. F is strictly convex: there is one optimum. A feature that is 0 at
    every point has weight 0 there, so it is left out of the computation; that changes nothing.

    Newton steps are solved by Cholesky for small heads and by preconditioned conjugate gradients for large ones, and
    shortened until the loss falls (Armijo's rule). Memory beyond the embeddings is bounded.

    Args:
        embeddings: (n, d), floating and finite; n >= 1, d >= 0.
        labels: (n,), integers in [0, C).
        num_classes: C; None: the largest label plus 1.
        weight_decay: Above 0.
        start: (C, d + 1), where to start, such as the head of the epoch before; None: zeros. Only saves time.
        tolerance: Norm of the gradient that counts as the optimum.
        max_steps: Newton steps at most.

    Returns:
        A head whose tensors lie on the device of `embeddings` (on the CPU where that has no float64). Look at
        `converged`: with features so large that float64 can't resolve `tolerance`, it means as small as it can.

    Raises:
        ArgumentError: If an argument is wrong, or embeddings are not finite.

    Example:
        >>> head = fit_softmax_head(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), weight_decay=0.1)
        >>> head.scores(torch.tensor([[2.0]])).argmax(dim=1), head.gradient_norm < 1e-8
        (tensor([1]), True)
    """
    if not isinstance(max_steps, int) or max_steps < 0:
        raise expected("max_steps", "an integer of at least 0", max_steps)
    loss, kept = head_loss(embeddings, labels, num_classes, weight_decay)
    weight = start_of(start, loss, kept)
    found = minimise(loss, weight, tolerance=tolerance, max_steps=max_steps)
    full = loss.features.new_zeros(loss.num_classes, len(kept) + 1)
    full[:, with_one(kept)] = found.weight
    return SoftmaxHead(full, kept, loss.weight_decay, found.loss, found.gradient_norm, found.converged, found.steps)


def with_intercept(embeddings: Tensor) -> Tensor:
    """(m, d) to (m, d + 1) in float64, the last column ones."""
    exact = (embeddings.cpu() if embeddings.device.type == "mps" else embeddings).detach().to(torch.float64)
    return torch.cat([exact, exact.new_ones(len(exact), 1)], dim=1)


def with_one(kept: Tensor) -> Tensor:
    """The mask of the kept columns, with the intercept's, (d + 1,)."""
    return torch.cat([kept, kept.new_ones(1)])


def head_loss(
    embeddings: Tensor, labels: Tensor, num_classes: int | None, weight_decay: float
) -> tuple[HeadLoss, Tensor]:
    """The loss of a head on its kept features, and which ones these are, (d,), after all checks."""
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float) or not 0 < weight_decay < math.inf:
        raise expected("weight_decay", "a number above 0: without it the head may have no optimum", weight_decay)
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise expected("num_classes", "a positive integer or None", num_classes)
    features, targets = check_points("embeddings", "labels", embeddings, labels, classes=num_classes)
    if len(targets) == 0:
        raise expected("embeddings", "at least one point", f"shape {tuple(embeddings.shape)}")
    kept = (features[:, :-1] != 0).any(dim=0)
    used = features if bool(kept.all()) else features[:, with_one(kept)].contiguous()
    return HeadLoss(used, targets, num_classes or int(targets.max()) + 1, float(weight_decay)), kept


def check_points(  # noqa: PLR0913 - what is optional by keyword
    name: str,
    label_name: str,
    embeddings: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Points with their intercept, (n, d + 1) in float64, and labels, (n,) in int64 on the same device.

    Raises:
        ArgumentError: If a shape or type is wrong, a number not finite or a label no class.
    """
    right = isinstance(embeddings, Tensor) and embeddings.ndim == 2 and embeddings.is_floating_point()
    if not right or width not in (None, embeddings.shape[1]):
        found = f"{tuple(embeddings.shape)} {embeddings.dtype}" if isinstance(embeddings, Tensor) else embeddings
        raise expected(name, f"a floating tensor (points, {'features' if width is None else width})", found)
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not whole or labels.shape != embeddings.shape[:1] or labels.dtype == torch.bool:
        found = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else labels
        raise expected(label_name, f"a tensor of {len(embeddings)} class indices, one for each point", found)
    features = with_intercept(embeddings)
    # NaN compares false. The squares of numbers up to 1e100 can be added up without overflow.
    wrong = int((~(features.abs() <= _LARGEST).all(dim=1)).sum())
    if wrong:
        raise ArgumentError(
            f"{wrong} of the {len(features)} rows of argument `{name}` are not finite (NaN, infinite or above "
            f"{_LARGEST:g}). Leave these points out with `torch.isfinite({name}).all(dim=1)`; if all rows are "
            "concerned, the network itself has diverged."
        )
    targets = labels.detach().to(features.device, torch.int64)
    outside = (targets < 0) | (targets >= (math.inf if classes is None else classes))
    if bool(outside.any()):
        limit = "0, 1, 2, ..." if classes is None else f"[0, {classes})"
        some = targets[outside][:5].tolist()
        raise expected(
            label_name, f"class indices in {limit}", some, f"This concerns {int(outside.sum())} of {len(targets)}."
        )
    return features, targets


def start_of(start: Tensor | None, loss: HeadLoss, kept: Tensor) -> Tensor:
    """Where to start: zeros, or `start` on the kept features if its loss is lower; summing to zero over the classes."""
    zeros = loss.features.new_zeros(loss.num_classes, loss.features.shape[1])
    if start is None:
        return zeros
    shape = (loss.num_classes, len(kept) + 1)
    if not isinstance(start, Tensor) or start.shape != shape:
        found = f"shape {tuple(start.shape)}" if isinstance(start, Tensor) else start
        raise expected("start", f"a tensor of shape {shape} (classes, features + 1)", found)
    weight = start.detach().to(zeros)[:, with_one(kept)]
    # One vector added to all rows changes no probability; the smallest such W sums to zero, and Newton stays there.
    weight = weight - weight.mean(dim=0)
    losses = loss.evaluate(torch.stack([zeros, weight]))[0]
    return weight if bool(losses[1] <= losses[0]) else zeros


@dataclass(frozen=True)
class Minimum:
    """Where `minimise` came to rest; the fields are those of `SoftmaxHead`."""

    weight: Tensor
    loss: float
    gradient_norm: float
    converged: bool
    steps: int


def minimise(loss: HeadLoss, weight: Tensor, *, tolerance: float, max_steps: int = 200) -> Minimum:
    """Newton's method with backtracking (Nocedal and Wright 2006, algorithm 7.1), from `weight` (C, D)."""
    directions = _Directions(loss)
    values, gradients = loss.evaluate(weight[None])
    value, gradient, first, steps = float(values[0]), gradients[0], float(gradients.norm()), 0
    while float(gradient.norm()) > tolerance and steps < max_steps:
        # Ever more exact towards the optimum: then the steps converge faster than linearly.
        accuracy = min(0.1, max(1e-5, math.sqrt(float(gradient.norm()) / first)))
        direction = directions(weight, gradient, accuracy)
        lower = _search(loss, weight, value, gradient, direction)
        if lower is None:
            break
        weight, value, gradient = lower
        steps += 1
    norm = float(gradient.norm())
    return Minimum(weight, value, norm, norm <= max(tolerance, _resolution(loss, weight)), steps)


def _resolution(loss: HeadLoss, weight: Tensor) -> float:
    """Norm of the gradient below which rounding decides: that of the scores, passed on to the probabilities."""
    largest = float(loss.features.norm(dim=1).max())
    scores = max(float((loss.features[rows] @ weight.T).abs().max()) for rows in chunks(loss.features, len(weight)))
    return 4 * torch.finfo(torch.float64).eps * largest * (1 + scores)


class _Directions:
    """Newton directions -H^-1 g: by conjugate gradients; by Cholesky for small heads, or where those take too long."""

    def __init__(self, loss: HeadLoss) -> None:
        self.loss = loss
        self.dense = loss.size <= _FACTORISE_AT_ONCE
        self.may_factorise = loss.size <= DENSE_LIMIT
        self.axes: Tensor | None = None

    def __call__(self, weight: Tensor, gradient: Tensor, accuracy: float) -> Tensor:
        curvature = Curvature(self.loss, weight)
        while True:
            if self.dense:
                solver = CholeskySolver(curvature)
                if not solver.failed:
                    return -solver(gradient[None])[0]
                self.dense = self.may_factorise = False
            if self.axes is None:
                self.axes = feature_axes(self.loss)
            # A factorisation costs as much as about C D / 8 products with one vector.
            most = max(20, self.loss.size // 8) if self.may_factorise else 1_000
            found, residuals = conjugate_gradients(
                curvature.product,
                gradient[None],
                Preconditioner(curvature, self.axes),
                tolerance=accuracy,
                max_iterations=most,
            )
            if not self.may_factorise or float(residuals[0]) <= accuracy:
                return -found[0]
            self.dense = True


def _search(
    loss: HeadLoss, weight: Tensor, value: float, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """The first of the steps 1, 1/2, 1/4, ... that lowers the loss enough; None if rounding hides any fall."""
    slope, norm, size = float((gradient * direction).sum()), float(gradient.norm()), 1.0
    for _ in range(40):
        candidate = weight + size * direction
        values, gradients = loss.evaluate(candidate[None])
        new = float(values[0])
        # Near the optimum the loss no longer resolves the fall, but the gradient does.
        flat = new <= value + 1e-13 * (1 + abs(value)) and float(gradients[0].norm()) < norm
        if slope < 0 and (new <= value + 1e-4 * size * slope or flat):
            return candidate, new, gradients[0]
        size /= 2
    return None
