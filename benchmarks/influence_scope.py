"""Is influence through the whole network worth its cost, beside influence through the softmax head alone?

    python benchmarks/influence_scope.py [--quick] [--seeds 4]

Two small networks are trained on 400 of scikit-learn's digits, and hundreds of times again without some of the
images: without one, without ten, without half of them. Same initialisation, same order; a left-out image has weight 0
in the mean of its batch. All retrainings of a seed run at once (`torch.func.vmap`), which is checked against a plain
loop. Each score of the first, full training predicts the change of the loss of 200 test images; the effect of a group
is the sum over its images (for half of them: the linear datamodeling score of Park et al. 2023). The tables hold
Spearman correlations, per test image, then averaged. *own*: with the retrained losses of the very run that the score
was computed from. *others*: with their mean over the other seeds. Where a score has a damping, the best of a grid
stands there. A last table ranks flipped labels.

Result: nothing that looks at all weights pays, so `Influence` should keep to the head. Measured on one core with four
seeds and torch 2.15 (12 minutes beside other work). Spearman for one / ten / half of the images, standard errors 0.02
or less. Time as a multiple of an epoch (0.013 s) of the first network; the head's grows with the size of the embedding,
not with that of the network, but for one forward:

| score | 6,090 weights, own | others | 5,130 weights, own | others | epochs of time | MB |
| --- | --- | --- | --- | --- | ---: | ---: |
| two halves of the seeds | | .22 / .52 / .81 | | .02 / .15 / .59 | | |
| really left out, one other seed | | .21 / .49 / .77 | | .02 / .14 / .55 | | |
| training loss, signed by label | .11 / .16 / .21 | .14 / .17 / .21 | .06 / .08 / .16 | .06 / .09 / .17 | 0 | 0 |
| embedding cosine, signed by label | .08 / .22 / .33 | .10 / .26 / .36 | .04 / .16 / .36 | .04 / .19 / .40 | 0.2 | 2 |
| **head** | .22 / .53 / .73 | .26 / .57 / .74 | .07 / .26 / .57 | .07 / .26 / .58 | 8 | 26 |
| gradient product | .06 / .21 / .35 | .06 / .23 / .36 | .03 / .13 / .27 | .05 / .12 / .26 | 2 | 24 |
| TracIn, 20 checkpoints | .08 / .25 / .40 | .08 / .29 / .43 | .05 / .17 / .41 | .05 / .20 / .44 | 38 | 24 |
| TRAK, 4 checkpoints | .17 / .39 / .57 | .20 / .44 / .59 | .05 / .19 / .46 | .05 / .20 / .47 | 27 | 34 |
| Gauss-Newton, projected | .23 / .53 / .65 | .21 / .49 / .62 | .09 / .26 / .46 | .06 / .19 / .42 | 21 | 90 |
| Gauss-Newton, not projected | .25 / .54 / .65 | .23 / .50 / .62 | .10 / .28 / .49 | .06 / .20 / .45 | 534 | 661 |

- The best of them gains .03 over the head where one image of the very same run is left out, .02 for ten; it loses .08
  for half of them, and .01 to .13 against other seeds. The bar was a gain of .1.
- Leaving out one image moves such a network little beyond noise: between seeds the *real* changes agree to .21 and
  .02. No score foretells them well (.26 and .10 at best), the head's neither. It ranks groups: .53 and .26 for ten.
- Flipped labels, AUROC after 20 / 60 epochs, random flips: .998 / .999 for the loss averaged over epochs, .998 / .999
  for the head, .992 / .998 for TracIn, .997 / .993 for Gauss-Newton. Look-alikes, in the same order: .988 / .995,
  .988 / .992, .975 / .990, .983 / .981. The averaged loss is free, and no score of all weights beats it.
- ResNet-18: one set of projected gradients costs 18 to 30 training steps on the same images, and 2.3 GB for 16 of them.
- Not covered: deeper networks, several networks trained anew for one score (as TRAK wants), replay of the training.

Sources: Koh, Liang 2017, eq. 2 (head); Pruthi et al. 2020 (TracIn); Park et al. 2023 (TRAK); Martens 2020
(Gauss-Newton matrix); Weinberger et al. 2009 (projection by hashing).
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_interp.functional.influence import head_influence

Parameters = dict[str, Tensor]
Projection = Callable[[Tensor], Tensor]
BATCH, RATE, MOMENTUM, DECAY, CLASSES, EPOCHS, WIDTH = 40, 0.1, 0.9, 5e-4, 10, 20, 32
SKETCH = 1024
HEAD_DAMPINGS = (0.003, 0.01, 0.03, 0.1)  # lambda itself
SKETCH_DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the mean of the diagonal
EXACT_DAMPINGS = (1.0, 3.0, 10.0)


def flat_net() -> nn.Sequential:
    """6,090 parameters, 1,290 of them in the head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def pooled_net() -> nn.Sequential:
    """5,130 parameters, 330 of them in the head: here the head knows less of the whole."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "embedding of 128, head 21 % of the weights": flat_net,
    "embedding of 32, head 6 % of the weights": pooled_net,
}


@dataclass(frozen=True)
class Task:
    """n training images (n, 1, 8, 8) with labels (n,), and test images."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Run:
    """The full training of one seed, and the (K, m) test losses of all K trainings.

    `checkpoints`: weights and rate after each epoch; `losses`: (epochs, n), of the training images.
    """

    model: nn.Sequential
    checkpoints: list[tuple[Parameters, float]]
    losses: Tensor
    test_losses: Tensor


