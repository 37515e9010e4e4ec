"""Wrong labels among real digits: are they found, does correcting them help, and is their number guessed right?

    python benchmarks/flipped_labels.py [--quick]

A small CNN is trained on the 1,797 digits that scikit-learn ships, some of whose labels are changed: *uniform* to any
other class, *confusion* to the class that it is taken for most easily (3 to 8, 1 to 7, ...; harder). Loss and margin of
every image are averaged in the training loop, as `Influence` does; neighbours are asked after each epoch.
Three tables: ranking (AUROC and precision at k, k = number of changed labels), repair (Koh and Liang 2017, figure 6:
the first 15 % of a list are looked at, and the changed labels among them corrected, then trained anew), and the
estimated share of wrong labels beside the true one, with the epoch in which the rule `suspect_labels` speaks.
About ten minutes on one core; `--quick` takes one seed and fewer recipes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import dataclass

import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_interp.functional.influence import HeadInfluence
from lightning_interp.functional.mislabeled import LabelVotes, label_votes, suspicion
from lightning_interp.functional.wrong_labels import wrong_label_share
from lightning_interp.rules import AlertBook, History, SuspectLabelsRule

CONFUSED = torch.tensor([6, 7, 3, 8, 9, 3, 0, 1, 3, 4])
CLASSES, WIDTH = 10, 64
MEAN_LOSS, SELF_INFLUENCE = "loss, mean over the training", "self-influence of the head"
COMBINED = "combined, mean votes"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and on what."""

    norm: bool = False
    rate: float = 1e-3
    momentum: bool = False
    noise: float = 0.0
    imbalanced: bool = False


RECIPES = {
    "plain, Adam 1e-3": Recipe(),
    "BatchNorm, Adam 1e-3": Recipe(norm=True),
    "SGD 0.05, momentum": Recipe(rate=0.05, momentum=True),
    "hard: noise of 1 std on the images": Recipe(noise=1.0),
    "hard, BatchNorm": Recipe(noise=1.0, norm=True),
    "very hard: noise of 2 std": Recipe(noise=2.0),
    "classes imbalanced 20 to 1": Recipe(imbalanced=True),
    "undertrained: Adam 3e-5": Recipe(rate=3e-5),
    "hard and undertrained": Recipe(rate=3e-5, noise=1.0),
    "rate too high: SGD 0.5": Recipe(rate=0.5, momentum=True),
}


