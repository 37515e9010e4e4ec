"""Dead filters while training, against a brute-force count over every window."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.errors import ArgumentError
from tests.callbacks.watched import Plain, Watched, check, fit, images, loader, schedule


class Chain(Watched):
    """conv, things between, activation; twice."""

    def __init__(self, activation=F.relu, between=(nn.Identity, nn.Identity), zero=True, **options):
        super().__init__(5)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1, **options), nn.Conv2d(4, 5, 1, **options)
        self.between_a, self.between_b = between[0](), between[1]()
        self.activation, self.zero = activation, zero

    def features(self, x):
        x = self.note("a", self.activation(self.between_a(self.a(x))), zero=self.zero)
        return self.note("b", self.activation(self.between_b(self.b(x))), zero=self.zero).mean((2, 3))


class Residual(Watched):
    """ResNet's block: the map up to the sum, and the ReLU after the sum."""

    def __init__(self):
        super().__init__(4)
        self.stem, self.block = nn.Conv2d(2, 4, 1), nn.Module()
        self.block.a, self.block.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.block.norm = nn.BatchNorm2d(4)

    def features(self, x):
        x = self.note("stem", F.relu(self.stem(x)))
        y = self.note("block.a", F.relu(self.block.a(x)))
        y = self.note("block.b", self.block.norm(self.block.b(y)), zero=False)
        return self.note("block", F.relu(y + x)).mean((2, 3))


class Dense(Watched):
    """DenseNet's several readers: a filter is dead if all its branches are."""

    def __init__(self):
        super().__init__(3)
        self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(5, 3, 1)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(2), nn.BatchNorm2d(5)

    def features(self, x):
        a = self.a(x)
        b = self.b(self.note("a", F.relu(self.norm_1(a))))
        both = F.relu(self.norm_2(torch.cat([a, b], dim=1)))
        self.note("a", both[:, :2].clone())
        self.note("b", both[:, 2:].clone())
        return self.note("c", F.relu(self.c(both))).mean((2, 3))


class ConvNeXt(Watched):
    """Depthwise convolution, LayerNorm with channels last, two linear layers with GELU between."""

    def __init__(self):
        super().__init__(4)
        self.stem, self.depth = nn.Conv2d(2, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def features(self, x):
        x = self.note("stem", self.stem(x), zero=False)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        self.note("depth", y, axis=3, zero=False)
        y = self.note("up", F.gelu(self.up(y)), axis=3, zero=False)
        return (self.scale * self.down(y).permute(0, 3, 1, 2) + x).mean((2, 3))


class Bare(Watched):
    """No activation at all: the pooling still belongs to the last convolution."""

    def __init__(self):
        super().__init__(4)
        self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)

    def features(self, x):
        return self.note("b", self.b(self.note("a", self.a(x), zero=False)).mean((2, 3)), zero=False)


class Twice(Watched):
    """One layer used twice in a forward: either use is life."""

    def __init__(self):
        super().__init__(2)
        self.conv = nn.Conv2d(2, 2, 1)

    def features(self, x):
        x = self.note("conv", F.relu(self.conv(x)))
        return self.note("conv", F.relu(self.conv(1 - x))).mean((2, 3))


