"""Small networks for the tests of attribution: the same weights in many spellings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.diary import Diary


class Spelled(nn.Module):
    """(N, 3, H, W) -> (N, 5): two convolutions and a hidden linear layer, with any spelling of the activation."""

    def __init__(self, activate):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * 4, 12)
        self.head = nn.Linear(12, 5)
        self.activate = activate

    def forward(self, x):
        x = self.activate(self.first(x))
        x = self.activate(self.second(x))
        x = F.adaptive_avg_pool2d(x, (2, 2)).flatten(1)
        return self.head(self.activate(self.hidden(x)))


class OneModule(nn.Module):
    """An activation module used three times."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


RELUS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in-place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu by keyword": lambda x: F.relu(input=x),
    "F.relu in-place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "F.threshold": lambda x: F.threshold(x, 0.0, 0.0),
}
OTHERS = {
    "ReLU6": nn.ReLU6(),
    "ReLU6 in-place": nn.ReLU6(inplace=True),
    "SiLU": nn.SiLU(),
    "SiLU in-place": nn.SiLU(inplace=True),
    "GELU": F.gelu,
    "Hardswish": F.hardswish,
    "LeakyReLU": lambda x: F.leaky_relu(x, 0.1),
    "ELU": F.elu,
    "PReLU": nn.PReLU(),
    "Mish": F.mish,
    "Softplus": F.softplus,
}


class Separate(nn.Module):
    """The same network with an `nn.ReLU` module of its own for each activation: what captum can read."""

    def __init__(self, like):
        super().__init__()
        self.first, self.second, self.hidden, self.head = like.first, like.second, like.hidden, like.head
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.relu1(self.first(x))
        x = self.relu2(self.second(x))
        x = F.adaptive_avg_pool2d(x, (2, 2)).flatten(1)
        return self.head(self.relu3(self.hidden(x)))


class Residual(nn.Module):
    """The input of a ReLU is also read by a shortcut, and the sum is rectified in place."""

    def __init__(self, *, in_place=True):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.relu = nn.ReLU(inplace=in_place)
        self.norm.running_mean.normal_()

    def forward(self, x):
        x = self.norm(self.first(x))
        y = self.second(torch.relu(x))
        y += x
        return self.head(self.relu(y).mean((2, 3)))


def spelled(activate=None, *, seed=0):
    """A `Spelled` network with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return Spelled(torch.relu if activate is None else activate).eval()


def samples(count=4, size=(9, 12), *, seed=0):
    """Images (count, 3, *size) and targets (count,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator), torch.arange(count) % 5


def linear_model(size=(2, 3), classes=4, *, channels=1, seed=0):
    """A linear model of the pixels and its weight (classes, channels, *size)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))
    return model, model[1].weight.detach().reshape(classes, channels, *size)


class Counting(nn.Module):
    """Counts images that go forward and gradients that come back, and the largest batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.sizes, self.returned = Diary(), Diary()  # of each batch, and of each gradient

    @property
    def calls(self):
        return len(self.sizes)

    @property
    def forwards(self):
        return sum(self.sizes)

    @property
    def largest(self):
        return max(self.sizes)

    @property
    def backwards(self):
        return sum(self.returned)

    def forward(self, x):
        self.sizes.append(len(x))
        if x.requires_grad:
            x = x.clone()
            x.register_hook(self._back)
        return self.model(x)

    def _back(self, gradient):
        self.returned.append(len(gradient))
