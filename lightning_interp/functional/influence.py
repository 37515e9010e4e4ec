"""Influence functions of a softmax head: on which training points a prediction hangs.

Koh and Liang 2017, "Understanding black-box predictions via influence functions", equations 2 and 5. A point that is
*left out* has weight zero in F = 1/n sum over i of CE(W e_i, y_i) + weight_decay / 2 |W|^2, while n and the penalty
stay as they are: the optimum of the other points by their own mean with a `weight_decay` n / (n - 1) times as large.
(With the same `weight_decay`, nearly the same number is added for all points, and their order stays.)

A prediction is a derivative of the optimum, exact for infinitely small changes of a weight; leaving a point out is a
large one. What really happens then is `HeadInfluence.leave_one_out`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_interp.errors import InterpWarning
from lightning_interp.functional.influence_head import HeadInfluence
from lightning_interp.functional.influence_perturbation import perturbation_direction
from lightning_interp.functional.softmax_head import check_points

__all__ = ["HeadInfluence", "head_influence", "perturbation_direction", "self_influence"]


def head_influence(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    *,
    weight_decay: float = 1e-2,
) -> Tensor:
    """Predicted change of the loss of each test point if a training point were left out; see `HeadInfluence.on`.

    Args:
        train_embeddings: (n, d), floating and finite.
        train_labels: (n,), integers.
        test_embeddings: (m, d).
        test_labels: (m,), integers; may be of classes without a training point.
        weight_decay: Above 0.

    Returns:
        (m, n), float64, in nats; above 0: the training point is helpful.

    Raises:
        ArgumentError: If an argument is wrong, or embeddings are not finite.

    Source: Koh and Liang 2017, equation 2.

    Example:
        >>> points, labels = torch.tensor([[-1.0], [-2.0], [1.0]]), torch.tensor([0, 0, 1])
        >>> head_influence(points, labels, torch.tensor([[2.0]]), torch.tensor([1]), weight_decay=0.1).shape
        torch.Size([1, 3])
    """
    train_features, train_targets = check_points("train_embeddings", "train_labels", train_embeddings, train_labels)
    width = train_features.shape[1] - 1
    _, test_targets = check_points("test_embeddings", "test_labels", test_embeddings, test_labels, width=width)
    classes = int(torch.cat([train_targets, test_targets]).max()) + 1 if len(train_targets) else None
    influence = HeadInfluence(train_embeddings, train_labels, weight_decay=weight_decay, num_classes=classes)
    return influence.on(test_embeddings, test_labels)


def self_influence(embeddings: Tensor, labels: Tensor, *, weight_decay: float = 1e-2) -> Tensor:
    """Predicted rise of each point's own loss if it were left out; see `HeadInfluence.self_influence`.

    Args:
        embeddings: (n, d), floating and finite.
        labels: (n,), integers.
        weight_decay: Above 0.

    Returns:
        (n,), float64, >= 0, in nats. For heads of more than 6,000 weights it is an approximation that ranks the points,
        and an `InterpWarning` says so.

    Raises:
        ArgumentError: If an argument is wrong, or embeddings are not finite.

    Source: Koh and Liang 2017, section 5.4.

    Example:
        >>> points, labels = torch.tensor([[-1.0], [-1.1], [1.0], [1.1], [0.9]]), torch.tensor([0, 0, 1, 1, 0])
        >>> self_influence(points, labels).argmax()  # the last one lies among the points of the other class
        tensor(4)
    """
    influence = HeadInfluence(embeddings, labels, weight_decay=weight_decay)
    if not influence.exact:
        warnings.warn(
            f"A head of {influence.loss.size:,} weights is too large to be factorised: self-influences come from an "
            "approximation of its Hessian, fit for ranking. `HeadInfluence.self_influence(indices)` gives exact ones.",
            InterpWarning,
            stacklevel=2,
        )
    return influence.self_influence()