def digits(num_train: int, num_test: int) -> Task:
    """The first of the shuffled digits, in [0, 1]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[: num_train + num_test]
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target[order])
    return Task(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:])


def per_sample_loss(model: nn.Module, parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    """(n,)."""
    return F.cross_entropy(functional_call(model, parameters, (images,)), labels, reduction="none")


def train(make: Callable[[], nn.Sequential], task: Task, kept: Tensor, seed: int, epochs: int) -> Run:
    """Trains a network per row of `kept` (K, n), all at once; SGD with momentum, a rate that falls to 0 linearly."""
    torch.manual_seed(seed)
    model = make()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    orders = [torch.randperm(len(task.images)) for _ in range(epochs)]
    total = epochs * math.ceil(len(task.images) / BATCH)
    checkpoints, losses = [], []
    test_losses: list[Tensor] = []

    def loss(parameters: Parameters, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return (per_sample_loss(model, parameters, images, labels) * weights).sum() / weights.sum()

    gradient = vmap(grad(loss), (0, 0, None, None))
    for rows in kept.split(WIDTH):
        now = {name: value.expand(len(rows), *value.shape).clone() for name, value in start.items()}
        velocity = {name: torch.zeros_like(value) for name, value in now.items()}
        step = 0
        for order in orders:
            for batch in order.split(BATCH):
                rate, step = RATE * (1 - step / total), step + 1
                found = gradient(now, rows[:, batch], task.images[batch], task.labels[batch])
                for name, value in now.items():
                    velocity[name].mul_(MOMENTUM).add_(found[name]).add_(value, alpha=DECAY)
                    value.sub_(velocity[name], alpha=rate)
            if not test_losses:  # the first of all is the full training
                first = {name: value[0].clone() for name, value in now.items()}
                checkpoints.append((first, rate))
                losses.append(per_sample_loss(model, first, task.images, task.labels).detach())
        with torch.no_grad():
            test_losses.append(vmap(lambda p: per_sample_loss(model, p, task.test_images, task.test_labels))(now))
    return Run(model, checkpoints, torch.stack(losses), torch.cat(test_losses).double())


def check_against_a_loop(make: Callable[[], nn.Sequential], task: Task, kept: Tensor, run: Run, row: int) -> float:
    """Largest difference of the test losses of seed 0 from those of torch's own SGD on the images that are kept."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    epochs = len(run.checkpoints)
    orders = [torch.randperm(len(task.images)) for _ in range(epochs)]
    batches = [batch[kept[row, batch] > 0] for order in orders for batch in order.split(BATCH)]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(model(task.images[batch]), task.labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        found = F.cross_entropy(model(task.test_images), task.test_labels, reduction="none")
    return float((found - run.test_losses[row]).abs().max())


# --- the scores: each gives (m, n), positive where leaving the training image out should raise the test loss ---


def embedding(run: Run, images: Tensor) -> Tensor:
    """(n, d), what the last layer of the trained network reads, in float64."""
    body = {k: v for k, v in run.checkpoints[-1][0].items() if not k.startswith(f"{len(run.model) - 1}.")}
    with torch.no_grad():
        found: Tensor = functional_call(run.model[:-1], body, (images,))
    return found.double()


def head(run: Run, task: Task, damping: float) -> Tensor:
    """Koh & Liang on the softmax head, refitted to its optimum on the frozen embedding."""
    return head_influence(
        embedding(run, task.images), task.labels, embedding(run, task.test_images), task.test_labels,
        weight_decay=damping,
    )  # fmt: skip


def sketch(width: int) -> Projection:
    """(..., P) -> (..., width): each weight is added, with a random sign, to a random one of the columns."""

    def project(gradients: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        columns = torch.randint(width, (gradients.shape[-1],), generator=generator)
        signs = torch.randint(2, columns.shape, generator=generator).to(gradients) * 2 - 1
        return gradients.new_zeros(*gradients.shape[:-1], width).index_add_(-1, columns, gradients * signs)

    return project


def margin_gradients(
    model: nn.Module, parameters: Parameters, images: Tensor, labels: Tensor, project: Projection
) -> tuple[Tensor, Tensor]:
    """(n, P) gradients of log p/(1 - p) of the label, projected, and (n, 1) factors 1 - p that make them -d loss."""

    def margin(p: Parameters, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        scores = functional_call(model, p, (image[None],))[0]
        value = (scores * label).sum() - torch.logsumexp(scores - 1e9 * label, 0)
        return value, value

    found, factors = [], []
    for x, y in zip(images.split(100), F.one_hot(labels, CLASSES).float().split(100), strict=True):
        gradients, values = vmap(grad(margin, has_aux=True), (None, 0, 0))(parameters, x, y)
        found.append(project(torch.cat([g.flatten(1) for g in gradients.values()], 1)))
        factors.append(torch.sigmoid(-values)[:, None])
    return torch.cat(found), torch.cat(factors)


def logit_gradients(
    model: nn.Module, parameters: Parameters, images: Tensor, labels: Tensor, project: Projection
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, C, P) gradients of all scores, projected; (n, P) those of the loss; (n, C) probabilities."""

    def scores(p: Parameters, image: Tensor) -> tuple[Tensor, Tensor]:
        found = functional_call(model, p, (image[None],))[0]
        return found, found

    parts, logits = [], []
    for x in images.split(100):
        jacobian, values = vmap(jacrev(scores, has_aux=True), (None, 0))(parameters, x)
        parts.append(project(torch.cat([j.flatten(2) for j in jacobian.values()], 2)))
        logits.append(values)
    jacobians, p = torch.cat(parts), torch.softmax(torch.cat(logits), 1)
    return jacobians, torch.einsum("nc,ncp->np", p - F.one_hot(labels, CLASSES), jacobians), p


def damped_solve(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """(matrix + damping * mean diagonal)^-1 right."""
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))


def signed(values: Tensor, task: Task) -> Tensor:
    """What costs nothing: the value where the labels of both images agree, minus the value where they don't."""
    return values * torch.where(task.test_labels[:, None] == task.labels, 1.0, -1.0).double()


def cosine(run: Run, task: Task) -> Tensor:
    """Of the two embeddings."""
    return F.normalize(embedding(run, task.test_images)) @ F.normalize(embedding(run, task.images)).T


def spaced(run: Run, count: int) -> list[tuple[Parameters, float]]:
    """The last checkpoint, and those that share the training evenly with it."""
    return [run.checkpoints[len(run.checkpoints) * (i + 1) // count - 1] for i in range(count)]


def products(
    run: Run, task: Task, count: int, *, normalise: bool = False, project: Projection = Tensor.float
) -> Tensor:
    """TracIn: products of the gradients at `count` checkpoints, each times its learning rate."""
    total = torch.zeros(len(task.test_labels), len(task.labels))
    for parameters, rate in spaced(run, count):
        sides = []
        for images, labels in ((task.test_images, task.test_labels), (task.images, task.labels)):
            gradients, factors = margin_gradients(run.model, parameters, images, labels, project)
            sides.append(F.normalize(gradients) if normalise else gradients * factors)
        total += rate * sides[0] @ sides[1].T
    return total.double()


def trak(run: Run, task: Task, dampings: Sequence[float], count: int) -> list[Tensor]:
    """TRAK, but from checkpoints of one run, projected by hashing; multiplied out to the loss of the test image."""
    totals = [torch.zeros(len(task.test_labels), len(task.labels), dtype=torch.float64) for _ in dampings]
    for parameters, _ in spaced(run, count):
        found, factors = margin_gradients(run.model, parameters, task.images, task.labels, sketch(SKETCH))
        test = margin_gradients(run.model, parameters, task.test_images, task.test_labels, sketch(SKETCH))
        kernel = (found.T @ found / len(found)).double()
        for total, damping in zip(totals, dampings, strict=True):
            total += (test[0] * test[1]).double() @ damped_solve(kernel, damping, found.T.double()) * factors.T
    return totals


def gauss_newton(
    run: Run, task: Task, dampings: Sequence[float], count: int, project: Projection | None = None
) -> list[Tensor]:
    """Koh & Liang on all weights (or projected ones), with the Gauss-Newton matrix in the place of the Hessian."""
    totals = [torch.zeros(len(task.test_labels), len(task.labels), dtype=torch.float64) for _ in dampings]
    for parameters, _ in spaced(run, count):
        keep = project or Tensor.float
        jacobians, gradients, p = logit_gradients(run.model, parameters, task.images, task.labels, keep)
        tests = logit_gradients(run.model, parameters, task.test_images, task.test_labels, keep)[1]
        weighted = p[:, :, None] * (jacobians - torch.einsum("nc,ncp->np", p, jacobians)[:, None])
        matrix = jacobians.flatten(0, 1).T @ weighted.flatten(0, 1) / len(p)
        if project is not None:  # the whole matrix would take twice the memory and time
            matrix, gradients, tests = matrix.double(), gradients.double(), tests.double()
        for total, damping in zip(totals, dampings, strict=True):
            total += tests @ damped_solve(matrix, damping, gradients.T)
    return totals


@dataclass(frozen=True)
class Method:
    """`call` gives one (m, n) score per damping; `whole` says that it looks at all weights."""

    call: Callable[[Run, Task, Sequence[float]], list[Tensor]]
    dampings: tuple[float, ...] = (0.0,)
    whole: bool = False


METHODS: dict[str, Method] = {
    "same label or not": Method(lambda r, t, _: [signed(torch.ones(len(t.labels)), t)]),
    "training loss, signed": Method(lambda r, t, _: [signed(r.losses[-1], t)]),
    "loss averaged over epochs, signed": Method(lambda r, t, _: [signed(r.losses.mean(0), t)]),
    "embedding cosine": Method(lambda r, t, _: [cosine(r, t)]),
    "embedding cosine, signed": Method(lambda r, t, _: [signed(cosine(r, t), t)]),
    "head": Method(lambda r, t, d: [head(r, t, damping) for damping in d], HEAD_DAMPINGS),
    "gradient product": Method(lambda r, t, _: [products(r, t, 1)], whole=True),
    "gradient cosine": Method(lambda r, t, _: [products(r, t, 1, normalise=True)], whole=True),
    "TracIn": Method(lambda r, t, _: [products(r, t, EPOCHS)], whole=True),
    "TracIn, projected to 512": Method(lambda r, t, _: [products(r, t, EPOCHS, project=sketch(512))], whole=True),
    "TracIn, normalised": Method(lambda r, t, _: [products(r, t, EPOCHS, normalise=True)], whole=True),
    "TRAK, projected to 1024": Method(lambda r, t, d: trak(r, t, d, 1), SKETCH_DAMPINGS, True),
    "TRAK, 4 checkpoints": Method(lambda r, t, d: trak(r, t, d, 4), SKETCH_DAMPINGS, True),
    "Gauss-Newton, projected to 1024": Method(
        lambda r, t, d: gauss_newton(r, t, d, 1, sketch(SKETCH)), SKETCH_DAMPINGS, True
    ),
    "Gauss-Newton, 4 checkpoints": Method(
        lambda r, t, d: gauss_newton(r, t, d, 4, sketch(SKETCH)), SKETCH_DAMPINGS, True
    ),
    "Gauss-Newton, not projected": Method(lambda r, t, d: gauss_newton(r, t, d, 1), EXACT_DAMPINGS, True),
}
FLIPS = {"random": None, "look-alikes": torch.tensor([6, 7, 3, 8, 9, 3, 0, 1, 3, 4])}
"""The label that a flipped one becomes."""


# --- the experiments ---


def subsets(count: int, each: int) -> tuple[Tensor, dict[str, slice]]:
    """(1 + 3 each, n) of 0 and 1: all images; then without one, without ten, without half of them."""
    generator = torch.Generator().manual_seed(1)
    kept, kinds = [torch.ones(1, count)], {}
    for number, (name, size) in enumerate({"one": 1, "ten": 10, "half": count // 2}.items()):
        orders = [torch.randperm(count, generator=generator) for _ in range(1 + each * size // count)]
        parts = torch.cat([order[: count // size * size].view(-1, size) for order in orders])[:each]
        kept.append(torch.ones(each, count).scatter_(1, parts, 0.0))
        kinds[name] = slice(1 + number * each, 1 + (number + 1) * each)
    return torch.cat(kept), kinds


def spearman(a: Tensor, b: Tensor) -> float:
    """Of two (K, m), over the K subsets (ties by index), averaged over the m test images."""
    first, second = (x.argsort(0).argsort(0).double() for x in (a, b))
    first, second = first - first.mean(0), second - second.mean(0)
    return float(((first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0))).mean())


Found = dict[str, list[list[float]]]


def correlations(predicted: Tensor, truths: Tensor, seed: int, kinds: dict[str, slice]) -> list[float]:
    """One, ten, half against the own run, then against the mean of the others; `predicted` is (K, m)."""
    others = (truths.sum(0) - truths[seed]) / (len(truths) - 1)
    return [spearman(predicted[part], truth[part]) for truth in (truths[seed], others) for part in kinds.values()]


def retrain(make: Callable[[], nn.Sequential], task: Task, seeds: int, each: int) -> tuple[Found, float]:
    """For each method a list over the seeds of six correlations, at its best damping; and the check's difference."""
    kept, kinds = subsets(len(task.labels), each)
    runs = [train(make, task, kept, seed, EPOCHS) for seed in range(seeds)]
    difference = check_against_a_loop(make, task, kept, runs[0], kinds["ten"].start)
    truths = torch.stack([run.test_losses - run.test_losses[:1] for run in runs])  # (S, K, m)
    halves = [spearman(truths[: seeds // 2, k].mean(0), truths[seeds // 2 :, k].mean(0)) for k in kinds.values()]
    found: Found = {
        "two halves of the seeds": [[math.nan] * 3 + halves],
        "really left out, one other seed": [
            [math.nan] * 3 + correlations(t, truths, s, kinds)[3:] for s, t in enumerate(truths)
        ],
    }
    for name, method in METHODS.items():
        by_damping: list[list[list[float]]] = [[] for _ in method.dampings]
        for seed, run in enumerate(runs):
            for column, score in zip(by_damping, method.call(run, task, method.dampings), strict=True):
                predicted = (1 - kept).double() @ score.T
                column.append(correlations(predicted, truths, seed, kinds))
        best = max(range(len(by_damping)), key=lambda i: float(np.mean(by_damping[i])))
        label = f"{name}, damping {method.dampings[best]:g}" if len(method.dampings) > 1 else name
        found[label] = by_damping[best]
    return found, difference


def flip(task: Task, target: Tensor | None, seed: int) -> tuple[Task, Tensor]:
    """Gives 10 % of the images a wrong label; also which (n,)."""
    generator = torch.Generator().manual_seed(100 + seed)
    flipped = torch.zeros(len(task.labels), dtype=torch.bool)
    flipped[torch.randperm(len(flipped), generator=generator)[: len(flipped) // 10]] = True
    shift = torch.randint(1, CLASSES, task.labels.shape, generator=generator)
    wrong = (task.labels + shift) % CLASSES if target is None else target[task.labels]
    labels = torch.where(flipped, wrong, task.labels)
    return Task(task.images, labels, task.images, labels), flipped


def disagreement(run: Run, task: Task) -> Tensor:
    """(n,), share of the 20 nearest others (cosine of the embeddings) that have another label."""
    near = cosine(run, task).fill_diagonal_(-2).topk(20).indices
    return (task.labels[near] != task.labels[:, None]).double().mean(1)


def suspects(run: Run, task: Task) -> dict[str, list[Tensor]]:
    """(n,) for each score and damping: the higher, the more suspect."""
    found = {
        "training loss": [run.losses[-1]],
        "training loss averaged over epochs": [run.losses.mean(0)],
        "20 nearest neighbours disagree": [disagreement(run, task)],
    }
    for name in (
        "head", "gradient product", "TracIn", "TRAK, projected to 1024", "Gauss-Newton, projected to 1024",
    ):  # fmt: skip
        method = METHODS[name]
        found[f"self-influence: {name}"] = [s.diagonal() for s in method.call(run, task, method.dampings)]
    return found


def find_flips(task: Task, seeds: int, lengths: Sequence[int]) -> tuple[list[str], dict[str, list[str]]]:
    """Headings, and for each score "AUROC / precision at k" for each kind of flip and length of training."""
    headings, cells = [], defaultdict(list)
    for kind, target in FLIPS.items():
        for epochs in lengths:
            headings.append(f"{kind}, {epochs} epochs")
            values: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
            for seed in range(seeds):
                wrong, flipped = flip(task, target, seed)
                run = train(flat_net, wrong, torch.ones(1, len(flipped)), seed, epochs)
                for name, scores in suspects(run, wrong).items():
                    count = int(flipped.sum())
                    values[name].append([
                        (roc_auc_score(flipped, s.detach()), float(flipped[s.topk(count).indices].double().mean()))
                        for s in scores
                    ])  # fmt: skip
            for name, rows in values.items():
                means = np.mean(rows, axis=0)  # (dampings, 2)
                auroc, precision = means[means[:, 0].argmax()]
                cells[name].append(f"{auroc:.4f} / {precision:.3f}")
    return headings, cells


class Peak(TorchDispatchMode):
    """Bytes of the tensors that were made inside and live at one time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ():
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, and MB of tensors that it makes and holds at one time, at most (from a first call)."""
    with Peak() as peak:
        call()
    started = time.process_time()
    call()
    return time.process_time() - started, peak.most / 1e6


def epoch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One epoch as everybody trains."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=MOMENTUM)
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def costs(task: Task) -> list[list[str]]:
    """For each method (one damping, 30 test images) on the first network: seconds, epochs, MB."""
    few = Task(task.images, task.labels, task.test_images[:30], task.test_labels[:30])
    run = train(flat_net, few, torch.ones(1, len(few.labels)), 0, EPOCHS)
    model = flat_net()
    unit, memory = timed(lambda: epoch(model, few.images, few.labels))
    rows = [["one epoch of training", f"{unit:.3f}", "1.0", f"{memory:.1f}"]]
    for name, method in METHODS.items():
        seconds, memory = timed(lambda m=method: m.call(run, few, m.dampings[:1]))  # type: ignore[misc]
        rows.append([name, f"{seconds:.3f}", f"{seconds / unit:.1f}", f"{memory:.1f}"])
    return rows


def costs_of_a_large_one() -> list[list[str]]:
    """The same per image for ResNet-18 (11.2 million weights), 32x32, 16 images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=CLASSES)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % CLASSES
    unit, memory = timed(lambda: epoch(model, images, labels))
    parameters = {name: value.detach() for name, value in model.eval().named_parameters()}
    one = timed(lambda: margin_gradients(model, parameters, images, labels, sketch(SKETCH)))
    return [
        ["ResNet-18: a training step", f"{unit:.2f}", "1.0", f"{memory:.0f}"],
        ["ResNet-18: projected gradients of each image", f"{one[0]:.2f}", f"{one[0] / unit:.1f}", f"{one[1]:.0f}"],
    ]


# --- the report ---


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mean_and_error(values: Sequence[float]) -> str:
    """Mean over the seeds +- its standard error."""
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return ""
    error = f" ±{statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{mean:.2f}{error}"


def report(found: Found) -> str:
    """The table of correlations, and what the best score of all weights gains over the head, seed by seed."""
    headings = ["score", *(f"{kind}, {whose}" for whose in ("own", "others") for kind in ("one", "ten", "half"))]
    rows = [[name, *map(mean_and_error, zip(*values, strict=True))] for name, values in found.items()]
    whole = [name for name in found if any(name.startswith(known) and METHODS[known].whole for known in METHODS)]
    best = max(whole, key=lambda name: float(np.mean(found[name])))
    head_name = next(name for name in found if name.startswith("head"))
    gain = np.array(found[best]) - np.array(found[head_name])
    rows.append([f"*gain of the best of all weights ({best}) over the head*", *map(mean_and_error, gain.T.tolist())])
    return markdown(headings, rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, 20 subsets of a kind, one network")
    parser.add_argument("--seeds", type=int, default=4, help="at least 2 (default 4)")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the truth of a seed is compared with that of the others")
    torch.set_num_threads(1)
    started = time.perf_counter()
    versions = f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {platform.machine()}, one thread\n")
    seeds, each = (2, 20) if options.quick else (options.seeds, 100)
    task = digits(400, 200)
    for name, make in list(NETWORKS.items())[: 1 if options.quick else None]:
        found, difference = retrain(make, task, seeds, each)
        print(f"## {name}: {seeds} seeds, {each} subsets of a kind, Spearman\n\n{report(found)}")
        print(f"vmapped training against a plain loop: test losses differ by at most {difference:.1e}\n", flush=True)
    headings, cells = find_flips(digits(1000, 0), 1 if options.quick else 3, (20,) if options.quick else (20, 60))
    print("## 10 % of the labels of 1,000 images flipped: AUROC / precision at 100\n")
    print(markdown(["score", *headings], [[name, *row] for name, row in cells.items()]))
    print("## Cost: 400 training images, 30 test images, one damping\n")
    print(markdown(["what", "CPU seconds", "times an epoch (a step)", "MB"], costs(task) + costs_of_a_large_one()))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
