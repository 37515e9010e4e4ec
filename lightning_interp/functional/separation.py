"""How well embeddings separate the classes, in five numbers.

Shape letters: N points, D features, C classes, B points of a chunk, K neighbours.

All five are the same for embeddings that are shifted, rotated or scaled. None of them looks at the model's own scores:
they say what the features hold, not what the last layer makes of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_interp._options import check_at_least, check_positive_int, expected

# In float64 2^25 values are 256 MB: 10,000 points of 3,355 features. A chunk of distances is at most half of that.
_MAX_VALUES = 2**25
_MAX_DISTANCES = 2**24
# Squared distances below this part of the squared lengths are rounding: the points are the same.
_SAME = 1e-14


def separation(
    embeddings: Tensor,
    labels: Tensor,
    *,
    neighbors: int = 10,
    max_points: int = 10_000,
    max_silhouette_points: int = 2_000,
) -> dict[str, float]:
    """How well embeddings separate the classes.

    With S_W the covariance of the points around the means of their classes and S_B that of the class means around the
    mean of all points, each mean weighted by its share of the points (so S_W + S_B is the covariance of the points):

    - `knn_accuracy`: share of the points whose class wins the vote of `neighbor_votes`, in [0, 1].
    - `silhouette`: mean of (b - a) / max(a, b), a being the mean distance to the points of the own class and b that to
      those of the nearest other class, in [-1, 1]; 0 for the only point of a class. On at most `max_silhouette_points`.
    - `fisher_ratio`: tr(S_B) / tr(S_W), at least 0; infinite where each class is one place and the places differ.
    - `nc1`: tr(S_W pinv(S_B)) / C, at least 0; falls to 0 as the classes collapse to their means.
    - `effective_rank`: exp of the entropy of the singular values of the centred embeddings, divided by their sum: how
      many directions the points use, in [1, min(N - 1, D)].

    Points with a NaN or an infinity are left out. Of more than `max_points`, or more than 2^25 values in all, a fixed
    subset is taken: the points are cut into equal stretches, and one of each is drawn from a generator of its own. What
    has no meaning is NaN: all but `effective_rank` with fewer than two classes, or where no class has two points;
    `fisher_ratio`, `nc1` and `effective_rank` where all points are the same; `nc1` where all class means are.

    Args:
        embeddings: (N, D), floating, on any device.
        labels: (N,), integers.
        neighbors: K of the vote; at most N - 1 are taken.
        max_points: At least 2.
        max_silhouette_points: At least 2.

    Returns:
        The five numbers by name, unitless.

    Raises:
        ArgumentError: If a shape, a type or an option is wrong.

    Cost: N^2 D for the votes, min(N, D)^3 for the rank; no more than 1 GB of memory.
    Source: Cover and Hart 1967 (neighbours); Rousseeuw 1987 (silhouette); Fisher 1936; Papyan, Han, Donoho 2020
    (NC1, there for classes of equal size); Roy and Vetterli 2007 (effective rank, there without centring).

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> numbers = separation(points, torch.tensor([0, 0, 1, 1]), neighbors=1)
        >>> numbers["knn_accuracy"], round(numbers["fisher_ratio"], 6), round(numbers["nc1"], 6)
        (1.0, 81.0, 0.0)
    """
    _check(embeddings, labels, neighbors)
    check_at_least("max_points", max_points, 2)
    check_at_least("max_silhouette_points", max_silhouette_points, 2)
    embeddings, labels = embeddings.detach(), labels.detach()
    finite = _finite_rows(embeddings)
    chosen = evenly(len(finite), min(max_points, max(2, _MAX_VALUES // max(embeddings.shape[1], 1))))
    kept = finite[chosen.to(finite.device)]
    points = standardised(embeddings[kept])
    classes = torch.unique(labels[kept.to(labels.device)].to(points.device), return_inverse=True)[1]
    numbers = dict.fromkeys(("knn_accuracy", "silhouette", "fisher_ratio", "nc1"), math.nan)
    if len(classes) and 1 < int(classes.max()) + 1 < len(classes):
        numbers["knn_accuracy"] = float((_votes(points, classes, neighbors) == classes).double().mean())
        part = evenly(len(points), max_silhouette_points).to(points.device)
        numbers["silhouette"] = _silhouette(points[part], classes[part])
        numbers["fisher_ratio"], numbers["nc1"] = _scatter_numbers(points, classes)
    numbers["effective_rank"] = _effective_rank(points)
    return numbers


def neighbor_votes(embeddings: Tensor, labels: Tensor, *, neighbors: int = 10) -> Tensor:
    """For each point, the class that most of its nearest other points have.

    Euclidean; over all pairs, not approximate. Of classes with equally many votes the one wins whose nearest member is
    nearest; of points at the same distance (to one part in 10^7) the one with the lower index counts as nearer.

    Args:
        embeddings: (N, D), floating.
        labels: (N,), integers.
        neighbors: How many vote; at most N - 1 are taken.

    Returns:
        (N,), int64: labels, on the device of `embeddings`. A point with a NaN or an infinity does not vote and gets its
        own label, and so does one that has no other point.

    Raises:
        ArgumentError: If a shape or a type is wrong or `neighbors` is not positive.

    Cost: N^2 D time, N D + 2^24 values of memory.

    Example:
        >>> neighbor_votes(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([5, 5, 7, 7]), neighbors=2)
        tensor([5, 5, 5, 7])
    """
    _check(embeddings, labels, neighbors)
    votes = labels.detach().to(embeddings.device, torch.int64, copy=True)
    kept = _finite_rows(embeddings)
    if len(kept) > 1:
        classes, of_N = torch.unique(votes[kept], return_inverse=True)
        points = standardised(embeddings.detach()[kept])
        votes[kept] = classes[_votes(points, of_N.to(points.device), neighbors).to(classes.device)]
    return votes


def evenly(count: int, limit: int) -> Tensor:
    """Indices of a fixed subset of at most `limit` of `count` points, ascending, spread evenly.

    One index from each of `limit` equal stretches. They are drawn, not equally spaced: data in which the classes take
    turns would otherwise lose some of them.

    Returns:
        (min(count, limit),), int64, on the CPU; the same ones each time.

    Example:
        >>> evenly(3, 5), (evenly(1000, 4) // 250)
        (tensor([0, 1, 2]), tensor([0, 1, 2, 3]))
    """
    if count <= limit:
        return torch.arange(count)
    bounds = torch.arange(limit + 1) * count // limit
    drawn = torch.rand(limit, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = bounds[1:] - bounds[:-1]
    return bounds[:-1] + (drawn * lengths).long()


def standardised(embeddings: Tensor) -> Tensor:
    """In float64, centred, divided by the largest magnitude, without the features that are the same for all points.

    Args:
        embeddings: (N, D), finite.

    Returns:
        (N, D'), D' <= D; on the CPU where the device has no float64.
    """
    points = (embeddings.cpu() if embeddings.device.type == "mps" else embeddings).to(torch.float64)
    if not points.numel():
        return points[:, :0]
    # Exact: the mean of equal numbers need not be that number, and what is left of them would pass for a feature.
    points = points[:, points.amax(dim=0) > points.amin(dim=0)]
    if not points.numel():
        return points
    points = points / points.abs().max()
    points = points - points.mean(dim=0)
    return points / points.abs().max()


def _check(embeddings: Tensor, labels: Tensor, neighbors: int) -> None:
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        found = f"{tuple(embeddings.shape)} {embeddings.dtype}" if isinstance(embeddings, Tensor) else type(embeddings)
        raise expected("embeddings", "a floating tensor (N, D)", found)
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not whole or labels.shape != embeddings.shape[:1]:
        found = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels)
        raise expected("labels", f"a tensor of {len(embeddings)} class indices, one for each point", found)
    check_positive_int("neighbors", neighbors)


def _finite_rows(embeddings: Tensor) -> Tensor:
    return embeddings.isfinite().all(dim=1).nonzero()[:, 0]


def squared_distances(rows: Tensor, points: Tensor) -> Tensor:
    """(B, N); zero for points that are the same in all but rounding."""
    lengths_BN = rows.square().sum(dim=1, keepdim=True) + points.square().sum(dim=1)
    distances = torch.addmm(lengths_BN, rows, points.T, alpha=-2.0)
    return distances.masked_fill_(distances <= _SAME * lengths_BN, 0.0)


def _votes(points: Tensor, classes: Tensor, neighbors: int) -> Tensor:
    """The class that wins at each point; N is at least 2."""
    count = min(neighbors, len(points) - 1)
    rows = torch.arange(len(points), device=points.device)
    parts = []
    for chunk in torch.split(rows, max(1, _MAX_DISTANCES // 4 // len(points))):
        # Computed in float64, compared in float32: distances that are equal by right don't differ by their rounding.
        distances = squared_distances(points[chunk], points).float()
        distances[torch.arange(len(chunk), device=points.device), chunk] = math.inf
        parts.append(_winners(classes[_nearest(distances, count)]))
    return torch.cat(parts)


def _nearest(distances: Tensor, count: int) -> Tensor:
    """(B, K) indices, the nearest first, and of equally near ones the lower index first; K is less than N."""
    values_BK, indices_BK = distances.topk(count + 1, dim=1, largest=False)
    last_B = values_BK[:, count - 1]
    chosen_BK = indices_BK[:, :count].clone()
    # `topk` takes any of those at the same distance: where they don't all fit, the lowest are looked up.
    for row in (last_B == values_BK[:, count]).nonzero()[:, 0].tolist():
        nearer = (distances[row] < last_B[row]).nonzero()[:, 0]
        level = (distances[row] == last_B[row]).nonzero()[:, 0]
        chosen_BK[row] = torch.cat([nearer, level])[:count]
    chosen_BK = chosen_BK.sort(dim=1).values
    order_BK = distances.gather(1, chosen_BK).argsort(dim=1, stable=True)
    return chosen_BK.gather(1, order_BK)


def _winners(classes: Tensor) -> Tensor:
    """(B,), the most frequent of each row, and of equally frequent ones the first."""
    counts_BK = (classes[:, :, None] == classes[:, None, :]).sum(dim=2)
    first_B1 = (counts_BK == counts_BK.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return classes.gather(1, first_B1)[:, 0]


def _silhouette(points: Tensor, classes: Tensor) -> float:
    """Mean silhouette; NaN where the subset has one class or only single points."""
    _, of_N, sizes_C = torch.unique(classes, return_inverse=True, return_counts=True)
    if not 1 < len(sizes_C) < len(points):
        return math.nan
    order = of_N.argsort(stable=True)
    points, of_N = points[order], of_N[order]
    distances_NN = squared_distances(points, points).sqrt_().fill_diagonal_(0.0)
    # Points of one class now stand together: sums over stretches, a class at a time.
    sums_NC = torch.stack([part.sum(dim=1) for part in torch.split(distances_NN, sizes_C.tolist(), dim=1)], dim=1)
    own_N = torch.arange(len(points), device=points.device)
    within_N = sums_NC[own_N, of_N] / (sizes_C[of_N] - 1).clamp(min=1)
    means_NC = sums_NC / sizes_C
    means_NC[own_N, of_N] = math.inf
    nearest_N = means_NC.amin(dim=1)
    larger_N = torch.maximum(within_N, nearest_N)
    values_N = torch.where(larger_N > 0, (nearest_N - within_N) / larger_N, 0.0)
    return float(torch.where(sizes_C[of_N] > 1, values_N, 0.0).mean())


def _scatter_numbers(points: Tensor, classes: Tensor) -> tuple[float, float]:
    """`fisher_ratio` and `nc1` of centred points."""
    sizes_C = torch.bincount(classes).to(points.dtype)
    if not points.shape[1]:
        return math.nan, math.nan
    means_CD = points.new_zeros(len(sizes_C), points.shape[1]).index_add_(0, classes, points) / sizes_C[:, None]
    inner_ND = points - means_CD[classes]
    # What rounding leaves of points that are all at their mean is no spread.
    inner_ND = torch.where(inner_ND.abs() <= 1e-14, 0.0, inner_ND)
    outer_CD = means_CD * (sizes_C[:, None] / len(points)).sqrt()
    within = float(inner_ND.square().sum() / len(points))
    between = float(outer_CD.square().sum())
    values, axes_DK = _principal(outer_CD)
    if between <= 1e-28 or not len(values):
        return (0.0 if within else math.nan), math.nan
    nc1 = float(((inner_ND @ axes_DK).square().mean(dim=0) / values).sum()) / len(sizes_C)
    return between / within if within else math.inf, nc1


def _principal(points: Tensor) -> tuple[Tensor, Tensor]:
    """Non-zero eigenvalues of x^T x, descending, (K,), and their axes, (D, K)."""
    wide = points.shape[0] < points.shape[1]
    values, vectors = torch.linalg.eigh(points @ points.T if wide else points.T @ points)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > values[:1] * _rounding(points)
    values, vectors = values[kept], vectors[:, kept]
    return values, (points.T @ vectors) / values.sqrt() if wide else vectors


def _effective_rank(points: Tensor) -> float:
    """Of centred points."""
    if not points.numel():
        return math.nan
    gram = points @ points.T if points.shape[0] < points.shape[1] else points.T @ points
    values = torch.linalg.eigvalsh(gram)
    singular = values.where(values > values[-1] * _rounding(points), 0.0).sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def _rounding(points: Tensor) -> float:
    """Eigenvalues below this part of the largest one are rounding."""
    return float(max(points.shape) * torch.finfo(torch.float64).eps)
