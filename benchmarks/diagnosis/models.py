"""Small networks of five kinds, and those that an injected fault needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
