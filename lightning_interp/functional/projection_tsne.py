"""t-SNE: a map in which near points are neighbours in the embedding. What lies far apart on it says little."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_interp._options import check_number
from lightning_interp.functional.projection_common import (
    Points,
    Prepared,
    Projection,
    aligned,
    filled_in,
    prepare,
    principal_scores,
)

# Below that many points there are no neighbourhoods to keep.
FEWEST = 5
_COMPONENTS = 50
_FRESH_ITERATIONS = 1000
# More than 250, the length of scikit-learn's first phase: it gives no divergence if it stops there.
_WARM_ITERATIONS = 300


def project_tsne(
    embeddings: Points,
    *,
    perplexity: float = 30.0,
    previous: Points | None = None,
    warm: bool = True,
    seed: int = 0,
) -> Projection:
    """A map of neighbourhoods by t-SNE, after PCA to 50 dimensions.

    Without `previous` the map is made from the two first principal components with early exaggeration. With it, it is
    made from the last coordinates, without exaggeration and in fewer steps, so that points move only as far as the
    embedding has changed; with either of these alone they would jump. The result is turned and mirrored to fit the last
    map. Where the embedding has become another one (between an untrained network and its first epoch), the last map is
    a poor start: `warm=False` makes a fresh one and only turns it.

    The distances between far groups and the sizes of groups mean little, and what looks like a group can depend on
    `perplexity` alone: compare several.

    Args:
        embeddings: (N, D), floating, tensor or array. Points with a NaN or an infinity get NaN coordinates.
        perplexity: About how many neighbours count, at least 1; at most (N - 1) / 3 are taken.
        previous: (N, 2), coordinates of the same points in the last map, in any unit; NaN for points that it lacks,
            which start between their nearest points.
        warm: Whether to start from `previous`.
        seed: Of the noise, a ten-thousandth of the start, that keeps points from standing in a line.

    Returns:
        The coordinates and the Kullback-Leibler divergence in nats. With fewer than five points those of `project_pca`,
        and no divergence.

    Raises:
        ArgumentError: If a shape, a type or an option is wrong.

    Cost: N log N a step, 1,000 steps or 300; on the CPU, with the threads that OpenMP has. The same input gives the
    same coordinates, bit for bit on one machine.
    Source: van der Maaten and Hinton 2008; van der Maaten 2014 (Barnes-Hut).

    Example:
        >>> points = torch.arange(24.0).view(12, 2).sin()
        >>> project_tsne(points, perplexity=3).coordinates.shape
        torch.Size([12, 2])
    """
    check_number("perplexity", perplexity, low=1.0, high=math.inf)
    given = prepare(embeddings, previous)
    scores, _ = principal_scores(given.points, _COMPONENTS)
    if len(scores) < FEWEST or not bool(scores.any()):
        return Projection(given.spread_out(aligned(scores[:, :2], given.previous)))
    perplexity = min(perplexity, (len(scores) - 1) / 3)
    found_N2, divergence = _descend(scores, _start(given, scores, warm, seed), perplexity, seed)
    return Projection(given.spread_out(aligned(found_N2, given.previous)), kl_divergence=divergence)


def _start(given: Prepared, scores: Tensor, warm: bool, seed: int) -> tuple[Tensor, bool]:
    """(N, 2) in the unit of t-SNE, and whether it comes from the last map."""
    noise_N2 = torch.randn(len(scores), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if warm and given.previous is not None:
        # The maps of t-SNE grow with N: measured on digits at perplexity 30, their spread is 0.9 to 1.1 times the root
        # of N. A start of 0.6 times that size made points move 1.2 to 2 times as far.
        start_N2 = filled_in(given.previous, scores) * math.sqrt(len(scores))
        return start_N2 + 1e-4 * noise_N2, True
    start_N2 = scores[:, :2] / scores[:, 0].std()
    return 1e-4 * (start_N2 + 1e-4 * noise_N2), False


def _descend(scores: Tensor, start: tuple[Tensor, bool], perplexity: float, seed: int) -> tuple[Tensor, float]:
    """Runs t-SNE; (N, 2) and the divergence."""
    from sklearn.manifold import TSNE

    start_N2, warm = start
    options: dict[str, Any] = {}
    if warm:
        # scikit-learn's rate for a fresh map; without exaggeration it would take one twelve times as large. The worst
        # pair of a run of digits at a high learning rate moved by 0.083 of the spread instead of 0.102 of it.
        options = {"early_exaggeration": 1.0, "learning_rate": max(len(scores) / 48, 50.0)}
    machine = TSNE(
        perplexity=perplexity,
        init=start_N2.float().numpy(),
        max_iter=_WARM_ITERATIONS if warm else _FRESH_ITERATIONS,
        random_state=seed,
        n_jobs=1,
        **options,
    )
    # Of a known size, so that squares stay within float32, in which scikit-learn computes.
    points = (scores / scores[:, 0].std()).float().numpy()
    return torch.from_numpy(machine.fit_transform(points)).double(), float(machine.kl_divergence_)
