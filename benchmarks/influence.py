"""Costs of influence functions on a softmax head, and how near they come to heads that were really refitted.

    OMP_NUM_THREADS=2 python benchmarks/influence.py [--only costs|quality] [--threads 2]

Costs: features like those after a ReLU (random, half of them zero, means of the classes apart, a tenth of the labels
wrong), weight decay 1e-2; each case in a process of its own, so that the peak of its memory is its own. Quality: the
pixels of scikit-learn's digits; 80 points left out and refitted one by one, 20 test points.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_interp.functional.influence import HeadInfluence
from lightning_interp.functional.softmax_head import fit_softmax_head

Result = TypeVar("Result")
CASES = ((5_000, 512, 10), (50_000, 128, 10), (50_000, 64, 100), (5_000, 512, 100))


def points(count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features (n, d) after a ReLU, and labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = 0.5 * torch.randn(classes, width, generator=generator)
    embeddings = (centres[labels] + torch.randn(count, width, generator=generator)).relu()
    wrong = torch.rand(count, generator=generator) < 0.1
    return embeddings, torch.where(wrong, torch.randint(0, classes, (count,), generator=generator), labels)


def timed(call: Callable[[], Result]) -> tuple[Result, str]:
    """What a call gives, and its seconds: on the clock, and of the processor (about threads times as many)."""
    started, used = time.perf_counter(), time.process_time()
    result = call()
    return result, f"{time.perf_counter() - started:.2f} ({time.process_time() - used:.2f})"


def memory() -> float:
    """Peak of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def costs(case: tuple[int, int, int], threads: int) -> str:
    """One row of the table."""
    torch.set_num_threads(threads)
    embeddings, labels = points(*case)
    torch.linalg.eigh(torch.eye(8))
    before = memory()
    head, fitted = timed(lambda: fit_softmax_head(embeddings, labels, num_classes=case[2]))
    influence, factorised = timed(lambda: HeadInfluence(embeddings, labels, num_classes=case[2], head=head))
    _, tests = timed(lambda: influence.on(embeddings[:8], labels[:8]))
    _, own = timed(influence.self_influence)
    _, actual = timed(lambda: influence.leave_one_out(embeddings[:8], labels[:8], torch.arange(10)))
    solver = "Cholesky" if influence.exact else "CG; self: ranking"
    return (
        f"| {case[0]:,} x {case[1]} x {case[2]} | {influence.loss.size:,} | {solver} | {head.steps} | "
        f"{head.gradient_norm:.0e} | {fitted} | {factorised} | {tests} | {own} | {actual} | {memory() - before:,.0f} |"
    )


def quality(weight_decay: float) -> list[str]:
    """Rows of the table: each prediction against 80 refits, and what a large head would say of self-influences."""
    pixels, given = load_digits(return_X_y=True)
    embeddings, labels = torch.tensor(pixels) / 16, torch.tensor(given)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1_000], order[1_000:1_020]
    influence = HeadInfluence(embeddings[train], labels[train], weight_decay=weight_decay)
    # Half of them the most influential ones, which are those that are shown; the others at random.
    found = influence.on(embeddings[test], labels[test])
    top = found.abs().amax(dim=0).topk(40).indices
    rest = torch.tensor([i for i in range(len(train)) if i not in set(top.tolist())][:40])
    chosen = torch.cat([top, rest])
    before = influence.head.losses(embeddings[test], labels[test])
    changes, own = [], []
    for index in chosen.tolist():
        others = train[torch.arange(len(train)) != index]
        decay = weight_decay * len(train) / (len(train) - 1)
        head = fit_softmax_head(embeddings[others], labels[others], weight_decay=decay, start=influence.head.weight)
        changes.append(head.losses(embeddings[test], labels[test]) - before)
        own.append(head.losses(embeddings[train[index]][None], labels[train[index]][None])[0])
    actual = torch.stack(changes, dim=1)
    rise = torch.stack(own) - influence.head.losses(embeddings[train], labels[train])[chosen]
    predictions = {"influence": found[:, chosen]}
    for steps in (1, 2, 4):
        predictions[f"{steps} Newton step{'s' if steps > 1 else ''}"] = influence.leave_one_out(
            embeddings[test], labels[test], chosen, steps=steps
        )
    rows = [row(weight_decay, name, values, actual) for name, values in predictions.items()]
    rows.append(row(weight_decay, "self-influence, own loss", influence.self_influence()[chosen][None], rise[None]))
    losses = influence.leave_one_out_losses()[chosen]
    rows.append(row(weight_decay, "leave-one-out loss, own loss", losses[None], torch.stack(own)[None]))
    large = HeadInfluence(embeddings[train], labels[train], weight_decay=weight_decay, solver="cg")
    for name, rough, exact in (
        ("self-influence, ranking of large heads against exact", large.self_influence(), influence.self_influence()),
        ("leave-one-out loss, the same", large.leave_one_out_losses(), influence.leave_one_out_losses()),
    ):
        rows.append(row(weight_decay, name, rough[None], exact[None]))
    return rows


def row(weight_decay: float, name: str, values: Tensor, actual: Tensor) -> str:
    """Correlation within each test point (median, least) and over all of them, slope and largest error."""
    each = [(pearsonr(a, b)[0], spearmanr(a, b)[0]) for a, b in zip(values, actual, strict=True)]
    pearson, spearman = (torch.tensor([pair[k] for pair in each]) for k in (0, 1))
    slope = float((values * actual).sum() / values.square().sum())
    error = float((values - actual).abs().max() / actual.abs().max())
    pooled = pearsonr(values.flatten(), actual.flatten())[0], spearmanr(values.flatten(), actual.flatten())[0]
    return (
        f"| {weight_decay:g} | {name} | {pooled[0]:.4f} | {pooled[1]:.4f} | "
        f"{pearson.median():.4f} ({pearson.min():.4f}) | "
        f"{spearman.median():.4f} ({spearman.min():.4f}) | {slope:.2f} | {error:.1e} |"
    )


def machine(threads: int) -> str:
    """Processor, threads and versions."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return f"{processor}, {threads} threads, Python {platform.python_version()}, torch {torch.__version__}, float64"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("costs", "quality"))
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads), end="\n\n")
    if options.only != "quality":
        print("Seconds on the clock (of the processor); memory: peak above the embeddings in MB.\n")
        print(
            "| points x features x classes | weights | solver | Newton steps | gradient | fit | factorise | 8 tests",
            end="",
        )
        print(" | self, all | 10 left out | MB |\n|" + "---|" * 11)
        for case in CASES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(costs, (case, options.threads)), flush=True)
        print()
    if options.only != "costs":
        print("| weight decay | what | Pearson | Spearman | Pearson each | Spearman each | slope | error |")
        print("|---|---|---|---|---|---|---|---|")
        for weight_decay in (1e-2, 1e-3, 1e-4):
            print("\n".join(quality(weight_decay)), flush=True)


if __name__ == "__main__":
    main()