class Gated(Watched):
    """Squeeze and excitation: a product with another activation ends the chain."""

    def __init__(self):
        super().__init__(4)
        self.conv, self.squeeze, self.excite = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def features(self, x):
        x = self.note("conv", F.relu(self.conv(x)))
        y = self.note("squeeze", F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        y = self.note("excite", torch.sigmoid(self.excite(y)), zero=False)
        return self.note("last", F.relu(self.last(x * y))).mean((2, 3))


class Other(Watched):
    """Any two layers with filters and ReLU behind them, flattened before the last activation."""

    def __init__(self, first, second, shape):
        super().__init__(4)
        self.first, self.second, self.shape = first, second, shape

    def features(self, x):
        x = self.note("first", F.relu(self.first(x.reshape(-1, *self.shape))))
        y = self.second(x)
        flat = F.relu(y.flatten(1))
        self.note("second", flat.unflatten(1, y.shape[1:]))
        return flat.unflatten(1, (4, -1)).mean(2)


class Mlp(Watched):
    """Linear units with ReLU count as filters; the one before the head is a GELU over tokens (N, L, C)."""

    def __init__(self):
        super().__init__(4)
        self.up, self.token = nn.Linear(64, 6), nn.Linear(6, 4)

    def features(self, x):
        x = self.note("up", F.relu(self.up(x.flatten(2))), axis=2)
        return self.note("token", F.gelu(self.token(x)), axis=2, zero=False).mean(1)


def _norms(kind):
    return tuple(lambda width=width: kind(width) for width in (4, 5))


KINDS = {
    "nn.ReLU": lambda: Chain(nn.ReLU()),
    "in place, one shared module": lambda: Chain(nn.ReLU(inplace=True)),
    "functional": lambda: Chain(F.relu),
    "functional in place": lambda: Chain(torch.relu_),
    "no bias": lambda: Chain(F.relu, bias=False),
    "BatchNorm": lambda: Chain(nn.ReLU(), _norms(nn.BatchNorm2d)),
    "GroupNorm": lambda: Chain(nn.ReLU(), _norms(lambda width: nn.GroupNorm(1, width))),
    "InstanceNorm": lambda: Chain(nn.ReLU(), _norms(nn.InstanceNorm2d)),
    "pooling": lambda: Chain(nn.ReLU(), (lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2))),
    "dropout": lambda: Chain(nn.ReLU(), (lambda: nn.Dropout(0.5), lambda: nn.Dropout2d(0.5))),
    "padding and resizing": lambda: Chain(nn.ReLU(), (lambda: nn.ZeroPad2d(1), lambda: nn.Upsample(scale_factor=2))),
    "ReLU6": lambda: Chain(nn.ReLU6(inplace=True)),
    "clamp": lambda: Chain(lambda x: x.clamp(min=0)),
    "Hardswish": lambda: Chain(nn.Hardswish()),
    "LeakyReLU": lambda: Chain(nn.LeakyReLU(), zero=False),
    "GELU": lambda: Chain(nn.GELU(), zero=False),
    "SiLU": lambda: Chain(nn.SiLU(inplace=True), zero=False),
    "tanh": lambda: Chain(torch.tanh, zero=False),
    "residual": Residual,
    "several readers": Dense,
    "ConvNeXt": ConvNeXt,
    "no activation": Bare,
    "used twice": Twice,
    "gated": Gated,
    "1d": lambda: Other(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=2), (2, 64)),
    "3d": lambda: Other(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 1), (2, 4, 4, 4)),
    "transposed": lambda: Other(nn.ConvTranspose2d(2, 4, 2), nn.ConvTranspose2d(4, 4, 2), (2, 8, 8)),
    "linear": Mlp,
}


@pytest.mark.parametrize("kind", KINDS)
def test_dead_filters_equal_brute_force_for_every_kind_of_network(kind):
    """First window, two training epochs; then two validation runs; the last batch holds one image."""
    torch.manual_seed(0)
    _, windows = check(KINDS[kind]().rig(), split="train")
    assert schedule(windows) == [("first", 0), ("train", 2), ("train", 5)]
    assert any(windows[0][2].values())
    torch.manual_seed(0)
    _, windows = check(KINDS[kind]().rig(), split="val", val=loader(5, seed=1))
    assert schedule(windows) == [("first", 0), ("val", 2), ("val", 5)]


