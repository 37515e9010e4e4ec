"""Networks that were added when the rules were finished: the first look at them tested rules not made for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Inverted(nn.Module):
    """Wide 1x1, depthwise 3x3, squeeze-and-excitation, narrow 1x1, shortcut (EfficientNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.SiLU())
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.SiLU()]
        self.excite = nn.Sequential(*squeeze, nn.Conv2d(8, wide, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, (N, width, H, W)."""
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.excite(y))
        return x + y


class Inception(nn.Module):
    """1x1, 3x3, 5x5 and a pooled branch side by side, each with BatchNorm and ReLU (GoogLeNet)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.point = _normed(inputs, width, 1)
        self.three = nn.Sequential(_normed(inputs, width, 1), _normed(width, width, 3))
        self.five = nn.Sequential(_normed(inputs, width, 1), _normed(width, width, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _normed(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 width, H, W)."""
        return torch.cat([branch(x) for branch in (self.point, self.three, self.five, self.pooled)], 1)


class Mixed(nn.Module):
    """Depthwise convolution with a shortcut, then a 1x1 one, each with GELU and BatchNorm (ConvMixer)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.space = nn.Sequential(depthwise, nn.GELU(), nn.BatchNorm2d(width))
        self.channels = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, (N, width, H, W)."""
        y: Tensor = self.channels(x + self.space(x))
        return y


def _normed(inputs: int, outputs: int, size: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _head(width: int, outputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)]


def _efficient(channels: int, outputs: int) -> nn.Module:
    stem = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    return nn.Sequential(*stem, Inverted(16), nn.AvgPool2d(2), Inverted(16), *_head(16, outputs))


def _inception(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        _normed(channels, 16, 3), Inception(16, 6), nn.MaxPool2d(2), Inception(24, 8), nn.Dropout(0.1),
        *_head(32, outputs),
    )  # fmt: skip


def _vgg(channels: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, width in ((channels, 16), (16, 16), (16, 24), (24, 24), (24, 32)):
        conv = nn.Conv2d(inputs, width, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        layers += [conv, nn.ReLU()]
    layers.insert(8, nn.MaxPool2d(2))
    layers.insert(4, nn.MaxPool2d(2))
    tail = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)]
    return nn.Sequential(*layers, *tail)


def _mixer(channels: int, outputs: int) -> nn.Module:
    stem = [nn.Conv2d(channels, 24, 2, stride=2), nn.GELU(), nn.BatchNorm2d(24)]
    return nn.Sequential(*stem, Mixed(24), Mixed(24), Mixed(24), *_head(24, outputs))


FRESH: dict[str, Callable[[int, int], nn.Module]] = {
    "efficient": _efficient,
    "inception": _inception,
    "vgg": _vgg,
    "mixer": _mixer,
}
