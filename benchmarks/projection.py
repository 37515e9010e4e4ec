"""How still points stand on the maps of ten epochs of a real run, what that costs in purity, and how long a map takes.

    python benchmarks/projection.py [--points 500 1000 1797] [--optimizer adam|sgd] [--umap]

A small CNN learns scikit-learn's digits (1,797 real 8x8 images) for ten epochs; the features of its last layer but one
are projected before the first step and after each epoch. Displacement: median over the points, divided by the spread
of the map; the first pair, from the untrained network to epoch 0, is left out. Purity: share of the ten nearest points
on the map that are of the same class; the gap is that to a map made afresh, in percent points, the worst of the epochs.
Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_interp.functional.projection import Projection, displacement, project_pca, project_tsne, project_umap

Project = Callable[[Tensor, Tensor | None, int], Projection]
EPOCHS = 10


def events(optimizer: str) -> tuple[list[Tensor], Tensor]:
    """Features of all digits before the first step and after each epoch, each (1797, 128), and the labels."""
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 128), nn.ReLU(),
    )  # fmt: skip
    head = nn.Linear(128, 10)
    weights = [*body.parameters(), *head.parameters()]
    descent = torch.optim.Adam(weights, 1e-3) if optimizer == "adam" else torch.optim.SGD(weights, 0.05, momentum=0.9)
    found = [body(images).detach()]
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            descent.zero_grad()
            nn.functional.cross_entropy(head(body(images[batch])), labels[batch]).backward()
            descent.step()
        found.append(body(images).detach())
    return found, labels


def purity(coordinates: Tensor, labels: Tensor) -> float:
    """Mean share of the ten nearest points that are of the same class."""
    distances = torch.cdist(coordinates, coordinates).fill_diagonal_(torch.inf)
    nearest = distances.topk(10, largest=False).indices
    return float((labels[nearest] == labels[:, None]).double().mean())


def ways(with_umap: bool) -> dict[str, list[tuple[str, Project]]]:
    """Method to the ways in which its maps are made, the first of them afresh. The last argument is the event."""
    found: dict[str, list[tuple[str, Project]]] = {
        "PCA": [
            ("first two components", lambda x, _, __: project_pca(x)),
            ("like the last", lambda x, last, _: project_pca(x, previous=last)),
        ],
        "t-SNE": [
            ("fresh, turned", lambda x, last, _: project_tsne(x, previous=last, warm=False)),
            ("warm from event 1", lambda x, last, _: project_tsne(x, previous=last)),
            ("warm from event 2", lambda x, last, event: project_tsne(x, previous=last, warm=event > 1)),
        ],
    }
    if with_umap:
        found["UMAP"] = [
            ("fresh, turned", lambda x, last, _: project_umap(x, previous=last, warm=False)),
            ("warm from event 2", lambda x, last, event: project_umap(x, previous=last, warm=event > 1)),
        ]
    return found


def rows(method: str, makers: list[tuple[str, Project]], features: list[Tensor], labels: Tensor) -> Iterator[str]:
    """The lines of the table for one method."""
    fresh: list[Projection] = []
    for name, make in makers:
        maps: list[Projection] = []
        seconds, moved = [], []
        for event, x in enumerate(features):
            last = maps[-1].coordinates if maps else None
            started = time.perf_counter()
            maps.append(make(x, last, event))
            seconds.append(time.perf_counter() - started)
            if last is not None:
                moved.append(displacement(maps[-1].coordinates, last))
        fresh = fresh or maps
        pure = [purity(found.coordinates, labels) for found in maps]
        gaps = [100 * (found - purity(other.coordinates, labels)) for found, other in zip(pure, fresh, strict=True)]
        shares = [
            sum(m.explained) / sum(f.explained) for m, f in zip(maps, fresh, strict=True) if m.explained and f.explained
        ]
        shown = f"{min(shares):.2f}" if shares else ""
        pairs = " ".join(f"{value:.3f}" for value in moved)
        yield (
            f"| {len(labels)} | {method}, {name} | {max(moved[1:]):.3f} | {min(gaps[1:]):+.1f} | {shown} | "
            f"{seconds[0]:.2f} | {statistics.median(seconds[2:]):.2f} | {pairs} |"
        )


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[500, 1000, 1797])
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--umap", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    features, labels = events(options.optimizer)
    print("| points | map | displacement | purity gap | variance shown | first, s | later, s | of each pair |")
    print("|---|---|---|---|---|---|---|---|")
    for count in options.points:
        for method, makers in ways(options.umap).items():
            for line in rows(method, makers, [x[:count] for x in features], labels[:count]):
                print(line, flush=True)


if __name__ == "__main__":
    main()