def _edge_images(count=8):
    """The second channel is black but for one pixel of the last image."""
    pictures, labels = images(count)
    pictures[:, 1] = 0.0
    pictures[-1, 1, 7, 7] = 1.0
    return DataLoader(TensorDataset(pictures, labels), batch_size=3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_filter_that_fires_in_one_pixel_of_the_last_batch_is_alive(split):
    """Filter 1 sees that pixel and nothing else; filter 2 would need one a little brighter."""
    module = Plain(rate=0.0)
    with torch.no_grad():
        module.first.weight[1:3] = 0.0
        module.first.weight[1:3, 1, 1, 1] = 1.0
        module.first.bias[1], module.first.bias[2] = -0.999, -1.0
    _, windows = check(module, split=split, train=_edge_images(), val=_edge_images(), epochs=1)
    by_kind = {kind: found["first"] for kind, _, _, found, _ in windows}
    assert {1, 2} <= set(by_kind["first"])
    assert 1 not in by_kind[split]
    assert 2 in by_kind[split]


def test_nan_is_life():
    """A filter that gives NaN is broken, not dead; after the first update all of them do."""
    module = Plain()
    with torch.no_grad():
        module.second.bias[2] = float("nan")
        module.second.bias[3] = -100.0
    _, windows = check(module)
    (*_, first, _), *_, (*_, last, _) = windows
    assert 3 in first["second"]
    assert 2 not in first["second"]
    assert last == {"first": [], "second": []}


@pytest.mark.parametrize("net", [Plain, lambda: Chain(nn.GELU(), zero=False), Mlp])
def test_batches_of_one(net):
    """One image a batch; where nothing is exactly zero a filter must vary within it."""
    torch.manual_seed(0)
    check(net().rig(), train=loader(3, batch_size=1))


def test_a_single_value_can_not_tell_constant_from_dead():
    """A linear unit with GELU and one image: no evidence, so nothing is said of the layer."""

    class Head(Watched):
        def __init__(self):
            super().__init__(4)
            self.up = nn.Linear(128, 4)

        def features(self, x):
            return self.note("up", F.gelu(self.up(x.flatten(1))), zero=False)

    watcher, _ = check(Head(), train=loader(3, batch_size=1))
    assert watcher.dead == {}
    watcher, _ = check(Head(), train=loader(4, batch_size=3))
    assert watcher.dead == {"up": []}


def test_channels_last_memory_format():
    """The strides differ, the channels don't."""

    class Strided(Chain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0].to(memory_format=torch.channels_last), batch[1]]

    torch.manual_seed(0)
    module = Strided(nn.ReLU(inplace=True)).rig().to(memory_format=torch.channels_last)
    watcher, _ = check(module)
    assert 0 in watcher.dead["a"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    """The activations are read in the type in which the model makes them."""
    torch.manual_seed(0)
    watcher, _ = check(Chain(nn.ReLU(), _norms(nn.BatchNorm2d)).rig(), precision=precision)
    assert 0 in watcher.dead["a"]


def test_only_chosen_layers_are_reported():
    """Globs, in the order of the forward; what the pattern leaves out is not in any result."""
    watcher = DeadFilters(layers=["s*"], on_error="raise")
    fit(Plain().rig(), watcher)
    assert list(watcher.dead) == ["second"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": "test"}, "`split`.*'auto', 'train', 'val'.*'test'"),
        ({"window_steps": 0}, "`window_steps`.*positive integer.*0"),
        ({"window_steps": 2.0}, "`window_steps`.*positive integer.*2.0"),
        ({"dormant_threshold": -0.1}, "`dormant_threshold`.*-0.1"),
        ({"dormant_threshold": "low"}, "`dormant_threshold`.*'low'"),
        ({"layers": "conv1"}, "`layers`.*list of strings.*'conv1'"),
        ({"max_layers": 0}, "`max_layers`.*positive integer.*0"),
        ({"name": "a/b"}, "`name`.*slash.*'a/b'"),
        ({"on_error": "ignore"}, "`on_error`.*'ignore'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, match):
    """Each message names the argument, what was expected and what came."""
    with pytest.raises(ArgumentError, match=match):
        DeadFilters(**options)


def test_unknown_layer_is_refused_before_training():
    """With a suggestion."""
    with pytest.raises(ArgumentError, match=r"No layer matches 'frst'.*Did you mean 'first'"):
        fit(Plain(), DeadFilters(layers=["frst"]))
