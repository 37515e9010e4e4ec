"""Injected faults: what each changes in the network, the data, the optimizer or a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.diagnosis import models
from benchmarks.diagnosis.data import Data

ONSET = 150  # step of a fault that strikes a batch
FEW = 60


@dataclass(frozen=True)
class Fault:
    """What is known about an injected fault.

    Attributes:
        rules: The rule that should speak; none where no rule is meant for it.
        causes: Names of causes that are right for it, see `labels.cause_of`.
        by_harm: Whether it counts only if the run does worse than its twin; else it is a fault whatever comes of it.
        watch_labels: Whether the run, and its twin, needs the callback that judges labels.
    """

    rules: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    by_harm: bool = True
    watch_labels: bool = False


_LABELS = Fault(("suspect_labels",), ("labels",), by_harm=False, watch_labels=True)
_START = ("initialisation", "bad_start", "dead_filters", "dormant_units", "vanishing_gradient", "exploding_gradient")
FAULTS: dict[str, Fault] = {
    "init_large": Fault(("bad_start",), _START),
    "init_small": Fault(("vanishing_gradient",), _START),
    "init_constant": Fault((), _START),
    "dead_bias": Fault(("dead_filters",), _START),
    "inputs_raw": Fault(("bad_start",), ("inputs",)),
    "labels_5": _LABELS,
    "labels_10": _LABELS,
    "labels_20": _LABELS,
    "labels_all": _LABELS,
    "frozen_layer": Fault(("untrained_layer",), ("untrained_layer",), by_harm=False),
    "missing_layer": Fault(("untrained_layer",), ("untrained_layer",), by_harm=False),
    "vanishing": Fault(("vanishing_gradient",), _START),
    "exploding": Fault(("exploding_gradient",), (*_START, "non_finite")),
    "corrupt_batch": Fault(("gradient_spike",), ("gradient_spike",), by_harm=False),
    "few_images": Fault(("overfitting",), ("overfitting",)),
    "nan_batch": Fault(("non_finite",), ("non_finite",), by_harm=False),
}


def fault_of(name: str) -> Fault | None:
    """What is known about it; None for `none`."""
    return FAULTS.get(name)


def change_data(data: Data, fault: str) -> Data:
    """The data with the fault in them."""
    if fault == "inputs_raw":
        return data._replace(images=data.images * 60 + 120, val_images=data.val_images * 60 + 120)
    if fault == "few_images":
        return data._replace(images=data.images[:FEW], targets=data.targets[:FEW])
    if fault.startswith("labels_"):
        share = {"5": 0.05, "10": 0.1, "20": 0.2, "all": 1.0}[fault.removeprefix("labels_")]
        return data._replace(targets=_wrong(data.targets, share, data.outputs))
    return data


def _wrong(targets: Tensor, share: float, classes: int) -> Tensor:
    """So many labels moved to any other class; all of them: shuffled."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(targets), generator=generator)
    if share == 1.0:
        return targets[order]
    moved = order[: round(share * len(targets))]
    shift = torch.randint(1, classes, (len(moved),), generator=generator)
    changed = targets.clone()
    changed[moved] = (targets[moved] + shift) % classes
    return changed


def make_network(architecture: str, data: Data, fault: str) -> nn.Module:
    """The network with the fault in it; vanishing and exploding gradients need one of their own."""
    channels = data.images.shape[1]
    if fault == "vanishing":
        return models.deep(channels, data.outputs, nn.Sigmoid)
    if fault == "exploding":
        # Tanh keeps the forward bounded, and the loss with it, while the gradient grows from layer to layer (Schoenholz
        # et al. 2017: the chaotic phase).
        net = models.deep(channels, data.outputs, nn.Tanh, depth=12)
        for conv in models.convolutions(net):
            nn.init.normal_(conv.weight, std=4 / math.sqrt(9 * conv.in_channels))
        return net
    net = models.build(architecture, channels, data.outputs)
    with torch.no_grad():
        _change_weights(net, fault)
    return net


def _change_weights(net: nn.Module, fault: str) -> None:
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if fault in {"init_large", "init_small"}:
        for layer in layers:
            layer.weight.mul_(8.0 if fault == "init_large" else 0.05)
    elif fault == "init_constant":
        for layer in layers:
            layer.weight.fill_(0.02)
    elif fault == "dead_bias":
        _lower_biases(net)
    elif fault == "frozen_layer":
        models.convolutions(net)[1].requires_grad_(False)


def _lower_biases(net: nn.Module) -> None:
    """Three quarters of the units before the second activation begin so low that no image reaches them."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)]
    target = norms[1] if norms else models.convolutions(net)[1]
    if target.bias is not None:
        target.bias[: 3 * len(target.bias) // 4] = -20.0


def trainable(net: nn.Module, fault: str) -> list[nn.Parameter]:
    """What the optimizer gets."""
    left_out = {id(p) for p in models.convolutions(net)[1].parameters()} if fault == "missing_layer" else set()
    return [p for p in net.parameters() if p.requires_grad and id(p) not in left_out]


def change_batch(images: Tensor, targets: Tensor, step: int, fault: str) -> tuple[Tensor, Tensor]:
    """The batch of this step with the fault in it."""
    if step != ONSET:
        return images, targets
    if fault == "corrupt_batch":
        return images.flip(0) * 30 + 10, targets
    if fault == "nan_batch":
        return images.index_fill(0, torch.tensor([0]), torch.nan), targets
    return images, targets
