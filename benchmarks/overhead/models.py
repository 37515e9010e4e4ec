"""The networks whose training steps are watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchvision
from torch import nn

Size = Literal["small", "resnet", "gpu"]


@dataclass(frozen=True)
class Case:
    """A network and the batches that it is trained on.

    Attributes:
        name: As in the tables.
        make: Gives the network, freshly initialised.
        shape: (C, H, W) of one image.
        batch: Images in a step.
        size: Which goals apply.
        classes: Number of labels.
        device: Where it trains; on `cuda` in bf16 autocast and channels-last.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    size: Size
    classes: int = 10
    device: str = "cpu"


def small_cnn() -> nn.Module:
    """Four convolutions on 28x28 grey images."""
    layers: list[nn.Module] = []
    for channels, width in ((1, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        if channels == 32:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18() -> nn.Module:
    """Ten classes."""
    network: nn.Module = torchvision.models.resnet18(weights=None, num_classes=10)
    return network


def resnet50() -> nn.Module:
    """A thousand classes."""
    network: nn.Module = torchvision.models.resnet50(weights=None)
    return network


CASES = (
    Case("small CNN, 28x28, batch 64", small_cnn, (1, 28, 28), 64, "small"),
    Case("resnet18, 32x32, batch 64", resnet18, (3, 32, 32), 64, "resnet"),
    Case("resnet18, 112x112, batch 16", resnet18, (3, 112, 112), 16, "resnet"),
    Case("resnet50, 224x224, batch 256, GPU, bf16", resnet50, (3, 224, 224), 256, "gpu", 1000, "cuda"),
)


def runnable(containing: str = "") -> list[Case]:
    """Those whose name contains this text and whose device is there."""
    return [case for case in CASES if containing in case.name and (case.device == "cpu" or torch.cuda.is_available())]


def kill(model: nn.Module, fraction: float) -> None:
    """Silences the first filters of every layer that a ReLU follows, and no others.

    Where there is no normalisation, some filters may have been dead from the start: their biases are raised.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    owners: list[Any] = norms or [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for owner in owners:
            dead = round(fraction * len(owner.weight))
            owner.weight[:dead] = 0
            owner.bias[:dead] = -1
            if not norms:
                owner.bias[dead:] = 1
