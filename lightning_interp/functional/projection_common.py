"""What all projections to two dimensions share: their result, their scale, and how they keep to the last one's places.

Shape letters: N points, D features, K principal components, M points that the last map has too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_interp._options import expected
from lightning_interp.functional.separation import squared_distances, standardised

Points = Tensor | NDArray[Any]

# Of a point that the last map lacks: it starts between so many of its nearest points that the map has.
_NEAREST = 3


@dataclass(frozen=True)
class Projection:
    """Points on a map.

    Attributes:
        coordinates: (N, 2), float64, on the CPU: centred, with a root mean square distance of 1 from the centre; NaN
            for points that were not finite, all zero where all points are the same.
        kl_divergence: Of t-SNE, in nats; None for other methods and for fewer than five points.
        explained: Of PCA: the share of the variance that lies along each axis of the map, NaN where there is none; None
            for other methods.
    """

    coordinates: Tensor
    kl_divergence: float | None = None
    explained: tuple[float, float] | None = None


def displacement(coordinates: Points, previous: Points) -> float:
    """How far points moved between two maps: median distance, divided by the spread of the first map.

    Args:
        coordinates: (N, 2), of the later map.
        previous: (N, 2), of the earlier one. Points that are not finite in both are left out.

    Returns:
        At least 0; 1 is the root mean square distance of the earlier points from their centre. NaN where no point is
        in both maps or the earlier ones all lie in one place.

    Raises:
        ArgumentError: If the shapes are not the same (N, 2).

    Example:
        >>> displacement([[3.0, 0.0], [-3.0, 0.0]], [[4.0, 0.0], [-4.0, 0.0]])
        0.25
    """
    now_N2 = torch.as_tensor(coordinates).detach().to("cpu", torch.float64)
    before_N2 = torch.as_tensor(previous).detach().to("cpu", torch.float64)
    if now_N2.ndim != 2 or now_N2.shape[1] != 2 or now_N2.shape != before_N2.shape:
        raise expected("previous", f"of the shape (N, 2) of `coordinates`, {tuple(now_N2.shape)}", before_N2.shape)
    both_N = (now_N2.isfinite() & before_N2.isfinite()).all(dim=1)
    if not bool(both_N.any()):
        return float("nan")
    now_N2, before_N2 = now_N2[both_N], before_N2[both_N]
    spread = root_mean_square(before_N2 - before_N2.mean(dim=0))
    return float((now_N2 - before_N2).norm(dim=1).median()) / spread if spread else float("nan")


@dataclass(frozen=True)
class Prepared:
    """The input of a projection, read and checked.

    Attributes:
        finite: Which points are finite.
        points: Those points, centred, float64, on the CPU, without constant features.
        previous: Their coordinates in the last map, NaN where it lacks them; None where it has none of use.
    """

    finite: Tensor
    points: Tensor
    previous: Tensor | None

    def spread_out(self, coordinates: Tensor) -> Tensor:
        """(all points, 2), scaled, and NaN where a point was not finite."""
        whole = torch.full((len(self.finite), 2), torch.nan, dtype=torch.float64)
        whole[self.finite] = unit_spread(coordinates)
        return whole


def prepare(embeddings: Points, previous: Points | None) -> Prepared:
    """Reads the input of a projection.

    Args:
        embeddings: (N, D), floating, tensor or array.
        previous: (N, 2), or None.

    Raises:
        ArgumentError: If a shape or a type is wrong.
    """
    points = torch.as_tensor(embeddings).detach()
    if points.ndim != 2 or not points.is_floating_point():
        raise expected("embeddings", "floating (N, D)", f"{tuple(points.shape)} {points.dtype}")
    finite = points.isfinite().all(dim=1)
    before_N2 = None
    if previous is not None:
        before_N2 = torch.as_tensor(previous).detach().to("cpu", torch.float64)
        if before_N2.shape != (len(points), 2):
            raise expected("previous", f"({len(points)}, 2), a place for each point", tuple(before_N2.shape))
        before_N2 = _usable(before_N2[finite.cpu()])
    return Prepared(finite.cpu(), standardised(points[finite]).cpu(), before_N2)


def _usable(previous: Tensor) -> Tensor | None:
    """Centred and scaled to unit spread; None where fewer than two points stand in different places."""
    known_N = previous.isfinite().all(dim=1)
    if int(known_N.sum()) < 2:
        return None
    scaled_M2 = unit_spread(previous[known_N])
    if not bool(scaled_M2.any()):
        return None
    result_N2 = torch.full_like(previous, torch.nan)
    result_N2[known_N] = scaled_M2
    return result_N2


def unit_spread(coordinates: Tensor) -> Tensor:
    """Centred, with a root mean square distance of 1 from the centre; zero where all points are the same."""
    if not len(coordinates):
        return coordinates
    centred = coordinates - coordinates.mean(dim=0)
    largest = coordinates.abs().max()
    spread = root_mean_square(centred)
    return centred / spread if spread > 1e-12 * largest else torch.zeros_like(centred)


def root_mean_square(centred: Tensor) -> float:
    """Of the lengths of the rows."""
    return float(centred.square().sum(dim=1).mean().sqrt())


def principal_scores(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal components of centred points.

    Args:
        points: Centred, float64.
        count: Of components, K; those beyond the rank are zero.

    Returns:
        (N, K) scores, the largest of each component positive, and (K,) shares of the variance (NaN if there is none).

    Source: Pearson 1901; by the eigenvectors of the smaller of x^T x and x x^T, in float64: in float32 this fails now
    and then where many features are dead.
    """
    wide = points.shape[0] < points.shape[1]
    values, vectors = torch.linalg.eigh(points @ points.T if wide else points.T @ points)
    values, vectors = values.flip(0).clamp(min=0.0)[:count], vectors.flip(1)[:, :count]
    if len(values):
        values = values.where(values > values[0] * max(points.shape) * torch.finfo(torch.float64).eps, 0.0)
    scores = vectors * values.sqrt() if wide else (points @ vectors) * (values > 0)
    if scores.numel():
        farthest = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))
        scores = scores * torch.where(farthest < 0, -1.0, 1.0)
    missing = count - scores.shape[1]
    shares_K = torch.cat([values / points.square().sum(), values.new_zeros(missing)])
    return torch.cat([scores, scores.new_zeros(len(points), missing)], dim=1), shares_K


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns that has the largest inner product with a (K, 2) one, K at least 2.

    Source: Schoenemann 1966 (orthogonal Procrustes problem).
    """
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = left @ right
    return product


def aligned(coordinates: Tensor, previous: Tensor | None) -> Tensor:
    """Turned, and mirrored if need be, so that the points lie as near as they can to where they were.

    Args:
        coordinates: (N, 2), finite.
        previous: (N, 2), NaN for points to leave out; None changes nothing.
    """
    if previous is None:
        return coordinates
    known_N = previous.isfinite().all(dim=1)
    now_M2 = coordinates[known_N] - coordinates[known_N].mean(dim=0)
    return coordinates @ nearest_orthonormal(now_M2.T @ previous[known_N])


def filled_in(previous: Tensor, points: Tensor) -> Tensor:
    """Places for the points that the last map lacks: the middle of their nearest points that it has.

    Args:
        previous: (N, 2), NaN where a place is missing, at least one of them known.
        points: The points themselves.
    """
    known_N = previous.isfinite().all(dim=1)
    if bool(known_N.all()):
        return previous
    places_M2, there_MD = previous[known_N], points[known_N]
    result_N2 = previous.clone()
    # In pieces, so that the distances of 100,000 points need no more than some 100 MB.
    for rows in torch.split((~known_N).nonzero()[:, 0], max(1, 2**23 // len(there_MD))):
        distances = squared_distances(points[rows], there_MD)
        nearest = distances.topk(min(_NEAREST, len(there_MD)), dim=1, largest=False).indices
        result_N2[rows] = places_M2[nearest].mean(dim=1)
    return result_N2
