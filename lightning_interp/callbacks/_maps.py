"""The maps of an embedding: one, or several side by side, each beginning where it last ended."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from lightning_interp.functional.projection import Projection, displacement, project_pca, project_tsne, project_umap


class Map(NamedTuple):
    """One map.

    Attributes:
        title: For a person.
        projection: Coordinates and quality.
        displacement: How far the median point moved since the last one, in units of its spread; NaN for the first.
    """

    title: str
    projection: Projection
    displacement: float


class Maps:
    """Projects the same points again and again, each map aligned to the last one of its kind."""

    def __init__(self, method: str, perplexities: list[float]) -> None:
        """Begins without maps.

        Args:
            method: `"pca"`, `"tsne"` or `"umap"`.
            perplexities: Of t-SNE, one for each map.
        """
        self._method = method
        self._keys = {f"tsne_{each:g}": each for each in perplexities} if method == "tsne" else {method: 0.0}
        self._last: dict[str, Tensor] = {}
        self._drawn = 0

    def draw(self, rows: Tensor) -> dict[str, Map]:
        """Projects the points; other points than before begin anew.

        Args:
            rows: (N, D).

        Returns:
            Key, as in the tags, to the map.
        """
        if any(len(last) != len(rows) for last in self._last.values()):
            self._last, self._drawn = {}, 0
        found = {}
        for key, perplexity in self._keys.items():
            last = self._last.get(key)
            projection = self._project(rows, perplexity, last)
            moved = math.nan if last is None else displacement(projection.coordinates, last)
            found[key] = Map(_title(key, projection), projection, moved)
            self._last[key] = projection.coordinates
        self._drawn += 1
        return found

    def _project(self, rows: Tensor, perplexity: float, last: Tensor | None) -> Projection:
        if self._method == "pca":
            return project_pca(rows, previous=last)
        warm = self._drawn > 1  # the map of the untrained network is no good place to start from
        if self._method == "tsne":
            return project_tsne(rows, perplexity=perplexity, previous=last, warm=warm)
        return project_umap(rows, previous=last, warm=warm)

    def state_dict(self) -> dict[str, Any]:
        """The places of the points, safe in a checkpoint."""
        return {"last": dict(self._last), "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._last, self._drawn = dict(state["last"]), state["drawn"]


def _title(key: str, projection: Projection) -> str:
    if projection.explained is not None and all(math.isfinite(share) for share in projection.explained):
        return f"PCA, {sum(projection.explained):.0%} of the variance"
    return f"t-SNE, perplexity {key.removeprefix('tsne_')}" if key.startswith("tsne_") else key.upper()
