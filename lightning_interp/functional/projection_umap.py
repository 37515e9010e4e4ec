"""UMAP: a map of neighbourhoods, by umap-learn, which is an extra."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lightning_interp._options import check_at_least
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.projection_common import (
    Points,
    Projection,
    aligned,
    filled_in,
    prepare,
    principal_scores,
)

_FEWEST = 5
_COMPONENTS = 50
# Between two epochs of a run of digits the median point then moves by 0.16 to 0.22 of the spread; at the rate of a
# fresh map, 1, by 0.23 to 0.32.
_WARM_EPOCHS = 50
_WARM_RATE = 0.1


def project_umap(
    embeddings: Points,
    *,
    neighbors: int = 15,
    previous: Points | None = None,
    warm: bool = True,
    seed: int = 0,
) -> Projection:
    """A map of neighbourhoods by UMAP, after PCA to 50 dimensions.

    As in `project_tsne`, a map with `previous` starts from it, takes fewer and smaller steps and is turned to fit
    it. Points move more than with t-SNE all the same, about three times as far between two epochs of a run of digits.

    Args:
        embeddings: (N, D), floating, tensor or array. Points with a NaN or an infinity get NaN coordinates.
        neighbors: How many neighbours count, at least 2; at most N - 1 are taken.
        previous: (N, 2), coordinates of the same points in the last map, in any unit; NaN for points that it lacks.
        warm: Whether to start from `previous`.
        seed: Of UMAP's samples.

    Returns:
        The coordinates. With fewer than five points those of `project_pca`.

    Raises:
        ArgumentError: If umap-learn is not installed, or a shape, a type or an option is wrong.

    Cost: the first call in a process compiles for some ten seconds.
    Source: McInnes, Healy, Melville 2018.
    """
    check_at_least("neighbors", neighbors, 2)
    machine_of = _umap()
    given = prepare(embeddings, previous)
    scores, _ = principal_scores(given.points, _COMPONENTS)
    if len(scores) < _FEWEST or not bool(scores.any()):
        return Projection(given.spread_out(aligned(scores[:, :2], given.previous)))
    scores = scores / scores[:, 0].std()
    options: dict[str, Any] = {}
    start_N2 = scores[:, :2]
    if warm and given.previous is not None:
        start_N2 = filled_in(given.previous, scores)
        options = {"n_epochs": _WARM_EPOCHS, "learning_rate": _WARM_RATE}
    # UMAP brings a start to a size of its own, for which each axis must have an extent.
    noise_N2 = torch.randn(start_N2.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    start_N2 = start_N2 + 1e-4 * noise_N2
    machine = machine_of(
        n_neighbors=min(neighbors, len(scores) - 1),
        init=start_N2.float().numpy(),
        random_state=seed,
        n_jobs=1,
        **options,
    )
    with warnings.catch_warnings():
        # Of the versions of its own dependencies, and of graphs in several pieces, which a start of our own allows.
        warnings.simplefilter("ignore")
        found_N2 = torch.from_numpy(machine.fit_transform(scores.float().numpy())).double()
    return Projection(given.spread_out(aligned(found_N2, given.previous)))


def _umap() -> Any:
    """The class, imported when it is needed: that alone takes seconds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from umap import UMAP
    except ImportError as error:
        raise ArgumentError(
            f"UMAP needs umap-learn, which can't be imported ({error}): pip install 'lightning-interp[umap]'"
        ) from None
    return UMAP