def digits(recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), standardised, in random order, and true labels."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None], torch.tensor(data.target)
    images = (images - images.mean()) / images.std()
    images = images + recipe.noise * torch.randn(images.shape, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    if recipe.imbalanced:
        kept = torch.rand(len(labels), generator=generator) < torch.logspace(0, -1.3, CLASSES)[labels[order]]
        order = order[kept]
    return images[order], labels[order]


def changed(labels: Tensor, kind: str, share: float, seed: int) -> Tensor:
    """The labels, a share of them wrong."""
    generator = torch.Generator().manual_seed(1000 + seed)
    which = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    given = labels.clone()
    if kind == "uniform":
        given[which] = (labels[which] + torch.randint(1, CLASSES, which.shape, generator=generator)) % CLASSES
    elif kind == "confusion":
        given[which] = CONFUSED[labels[which]]
    else:
        given = labels[torch.randperm(len(labels), generator=generator)]
    return given


def network(*, norm: bool) -> nn.Sequential:
    """Two convolutions, one hidden layer; the embedding is what goes into the last layer."""

    def block(channels: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]

    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
    return nn.Sequential(*block(1, 16), *block(16, 32), *head)


class Run:
    """A training that keeps what the package would collect."""

    def __init__(self, recipe: Recipe, images: Tensor, given: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.images, self.given = images, given
        self.model = network(norm=recipe.norm)
        weights = self.model.parameters()
        self.optimizer = (
            torch.optim.SGD(weights, recipe.rate, momentum=0.9)
            if recipe.momentum
            else torch.optim.Adam(weights, recipe.rate)
        )
        self.losses, self.margins = torch.zeros(2, len(given), dtype=torch.float64)
        self.history, self.epochs, self.step = History(), 0, 0
        self.history.note("num_classes", CLASSES)
        self.history.note("train_samples", len(given))

    def epoch(self) -> None:
        """One pass."""
        self.model.train()
        for batch in torch.split(torch.randperm(len(self.given)), WIDTH):
            labels = self.given[batch]
            scores = self.model(self.images[batch])
            loss = F.cross_entropy(scores, labels)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            scores = scores.detach().double()
            own = scores.gather(1, labels[:, None])[:, 0]
            self.losses[batch] += F.cross_entropy(scores, labels, reduction="none")
            self.margins[batch] += own - scores.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
            self.history.record("loss", loss.item(), step=self.step)
            self.step += 1
        self.epochs += 1
        self.history.epoch = self.epochs - 1

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """(N, 64)."""
        self.model.eval()
        features: Tensor = self.model[:-1](self.images)
        return features

    @torch.no_grad()
    def final_losses(self) -> Tensor:
        """(N,), of the network as it is now."""
        self.model.eval()
        return F.cross_entropy(self.model(self.images), self.given, reduction="none")

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """In [0, 1]."""
        self.model.eval()
        return float((self.model(images).argmax(dim=1) == labels).double().mean())


class Scored(Run):
    """A training whose neighbours are asked after each epoch."""

    votes: LabelVotes
    vote_margins: Tensor

    def epoch(self) -> None:
        """One pass."""
        super().epoch()
        self.votes = label_votes(self.embeddings(), self.given)
        before = self.vote_margins if self.epochs > 1 else torch.zeros(len(self.given))
        self.vote_margins = before + self.votes.margin

    def scores(self) -> dict[str, Tensor]:
        """By name, each (N,)."""
        head = HeadInfluence(self.embeddings(), self.given, weight_decay=0.1, num_classes=CLASSES)
        mean, votes = self.losses / self.epochs, self.vote_margins / self.epochs
        return {
            "loss, final network": self.final_losses(),
            MEAN_LOSS: mean,
            "margin, mean over the training": -self.margins / self.epochs,
            SELF_INFLUENCE: head.self_influence(),
            "leave-one-out loss of the head": head.leave_one_out_losses(),
            "disagreeing neighbours, now": self.votes.disagreement,
            "vote margin, mean over the training": votes,
            "combined, votes of now": suspicion(mean, self.votes.margin),
            COMBINED: suspicion(mean, votes),
        }


def quality(scores: Tensor, wrong: Tensor) -> tuple[float, float]:
    """AUROC, and precision at k with k = number of wrong labels."""
    top = scores.argsort(descending=True, stable=True)[: int(wrong.sum())]
    return float(roc_auc_score(wrong.numpy(), scores.numpy())), float(wrong[top].double().mean())


def ranking(seeds: int) -> None:
    """First table."""
    at = (3, 15, 40)
    for kind in ("uniform", "confusion"):
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for seed in range(seeds):
            images, labels = digits(Recipe(), seed)
            run = Scored(Recipe(), images, changed(labels, kind, 0.1, seed), seed)
            for epoch in range(1, at[-1] + 1):
                run.epoch()
                for name, score in run.scores().items() if epoch in at else ():
                    found.setdefault((name, epoch), []).append(quality(score, run.given != labels))
        rows = []
        for name in dict.fromkeys(name for name, _ in found):
            means = [[statistics.mean(column) for column in zip(*found[name, e], strict=True)] for e in at]
            rows.append([name, *(f"{auroc:.4f} / {precision:.3f}" for auroc, precision in means)])
        print(f"\n### 10 % of 1,797 labels changed ({kind}), mean of {seeds} seeds: AUROC / precision at k\n")
        table(["score", *(f"{epoch} epochs" for epoch in at)], rows)


def repair(seeds: int, epochs: int = 40) -> None:
    """Second table."""
    rows = []
    for share in (0.1, 0.2):
        results: dict[str, list[float]] = {}
        for seed in range(seeds):
            for name, accuracy in repaired(share, seed, epochs).items():
                results.setdefault(name, []).append(accuracy)
        means = {name: statistics.mean(values) for name, values in results.items()}
        lost = means["clean"] - means["as given"]
        for name, mean in means.items():
            restored = (mean - means["as given"]) / lost if name not in ("clean", "as given") else None
            rows.append([f"{share:.0%}", name, f"{mean:.4f}", "" if restored is None else f"{restored:.0%}"])
    print(f"\n### First 15 % of 1,000 images looked at, trained anew for {epochs} epochs, mean of {seeds} seeds\n")
    table(["changed, uniform", "order", "accuracy on 797 others", "of the loss restored"], rows)


def repaired(share: float, seed: int, epochs: int) -> dict[str, float]:
    """Accuracy with each order."""
    images, labels = digits(Recipe(), seed)
    train, test = slice(0, 1000), slice(1000, None)
    given = changed(labels[train], "uniform", share, seed)

    def trained(run: Run) -> Run:
        for _ in range(epochs):
            run.epoch()
        return run

    first = Scored(Recipe(), images[train], given, seed)
    found = {"clean": trained(Run(Recipe(), images[train], labels[train], seed)), "as given": trained(first)}
    scores = first.scores()
    orders = {name: scores[name] for name in (COMBINED, MEAN_LOSS, SELF_INFLUENCE, "loss, final network")}
    orders["random"] = torch.rand(len(given), generator=torch.Generator().manual_seed(seed))
    for name, order in orders.items():
        seen = order.argsort(descending=True, stable=True)[: len(given) * 15 // 100]
        some = given.clone()
        some[seen] = labels[train][seen]
        found[name] = trained(Run(Recipe(), images[train], some, seed))
    return {name: run.accuracy(images[test], labels[test]) for name, run in found.items()}


def calibration(seeds: int, recipes: dict[str, Recipe], epochs: int = 20) -> None:
    """Third table, row by row."""
    at = (3, 5, 10, 20)
    print("\n### Estimated share of wrong labels (recognition by the neighbours), and when the rule spoke (epoch)\n")
    table(["recipe", "labels", "truly wrong", *(f"{epoch} epochs" for epoch in at), "rule"], [])
    cases = [("uniform", share) for share in (0.0, 0.05, 0.1, 0.2, 0.4)] + [("confusion", 0.1), ("shuffled", 1.0)]
    for name, recipe in recipes.items():
        for kind, share in cases:
            for seed in range(seeds):
                found = calibrated(recipe, kind, share, seed, epochs)
                estimates = [found.shares[epoch - 1] for epoch in at]
                row([name, kind, f"{found.true:.1%}", *estimates, found.spoke])


@dataclass
class Calibrated:
    """One training."""

    true: float
    shares: list[str]
    spoke: str


def calibrated(recipe: Recipe, kind: str, share: float, seed: int, epochs: int) -> Calibrated:
    """One training, looked at after each epoch as `Alerts` does."""
    images, labels = digits(recipe, seed)
    given = changed(labels, kind, share, seed)
    run, book = Run(recipe, images, given, seed), AlertBook([SuspectLabelsRule()])
    shares, spoke = [], []
    for epoch in range(1, epochs + 1):
        run.epoch()
        estimate = wrong_label_share(label_votes(run.embeddings(), given))
        run.history.record("suspect_label_share", estimate.share, step=run.step - 1)
        run.history.record("label_recognition", estimate.recognition, step=run.step - 1)
        run.history.note("label_anchors", estimate.anchors)
        run.history.finished = epoch == epochs
        shares.append(f"{estimate.share:.1%} ({estimate.recognition:.2f})")
        spoke += [f"{a.status} {a.severity} {a.value:.1%} ({epoch})" for a in book.update(run.history)]
    return Calibrated(float((given != labels).double().mean()), shares, "; ".join(spoke) or "silent")


def table(header: list[str], rows: list[list[str]]) -> None:
    """As Markdown."""
    row(header)
    print("|" + "---|" * len(header))
    for cells in rows:
        row(cells)


def row(cells: list[str]) -> None:
    """One line of a table, at once."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """All three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, four recipes")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, scikit-learn {sklearn.__version__}, 1 thread"
    )
    ranking(1 if quick else 3)
    repair(1 if quick else 3)
    calibration(1, dict(list(RECIPES.items())[:4]) if quick else RECIPES)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
