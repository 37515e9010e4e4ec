"""Section `tools`: what takes images or embeddings, beside the other tools that make the same of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead import goals, table
from benchmarks.overhead.timing import take_turns, timed
from benchmarks.overhead.watch import UnavailableError, load, require
from lightning_interp.functional.projection import project_pca, project_tsne, project_umap

HEAD = ("what", "beside", "ours", "theirs", "theirs / ours", "goal")
_POINTS, _DIMENSIONS = 2000, 512  # of the embedding that is written
_MAPPED, _FEATURES = 1000, 64  # of those that are projected
_LARGEST_DIFFERENCE = 1e-4  # of two maps that should be equal, over the largest value


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same thing.

    Attributes:
        what: What is done, and on what.
        beside: The other tool.
        ours: Does it and returns how long it took, in seconds.
        theirs: Does it with the other tool.
        check: Raises `NothingMeasuredError` if either has no output; called after the measurement.
        goal: How many times as fast ours is to be, or how many seconds it may take.
    """

    what: str
    beside: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    check: Callable[[], None]
    goal: goals.Goal | None = None

    def line(self, rounds: int) -> list[str]:
        """Measures: a line of the table."""
        self.theirs(), self.ours()
        pairs = take_turns(self.ours, self.theirs, most=rounds)
        self.check()
        verdict = ""
        if self.goal is not None:
            verdict = self.goal.verdict(pairs.ratio if self.goal.least else pairs.median_plain)
        return [self.what, self.beside, table.duration(pairs.median_plain), table.duration(pairs.median_other),
                table.ratio(pairs), verdict]  # fmt: skip


class _Kept:
    """The last result of a call, and its processor time."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.result: Any = None
        self.run = timed(self._keep, time.process_time)

    def _keep(self) -> None:
        self.result = self._call()


@contextmanager
def attributions() -> Iterator[list[Comparison]]:
    """Occlusion of the same windows, and saliency, on the networks of `benchmarks/attribution.py`."""
    load("captum.attr")
    from benchmarks import attribution

    found = []
    for name, (make, count, side, layer) in attribution.MODELS.items():
        torch.manual_seed(0)
        model: nn.Module = make().eval()
        images, targets = torch.randn(count, 3, side, side), torch.arange(count) % 10
        made = attribution.cases(model, images, targets, layer)
        for what, goal in (
            ("gradient", None),
            ("occlusion, one window a forward", goals.OCCLUSION),
            ("occlusion, 64 images a forward", goals.OCCLUSION),
        ):
            ours, theirs = (_Kept(call) for call in made[what])
            check = _same_maps(what, ours, theirs)
            beside = "captum Saliency" if what == "gradient" else f"captum Occlusion, {what.partition(', ')[2]}"
            found.append(Comparison(f"{what.partition(',')[0]}, {name}", beside, ours.run, theirs.run, check, goal))
    yield found


def _same_maps(what: str, ours: _Kept, theirs: _Kept) -> Callable[[], None]:
    def check() -> None:
        found, expected = ours.result, theirs.result
        require(isinstance(found, Tensor) and isinstance(expected, Tensor) and bool(expected.abs().max() > 0), what)
        difference = float((found - expected).abs().max() / expected.abs().max())
        require(difference < _LARGEST_DIFFERENCE, f"{what}: maps differ by {difference:.1e}, so one of them")

    return check


@contextmanager
def embeddings() -> Iterator[list[Comparison]]:
    """Points for TensorBoard's projector. Wall times, since the training waits for the disk."""
    from benchmarks.projector import Logs, megabytes, normal_points

    points = normal_points(_POINTS, _DIMENSIONS)
    steps = {"ours": 0, "torch": 0}
    with tempfile.TemporaryDirectory() as scratch:
        logs = Logs(Path(scratch), points)

        def writing(which: str, write: Callable[[int], float]) -> Callable[[], float]:
            def run() -> float:
                steps[which] += 1
                return write(steps[which])

            return run

        def check() -> None:
            for which, folder in (("ours", logs.mine), ("torch", logs.theirs)):
                require(megabytes(folder) >= steps[which] * points.nbytes / 1e6, f"the projector's files of {which}:")

        what = f"writing {_POINTS} x {_DIMENSIONS} embeddings (wall time)"
        ours, theirs = writing("ours", logs.ours), writing("torch", logs.torchs)
        yield [Comparison(what, "SummaryWriter.add_embedding", ours, theirs, check, goals.EMBEDDINGS)]
        logs.close()


def _blobs() -> Tensor:
    """(N, D) points in ten heaps."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(10, _FEATURES, generator=generator)
    return centres[torch.arange(_MAPPED) % 10] + torch.randn(_MAPPED, _FEATURES, generator=generator)


def _projected(name: str, beside: str, ours: Callable[[Tensor], Any], theirs: Callable[[Any], Any]) -> list[Comparison]:
    points = _blobs()
    array = points.numpy()
    mine, other = _Kept(lambda: ours(points).coordinates), _Kept(lambda: torch.as_tensor(theirs(array)))

    def check() -> None:
        for kept in (mine, other):
            shape = tuple(getattr(kept.result, "shape", ()))
            require(shape == (_MAPPED, 2) and bool(kept.result.isfinite().all()), f"{name}: a map")
            require(float(kept.result.std()) > 0, f"{name}: a map")

    return [Comparison(f"{name} of {_MAPPED} x {_FEATURES}, afresh", beside, mine.run, other.run, check)]


@contextmanager
def projections() -> Iterator[list[Comparison]]:
    """Maps beside scikit-learn's. What ours does besides: it takes the PCA first, and counts missing points."""
    decomposition, manifold = load("sklearn.decomposition"), load("sklearn.manifold")
    pca = _projected("PCA", "sklearn PCA", project_pca, lambda x: decomposition.PCA(2).fit_transform(x))
    machine = {"perplexity": 30.0, "random_state": 0, "n_jobs": 1}
    tsne = _projected("t-SNE", "sklearn TSNE", project_tsne, lambda x: manifold.TSNE(**machine).fit_transform(x))
    yield [*pca, *tsne]


@contextmanager
def umap() -> Iterator[list[Comparison]]:
    """A map beside umap-learn's."""
    package = load("umap")
    machine = {"random_state": 0, "n_jobs": 1}
    yield _projected("UMAP", "umap-learn", project_umap, lambda x: package.UMAP(**machine).fit_transform(x))


SECTIONS = {
    "attributions": (attributions, "captum"),
    "embeddings": (embeddings, "torch.utils.tensorboard"),
    "PCA, t-SNE": (projections, "scikit-learn"),
    "UMAP": (umap, "umap-learn"),
}


def rows(rounds: int) -> Iterator[tuple[list[str], str]]:
    """The lines of the table, each with what went wrong: "missing", "failed" or nothing."""
    for name, (section, package) in SECTIONS.items():
        try:
            with section() as comparisons:
                for comparison in comparisons:
                    yield comparison.line(rounds), ""
        except UnavailableError as error:
            yield [name, package, str(error), "", "", ""], "missing"
        except Exception as error:  # one tool that breaks must not cost the figures of the others
            yield [name, package, f"failed: {type(error).__name__}: {error}", "", "", ""], "failed"
