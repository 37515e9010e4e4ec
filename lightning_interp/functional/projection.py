"""Projections of embeddings to two dimensions, in which points keep their place from one time to the next."""

from __future__ import annotations

from torch import Tensor

from lightning_interp.functional.projection_common import (
    Points,
    Projection,
    aligned,
    displacement,
    nearest_orthonormal,
    prepare,
    principal_scores,
)
from lightning_interp.functional.projection_tsne import project_tsne
from lightning_interp.functional.projection_umap import project_umap

__all__ = ["Projection", "displacement", "project_pca", "project_tsne", "project_umap"]

# The plane of the map is sought among so many components, and shows at least this part of the variance that the plane
# of the first two shows.
_COMPONENTS = 10
_SHOWN = 0.85


def project_pca(embeddings: Points, *, previous: Points | None = None) -> Projection:
    """A flat view of the points: the plane in which they spread most, or one almost as good that looks like the last.

    Without `previous`, the first two principal components. With it, the plane is tilted: it lies in the span of the
    first ten components (fewer where that is needed to show at least 85 % of the variance that the best plane shows)
    and is the one in which the points, each component scaled to unit variance, agree best with their last places.
    Turning the best plane within itself would not be enough: components of similar variance swap and mix.

    Args:
        embeddings: (N, D), floating, tensor or array. Points with a NaN or an infinity get NaN coordinates.
        previous: (N, 2), coordinates of the same points in the last map; NaN for points that it lacks.

    Returns:
        The coordinates, and the shares of the variance along the two axes of the map.

    Raises:
        ArgumentError: If a shape or a type is wrong.

    Cost: min(N, D)^2 max(N, D), in float64 on the CPU.
    Source: Pearson 1901 (components); Schoenemann 1966 (alignment).

    Example:
        >>> import torch
        >>> line = torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]])
        >>> [round(share, 6) for share in project_pca(line).explained]
        [1.0, 0.0]
    """
    given = prepare(embeddings, previous)
    scores, _ = principal_scores(given.points, _COMPONENTS)
    plane_N2 = scores[:, :2] if given.previous is None else _plane_like(given.previous, scores)
    total = given.points.square().sum()
    explained = (plane_N2.square().sum(dim=0) / total).clamp(max=1.0)
    return Projection(given.spread_out(plane_N2), explained=(float(explained[0]), float(explained[1])))


def _plane_like(previous: Tensor, scores: Tensor) -> Tensor:
    """(N, 2), the scores in the plane that looks most like the last map."""
    known_N = previous.isfinite().all(dim=1)
    now_MK = scores[known_N] - scores[known_N].mean(dim=0)
    lengths_K = now_MK.norm(dim=0)
    alike_K2 = (now_MK / lengths_K.where(lengths_K > 0, 1.0)).T @ previous[known_N]
    needed = _SHOWN * scores[:, :2].square().sum()
    for count in range(scores.shape[1], 2, -1):
        plane_N2 = scores[:, :count] @ nearest_orthonormal(alike_K2[:count])
        if plane_N2.square().sum() >= needed:
            return plane_N2
    return aligned(scores[:, :2], previous)
