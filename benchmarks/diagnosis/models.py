"""Small networks of five kinds, and those that an injected fault needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.diagnosis.fresh import FRESH


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside an identity; the ReLUs are functional, as in many real code bases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, (N, width, H, W)."""
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(y)) + x)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (N, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        y: Tensor = self.norm(x.movedim(1, -1))
        return y.movedim(-1, 1)


def _conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def _head(width: int, outputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, outputs)]


def _plain(channels: int, outputs: int) -> nn.Module:
    convs = [_conv(channels, 16), nn.ReLU(), _conv(16, 32), nn.ReLU(), nn.MaxPool2d(2), _conv(32, 32), nn.ReLU()]
    return nn.Sequential(*convs, *_head(32, outputs))


def _norm(channels: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, width in ((channels, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_head(32, outputs))


def _residual(channels: int, outputs: int) -> nn.Module:
    stem = [_conv(channels, 16), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, Residual(16), nn.MaxPool2d(2), Residual(16), *_head(16, outputs))


def _smooth(channels: int, outputs: int) -> nn.Module:
    first = [_conv(channels, 16), nn.GroupNorm(4, 16), nn.GELU()]
    second = [_conv(16, 32), ChannelNorm(32), nn.GELU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, _conv(32, 32), nn.GroupNorm(4, 32), nn.SiLU(), *_head(32, outputs))


def _depthwise(channels: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = [_conv(channels, 24), nn.BatchNorm2d(24), nn.ReLU6()]
    for _ in range(2):
        layers += [_conv(24, 24, groups=24), nn.BatchNorm2d(24), nn.ReLU6()]
        layers += [nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24), nn.ReLU6()]
    layers.insert(9, nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_head(24, outputs))


ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": _plain,
    "norm": _norm,
    "residual": _residual,
    "smooth": _smooth,
    "depthwise": _depthwise,
}


class Dense(nn.Module):
    """Two branches of BatchNorm, ReLU, convolution whose outputs are put beside the input (DenseNet)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width + growth)
        self.first, self.second = _conv(width, growth), _conv(width + growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, width + 2 growth, H, W)."""
        x = torch.cat([x, self.first(F.relu(self.norm1(x)))], 1)
        return torch.cat([x, self.second(F.relu(self.norm2(x)))], 1)


class NextBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels, two linear layers with a GELU, scaled shortcut (ConvNeXt)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(3 * width, width),
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, (N, width, H, W)."""
        y = self.norm(self.depthwise(x).movedim(1, -1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return x + y.movedim(-1, 1)


class Fire(nn.Module):
    """A narrow 1x1 convolution, then 1x1 and 3x3 ones side by side (SqueezeNet)."""

    def __init__(self, inputs: int, narrow: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, narrow, 1)
        self.small, self.large = nn.Conv2d(narrow, outputs // 2, 1), _conv(narrow, outputs // 2)
        for conv in (self.squeeze, self.small, self.large):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")  # as published; the default is smaller

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1)


def _leaky(channels: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, width in ((channels, 16), (16, 16), (16, 24), (24, 24)):
        layers += [_conv(inputs, width), nn.InstanceNorm2d(width, affine=True), nn.LeakyReLU(0.1)]
    layers.insert(6, nn.AvgPool2d(2))
    return nn.Sequential(*layers, *_head(24, outputs))


def _dense(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        _conv(channels, 12), Dense(12, 8), nn.Conv2d(28, 16, 1), nn.AvgPool2d(2), Dense(16, 8),
        nn.BatchNorm2d(32), nn.ReLU(), *_head(32, outputs),
    )  # fmt: skip


def _next(channels: int, outputs: int) -> nn.Module:
    stem = [nn.Conv2d(channels, 20, 2, stride=2), ChannelNorm(20)]
    return nn.Sequential(*stem, NextBlock(20), NextBlock(20), ChannelNorm(20), *_head(20, outputs))


def _alex(channels: int, outputs: int) -> nn.Module:
    convs = [nn.Conv2d(channels, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), _conv(24, 32), nn.ReLU()]
    tail = [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*convs, *tail, nn.Linear(64, outputs))


def _squeeze(channels: int, outputs: int) -> nn.Module:
    body = [_conv(channels, 24), nn.ReLU(), Fire(24, 12, 32), nn.MaxPool2d(2), Fire(32, 16, 48)]
    return nn.Sequential(*body, nn.Conv2d(48, outputs, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# Kept apart: no threshold was chosen on runs of these; but what failed on them was looked at, and some of it mended.
HELD_OUT: dict[str, Callable[[int, int], nn.Module]] = {
    "leaky": _leaky,
    "dense": _dense,
    "next": _next,
    "alex": _alex,
    "squeeze": _squeeze,
}


def build(architecture: str, channels: int, outputs: int) -> nn.Module:
    """The network of that name."""
    return (ARCHITECTURES | HELD_OUT | FRESH)[architecture](channels, outputs)


def deep(channels: int, outputs: int, activation: type[nn.Module], depth: int = 8) -> nn.Module:
    """A stack without normalisation, the ground on which gradients vanish or explode."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [_conv(channels if i == 0 else 16, 16), activation()]
    return nn.Sequential(*layers, *_head(16, outputs))


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    """In the order in which they were made."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def weights(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights of all convolutions and linear layers, by the layer's name."""
    with torch.no_grad():
        kinds = (nn.Conv2d, nn.Linear)
        return {n: m.weight.detach().clone() for n, m in net.named_modules() if isinstance(m, kinds)}
