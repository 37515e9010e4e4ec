"""Convolutions of small maps against those of PyTorch, and which of them are concerned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.functional import small_maps
from lightning_interp.functional.occlusion import occlusion
from lightning_interp.functional.small_maps import convolve, faster_small_maps

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Whatever other tests have compiled in this process."""
    monkeypatch.setattr(small_maps, "anything_compiled", lambda: False)


def maps_and_weight(size, channels=(24, 40), groups=1, count=3):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(count, channels[0], *size, generator=generator)
    return maps, torch.randn(channels[1], channels[0] // groups, 3, 3, generator=generator)


class Watched:
    """A convolution that remembers whether its maps had the channels first."""

    def __init__(self):
        self.first = []

    def __call__(self, maps, *args, **kwargs):
        self.first.append(maps.is_contiguous())
        return F.conv2d(maps, *args, **kwargs)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": (0, 2), "dilation": (1, 2)}])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("last", [False, True])
def test_convolve_gives_what_the_convolution_gives(options, groups, last):
    """The same numbers to rounding, in the same memory layout."""
    maps, weight = maps_and_weight((5, 6), groups=groups)
    bias = torch.linspace(-1, 1, len(weight))
    maps = maps.contiguous(memory_format=LAST) if last else maps
    found = convolve(F.conv2d, maps, weight, bias, groups=groups, **options)
    plain = F.conv2d(maps, weight, bias, groups=groups, **options)
    exact = F.conv2d(maps.double(), weight.double(), bias.double(), groups=groups, **options)
    assert found.stride() == plain.stride()
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "maps_last", "weight_last", "first"),
    [
        ((2, 2), 3, True, False, True),  # 288 numbers in the maps, 8,640 in the weights
        ((20, 20), 3, True, False, False),  # the maps outweigh
        ((2, 2), 1, True, False, False),  # 960 weights, but their order is the same both ways
        ((2, 2), 3, True, True, False),  # nothing to bring into another order
        ((2, 2), 3, False, False, True),  # they come so
    ],
)
def test_only_small_maps_with_many_weights_change_their_layout(size, kernel, maps_last, weight_last, first):
    """What has nothing to gain is left as it is."""
    maps, weight = maps_and_weight(size)
    weight = weight[:, :, :kernel, :kernel].contiguous(memory_format=LAST if weight_last else torch.contiguous_format)
    watched = Watched()
    convolve(watched, maps.contiguous(memory_format=LAST) if maps_last else maps, weight, padding=kernel // 2)
    assert watched.first == [first]


def test_layers_and_functions_are_reached_while_it_is_on(monkeypatch):
    """`nn.Conv2d` and `F.conv2d` alike, and neither before nor after."""
    seen = []
    monkeypatch.setattr(
        "lightning_interp.functional.small_maps.convolve",
        lambda func, maps, *args, **kwargs: seen.append(len(maps)) or func(maps, *args, **kwargs),
    )
    layer, maps = nn.Conv2d(2, 3, 3), torch.zeros(7, 2, 5, 5)
    layer(maps)
    with faster_small_maps():
        layer(maps)
        F.conv2d(maps[:4], layer.weight, bias=layer.bias, stride=2)
        F.conv2d(input=maps, weight=layer.weight)  # by name: as ever
        nn.Conv1d(5, 3, 3)(maps[:, 0])
    layer(maps)
    assert seen == [7, 4]


def test_it_stays_off_once_something_was_compiled(monkeypatch):
    """Else what is compiled would be compiled anew."""
    monkeypatch.setattr("lightning_interp.functional.small_maps.anything_compiled", lambda: True)
    monkeypatch.setattr("lightning_interp.functional.small_maps.convolve", None)
    with faster_small_maps():
        assert nn.Conv2d(2, 3, 3)(torch.zeros(1, 2, 5, 5)).shape == (1, 3, 3, 3)


def test_occlusion_takes_them_so(monkeypatch):
    """In a network whose last maps are small: for whole images and for covered ones; the maps stay what they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 5),
    )  # fmt: skip
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    found = occlusion(model, images, targets, window=4, stride=4)
    counts = []
    decide = small_maps._outweighed
    monkeypatch.setattr(small_maps, "_outweighed", lambda *two: counts.append(decide(*two)) or False)
    plain = occlusion(model, images, targets, window=4, stride=4)
    assert any(counts)
    assert not all(counts)
    torch.testing.assert_close(found.drop, plain.drop, rtol=1e-4, atol=1e-6)
    assert bool(plain.drop.abs().max() > 1e-3)
