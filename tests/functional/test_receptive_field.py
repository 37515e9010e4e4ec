"""Exact receptive fields, against the literature's figures and against perturbation."""

import math

import pytest
import torch
import torchvision.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.receptive_field import ReceptiveField, receptive_field

EXACT = [
    ("resnet18", "layer1", 43, 4),
    ("resnet18", "layer2", 99, 8),
    ("resnet18", "layer3", 211, 16),
    ("resnet18", "layer4", 435, 32),
    ("vgg11", "features.2", 4, 2),
    ("vgg11", "features.5", 10, 4),
    ("vgg11", "features.10", 30, 8),
    ("vgg11", "features.15", 70, 16),
    ("vgg11", "features.20", 150, 32),
    ("mobilenet_v2", "features.3", 19, 4),
    ("mobilenet_v2", "features.6", 59, 8),
    ("densenet121", "features.transition1", 63, 8),
]
SIDE = 64  # the field does not depend on it, and vgg11 at 224 takes three times as long


@pytest.mark.parametrize(("name", "layer", "size", "jump"), EXACT, ids=lambda value: str(value))
def test_field_of_known_networks_is_exact(name, layer, size, jump):
    """The figures that the papers and their layer-by-layer sums give."""
    found = receptive_field(getattr(zoo, name)(weights=None), layer, (3, SIDE, SIDE))
    assert found is not None
    assert (found.size, found.jump) == ((size, size), (jump, jump))


@pytest.mark.parametrize("layer", ["fc", "layer1.0.conv1"])
def test_field_of_linear_layer_is_whole_image_and_of_a_block_is_not(layer):
    """Behind global pooling there is nothing but the whole image."""
    found = receptive_field(zoo.resnet18(weights=None), layer, (3, SIDE, SIDE))
    assert (found is None) == (layer == "fc")


def test_squeeze_and_excitation_sees_the_whole_image():
    """The gate looks at all positions."""
    net = zoo.efficientnet_b0(weights=None)
    assert receptive_field(net, "features.0", (3, 32, 32)) == ReceptiveField((3, 3), (2, 2), (-1, -1))
    assert receptive_field(net, "features.1", (3, 32, 32)) is None


