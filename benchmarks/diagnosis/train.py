"""One run: by a Lightning Trainer with alerts, or in plain PyTorch with the same batches and rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Sampler, TensorDataset

from benchmarks.diagnosis import traits
from benchmarks.diagnosis.census import census
from benchmarks.diagnosis.data import Data, load
from benchmarks.diagnosis.faults import change_batch, change_data, make_network, trainable
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.treatment import (
    last_epoch,
    treat_batch,
    treat_data,
    treat_network,
    treated,
    wrong_labels,
)

LONGER = 3


class Shuffled(Sampler[int]):
    """An order that depends on seed and epoch alone, not on how often the loader was iterated."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Said before each epoch, by Lightning too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()


class Setting(NamedTuple):
    """All that a run needs, made from its specification alone."""

    net: nn.Module
    data: Data
    batches: DataLoader[tuple[Tensor, ...]]
    optimizer: Optimizer
    scheduler: LRScheduler | None
    epochs: int


def prepare(spec: Spec) -> Setting:
    """Everything of the run, deterministic."""
    clean = load(spec.data)
    if spec.trait == "full_batch":
        clean = clean._replace(images=clean.images[: spec.batch_size], targets=clean.targets[: spec.batch_size])
    data = treat_data(change_data(clean, spec.fault), clean, spec)
    torch.manual_seed(spec.seed)
    net = make_network(spec.architecture, data, spec.fault)
    traits.prepare(net, clean, spec.trait)
    also_held = treat_network(net, spec)
    size = min(spec.batch_size, len(data.images))
    # The few images of an overfitting run are gone through more often, so that the run has as many steps as its twin.
    again = max(1, len(clean.images) // len(data.images))
    dataset = TensorDataset(
        data.images.repeat(again, 1, 1, 1), data.targets.repeat(again, *[1] * (data.targets.dim() - 1))
    )
    batches = DataLoader(dataset, size, sampler=Shuffled(len(dataset), spec.seed), drop_last=True)
    plan = treated(spec)
    epochs = plan.epochs * (LONGER if spec.long else 1)
    optimizer = _optimizer(plan, list(dict.fromkeys([*trainable(net, spec.fault), *also_held])))
    scheduler = _scheduler(plan, optimizer, epochs * len(batches))
    return Setting(net, data, batches, optimizer, scheduler, last_epoch(spec, epochs, len(batches)))


def _optimizer(spec: Spec, parameters: list[nn.Parameter]) -> Optimizer:
    if spec.optimizer == "sgd":
        momentum = 0.0 if spec.trait == "full_batch" else 0.9
        return SGD(parameters, spec.rate, momentum=momentum)
    if spec.optimizer == "nesterov":
        return SGD(parameters, spec.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    kinds: dict[str, Callable[..., Optimizer]] = {
        "adam": Adam, "adamw": AdamW, "plain_sgd": SGD, "rmsprop": RMSprop, "nadam": NAdam, "adagrad": Adagrad,
        "radam": RAdam, "adamax": Adamax,
    }  # fmt: skip
    return kinds[spec.optimizer](parameters, spec.rate)


def _scheduler(spec: Spec, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    if spec.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if spec.schedule == "onecycle":
        return OneCycleLR(optimizer, spec.rate, total_steps=steps + 1, cycle_momentum=False)
    if spec.schedule == "warmup":
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 5)))
    return None


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy for classes, mean squared error for numbers."""
    return F.mse_loss(scores, targets) if targets.is_floating_point() else F.cross_entropy(scores, targets)


def run(spec: Spec) -> dict[str, Any]:
    """Trains and returns what is kept: plain lists and numbers, among them the history that the rules read."""
    from benchmarks.diagnosis.watched import train_watched  # it needs this module

    torch.set_num_threads(1)
    begin = time.process_time()
    results = train_watched(spec)
    setting = prepare(spec)
    results["born"] = [round(share, 4) for share in census(setting.net, setting.data.images)]
    losses = results.pop("losses")
    results.pop("suspects", None)
    if spec.remedy != "none":
        results["wrong_labels"] = wrong_labels(setting.data, load(spec.data))
    return {
        "key": spec.key,
        "spec": asdict(spec),
        "guess": setting.data.guess,
        "steps": len(losses),
        "final": final_loss(losses, len(setting.batches)),
        "early": [_plain(loss) for loss in losses[:60]],
        "finite": all(map(math.isfinite, losses)),
        **results,
        "seconds": time.process_time() - begin,
    }


def train_plain(spec: Spec) -> list[float]:
    """The training loss of each step; ends where it is no number any more."""
    net, _, batches, optimizer, scheduler, epochs = prepare(spec)
    clip = treated(spec).clip
    losses: list[float] = []
    batch: tuple[Tensor, Tensor] | None = None
    for step, (images, targets) in enumerate(_passes(batches, epochs)):
        batch = treat_batch(change_batch(images, targets, step, spec.fault), step, spec, batch)
        images, targets = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = loss_of(net(images), targets)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return losses


def final_loss(losses: list[float], steps_per_epoch: int) -> float | None:
    """Mean over the last epoch, at least 20 and at most 100 steps; None if one of them is no number."""
    last = losses[-min(100, max(20, steps_per_epoch)) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else None


def _passes(batches: DataLoader[tuple[Tensor, ...]], epochs: int) -> Iterator[Any]:
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from batches


def _plain(loss: float) -> float | None:
    return float(f"{loss:.4g}") if math.isfinite(loss) else None