class Dynamic(nn.Module):
    """Pads as TensorFlow does: by what this very image needs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 4, 5, stride=2)

    def forward(self, x):
        for conv in (self.first, self.second):
            sides = []
            for n, k, s in zip(reversed(x.shape[2:]), reversed(conv.kernel_size), reversed(conv.stride), strict=True):
                pad = max((math.ceil(n / s) - 1) * s + k - n, 0)
                sides += [pad // 2, pad - pad // 2]
            x = F.gelu(conv(F.pad(x, sides)))
        return x


class Odd(nn.Module):
    """Branches, in-place sums, functional pooling with dilation and ceil mode, grouped and dilated convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.group = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.zeros(8, 1, 1))
        self.last = nn.Conv2d(8, 3, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.norm(self.group(x)) * (1 + self.gamma)
        y += x
        y = F.max_pool2d(torch.relu_(y), 3, 3, ceil_mode=True)
        return self.last(y).flatten(1)


class Tokens(nn.Module):
    """Channels last."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.mlp = nn.Conv2d(1, 6, 4, stride=4), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        return F.gelu(self.mlp(F.layer_norm(self.mix(self.patches(x)).permute(0, 2, 3, 1), (6,))))


def seen_by_perturbation(net, layer, shape, position):
    """First and last rows and columns at which noise changes the output of a module at this position."""
    grabbed = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *args: grabbed.append(args[2].detach()))
    net.double().eval()
    image = torch.rand(1, *shape, dtype=torch.float64)
    boxes = []
    with torch.no_grad():
        net(image)
        for axis in (0, 1):
            changed = []
            for index in range(shape[1 + axis]):
                for _ in range(3):
                    other = image.clone()
                    other.select(2 + axis, index).add_(100 * torch.randn_like(other.select(2 + axis, index)))
                    grabbed.clear()
                    net(image)
                    net(other)
                    before, after = (out[0, :, position[0], position[1]] for out in grabbed)
                    if not torch.equal(before, after):
                        changed.append(index)
                        break
            boxes.append((changed[0], changed[-1] + 1))
    handle.remove()
    return tuple(boxes)


@pytest.mark.parametrize(
    ("make", "layer", "shape", "position"),
    [
        (Odd, "last", (2, 60, 47), (3, 6)),
        (Odd, "group", (2, 60, 47), (14, 20)),
        (Dynamic, "second", (1, 45, 38), (5, 4)),
        (Tokens, "mix", (1, 32, 40), (3, 4)),
        (lambda: nn.Sequential(*list(zoo.resnet18(weights=None).children())[:5]), "4", (3, 60, 52), (7, 6)),
    ],
    ids=["odd", "dilated", "dynamic", "tokens", "resnet18"],
)
def test_field_is_what_perturbation_finds(make, layer, shape, position):
    """Changing a row inside the box changes the output, changing one outside does not."""
    torch.manual_seed(0)
    net = make()
    found = receptive_field(net, layer, shape)
    assert found is not None
    assert found.box(position) == seen_by_perturbation(net, layer, shape, position)


def test_field_of_a_unit_is_that_of_its_activation():
    """The linear layer behind a permutation is not a module with (N, C, H, W) outputs."""
    assert receptive_field(Tokens(), "mlp", (1, 32, 32)) == ReceptiveField((12, 12), (4, 4), (-4, -4))
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU())
    assert receptive_field(pooled, "0", (1, 16, 16)).size == (4, 4)


def test_dead_filters_and_zero_weights_hide_nothing():
    """A gradient of the real network would find nothing."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    for parameter in net.parameters():
        nn.init.constant_(parameter, -1.0)
    assert receptive_field(net, "2", (1, 12, 12)) == ReceptiveField((5, 5), (1, 1), (0, 0))


@given(
    layers=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=3
    )
)
@settings(max_examples=15, deadline=None)
def test_field_of_a_chain_is_the_sum_over_its_layers(layers):
    """That is, size = 1 + sum (k - 1) d * jumps before; start = - sum p * jumps before."""
    net, size, jump, start = [], 1, 1, 0
    for kernel, stride, padding, dilation in layers:
        net.append(nn.Conv1d(1, 1, kernel, stride, padding, dilation))
        size, start, jump = size + (kernel - 1) * dilation * jump, start - padding * jump, jump * stride
    found = receptive_field(nn.Sequential(*net), str(len(net) - 1), (1, 160))
    assert found == ReceptiveField((size,), (jump,), (start,))


def test_upsampling_and_odd_adaptive_pooling_have_no_one_field():
    """Neighbours see regions of different size: the whole image is shown."""
    up = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3))
    assert receptive_field(up, "2", (1, 16, 16)) is None
    uneven = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(3))
    assert receptive_field(uneven, "1", (1, 18, 18)) is None


def test_adaptive_pooling_has_the_window_of_the_real_image():
    """On a larger canvas it would have a larger one."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveMaxPool2d(6), nn.ReLU())
    assert receptive_field(net, "1", (1, 18, 18)) == ReceptiveField((5, 5), (3, 3), (-1, -1))


def test_unknown_layer_is_refused_with_a_suggestion():
    """As everywhere."""
    with pytest.raises(ArgumentError, match=r"Did you mean 'layer\d'"):
        receptive_field(zoo.resnet18(weights=None), "layerl", (3, 32, 32))
    with pytest.raises(ArgumentError, match="image_shape"):
        receptive_field(nn.Conv2d(1, 1, 1), "0", (3,))


def test_model_is_not_changed():
    """Weights, mode, hooks, generators."""
    net = Odd().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    receptive_field(net, "last", (2, 40, 40))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(generator, torch.get_rng_state())
