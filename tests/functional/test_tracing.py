"""Where a filter's output becomes an activation, on networks of every kind."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lightning_interp.functional.hooks import QuietHook
from lightning_interp.functional.tracing import ActivationTracer
from lightning_interp.functional.undisturbed import undisturbed
from lightning_interp.functional.units import End, Unit


def trace(model, *inputs):
    """Units and ends of one forward, the tensors cloned."""
    ends = []
    with ActivationTracer(model, lambda end: ends.append(end._replace(tensor=end.tensor.clone()))) as tracer:
        output = model(*inputs)
    assert tracer.error is None
    return tracer.units, ends, output


class Spelled(nn.Module):
    """conv, (BatchNorm), (pooling), (dropout), and an activation in a given spelling."""

    def __init__(self, activation, between=()):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.between = nn.Sequential(*between)
        self.activation = activation

    def forward(self, x):
        return self.activation(self.between(self.conv(x)))


SPELLINGS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_relu_in_every_spelling_is_one_activation(spelling):
    """The activation is the output of the ReLU, whatever it is called."""
    units, ends, output = trace(Spelled(SPELLINGS[spelling]), torch.randn(2, 2, 6, 6))
    assert units == {"conv": Unit("conv", "conv", 4, {"relu"}, frozenset({"conv"}))}
    (end,) = ends
    assert torch.equal(end.tensor, output)
    assert end.layout.channels_first(end.tensor).shape == (2, 4, 16)


@pytest.mark.parametrize(
    ("between", "activation", "expected"),
    [
        ([nn.BatchNorm2d(4)], F.relu, "relu"),
        ([nn.GroupNorm(2, 4)], F.silu, "silu"),
        ([nn.InstanceNorm2d(4)], F.leaky_relu, "leaky_relu"),
        ([nn.MaxPool2d(2)], nn.ReLU(), "relu"),
        ([nn.AvgPool2d(2), nn.Dropout(0.5)], F.gelu, "gelu"),
        ([nn.Dropout2d(0.5)], nn.ReLU6(), "relu6"),
        ([nn.ZeroPad2d(1), nn.Upsample(scale_factor=2)], nn.Hardswish(), "hardswish"),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], nn.PReLU(), "prelu"),
        ([nn.Flatten(), nn.Unflatten(1, (4, 16))], nn.ELU(), "elu"),
        ([], nn.Hardtanh(0.0, 6.0), "relu6"),
        ([], nn.Hardtanh(), "hardtanh"),
        ([], nn.Mish(), "mish"),
        ([], nn.Sigmoid(), "sigmoid"),
    ],
)
def test_what_follows_the_filter_alone_is_passed_through(between, activation, expected):
    """Normalisation, pooling, dropout, padding, resizing and flattening come before the activation."""
    units, ends, output = trace(Spelled(activation, between), torch.randn(3, 2, 6, 6))
    assert units["conv"].activations == {expected}
    (end,) = ends
    assert end.layout.channels_first(end.tensor).shape[1] == 4
    assert torch.equal(end.tensor, output)


def test_flattened_channels_are_found_again():
    """After flatten each channel is a run of positions; the layout gives the same values back."""
    model = Spelled(F.relu, [nn.Flatten()])
    x = torch.randn(2, 2, 5, 5)
    _, (end,), _ = trace(model, x)
    expected = F.relu(model.conv(x)).flatten(2)
    assert torch.equal(end.layout.channels_first(end.tensor).transpose(0, 1).reshape(4, -1).sort().values,
                       expected.transpose(0, 1).reshape(4, -1).sort().values)  # fmt: skip


def test_permuted_channels_are_found_again():
    """Channels last: the axis is found, not assumed."""

    def channels_last(x):
        return F.gelu(F.layer_norm(x.permute(0, 2, 3, 1), (4,)))

    model = Spelled(channels_last)
    x = torch.randn(2, 2, 6, 6)
    _, (end,), output = trace(model, x)
    assert end.layout.axis == 3
    assert torch.equal(end.layout.channels_first(end.tensor)[:, 1, 0], output[..., 1].flatten())


def test_shared_module_gives_one_end_per_layer():
    """One ReLU module behind two layers is told apart by what it was given."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.second(self.relu(self.first(x))))

    _, ends, _ = trace(Shared(), torch.randn(2, 1, 4, 4))
    assert [(end.unit, end.activation, end.layout.size) for end in ends] == [
        ("first", "relu", 2),
        ("second", "relu", 3),
    ]


def test_residual_sum_is_a_unit_of_its_own():
    """The layer counts up to the sum; the ReLU after it is reported under the name of the block."""
    block = torchvision.models.resnet.BasicBlock(4, 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), block)
    x = torch.randn(2, 3, 8, 8)
    units, ends, output = trace(model, x)
    by_unit = {end.unit: end for end in ends}
    assert list(by_unit) == ["0", "2.conv1", "2.conv2", "2"]
    assert (units["2"].kind, units["2"].activations) == ("sum", {"relu"})
    assert by_unit["2.conv2"].activation is None
    assert torch.equal(by_unit["2"].tensor, output)


def test_sum_with_the_input_image_counts_as_a_sum():
    """A residual connection from something that no filter made is one all the same."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return F.relu(self.conv(x) + x)

    units, ends, _ = trace(Net(), torch.randn(2, 2, 4, 4))
    assert [(end.unit, end.activation) for end in ends] == [("conv", None), ("sum", "relu")]
    assert units["sum"].kind == "sum"


def test_bias_and_scale_are_no_sum():
    """Adding or multiplying by a parameter or a number leaves the output the filter's own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(1, 2, 1), nn.Parameter(torch.zeros(2, 1, 1))

        def forward(self, x):
            return F.relu(2.0 * self.conv(x) / 3 + self.shift - 1)

    units, _, _ = trace(Net(), torch.randn(2, 1, 4, 4))
    assert list(units) == ["conv"]
    assert units["conv"].activations == {"relu"}


def test_gating_ends_the_chain():
    """A product with another activation is not the filter's alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return F.relu(self.conv(x) * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    units, _, _ = trace(Net(), torch.randn(2, 1, 4, 4))
    assert units["conv"].activations == set()
    assert units["gate"].activations == {"sigmoid"}


def test_several_readers_are_branches_in_slices_of_a_concatenation():
    """DenseNet: later layers read an earlier one through concatenation, BatchNorm and ReLU."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)
            self.norm1, self.norm2 = nn.BatchNorm2d(2), nn.BatchNorm2d(5)
            self.c = nn.Conv2d(5, 1, 1)

        def forward(self, x):
            first = self.a(x)
            second = self.b(F.relu(self.norm1(first)))
            return self.c(F.relu(self.norm2(torch.cat([first, second], 1))))

    _, ends, _ = trace(Dense(), torch.randn(2, 1, 4, 4))
    branches = [(end.unit, end.activation, end.layout.start, end.layout.width) for end in ends]
    assert branches == [("a", "relu", 0, 2), ("a", "relu", 0, 5), ("b", "relu", 2, 5), ("c", None, 0, 1)]


def test_linear_layer_counts_only_with_a_non_linearity():
    """Logits are no filters."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    units, _, _ = trace(model, torch.randn(5, 4))
    assert {name: unit.counts for name, unit in units.items()} == {"0": True, "2": False}


def test_layer_used_twice_has_one_unit_and_two_ends():
    """Weight sharing: both uses count."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return F.relu(self.conv(F.relu(self.conv(x))))

    units, ends, _ = trace(Twice(), torch.randn(2, 2, 4, 4))
    assert list(units) == ["conv"]
    assert len(ends) == 2


# Layers with filters by hand from the papers' tables and torchvision's source: convolutions, linear layers with a
# non-linearity behind them, residual sums with a ReLU behind them.
NETWORKS = {
    "resnet18": (20, 0, 8),
    "vgg11_bn": (8, 2, 0),
    "mobilenet_v3_small": (52, 1, 0),
    "convnext_tiny": (22, 18, 0),
    "efficientnet_b0": (81, 0, 0),
    "densenet121": (120, 0, 0),
    "googlenet": (57, 0, 0),
    "shufflenet_v2_x0_5": (56, 0, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_are_read_wholly(name):
    """Every convolution is found, and so is each sum that a ReLU follows."""
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    with torch.no_grad():
        units, ends, _ = trace(model, torch.randn(1, 3, 64, 64))
    counting = [unit for unit in units.values() if unit.counts]
    kinds = tuple(sum(unit.kind == kind for unit in counting) for kind in ("conv", "linear", "sum"))
    assert kinds == NETWORKS[name]
    convolutions = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [unit.name for unit in counting if unit.kind == "conv"] == convolutions or name == "densenet121"
    assert {end.unit for end in ends} >= {unit.name for unit in counting}
    assert all(end.layout.size == units[end.unit].num_filters for end in ends)


def test_nothing_stays_on_the_model():
    """No hook is left, also after an exception, and the forward is bit for bit the same."""
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    _, _, traced = trace(model, x)
    assert torch.equal(plain, traced)

    def fail(end):
        raise ZeroDivisionError

    with ActivationTracer(model, fail) as tracer:
        assert torch.equal(plain, model(x))
    assert isinstance(tracer.error, ZeroDivisionError)
    with pytest.raises(RuntimeError), ActivationTracer(model, fail):
        model(torch.randn(2, 1, 32, 32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_copies_made_while_tracing_carry_no_live_hook():
    """Deepcopy and pickle inside a training step give models that work and know nothing of the tracer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    ends: list[End] = []
    with ActivationTracer(model, ends.append):
        twin = copy.deepcopy(model)
        stored = pickle.dumps(model)
    assert b"lightning_interp.functional" not in stored
    for other in (twin, pickle.loads(stored)):
        ends.clear()
        other(torch.ones(1, 1, 2, 2))
        assert not ends


def test_calls_in_another_mode_or_inside_backward_are_not_counted():
    """Adversarial forwards in eval mode and recomputation by checkpointing are not this batch's own forward."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    ends: list[End] = []
    x = torch.randn(2, 1, 3, 3)
    with ActivationTracer(model, ends.append):
        model.eval()
        model(x)
        model.train()
        assert not ends
        loss = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False).sum()
        before = len(ends)
        loss.backward()
    assert before == len(ends) == 1


def test_attention_in_eval_mode_keeps_its_fast_path():
    """Listening would make it take another path, which rounds differently."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = layer(x)
        with ActivationTracer(layer, lambda end: None):
            traced = layer(x)
    assert torch.equal(plain, traced)
    assert torch._C._len_torch_function_stack() == 0


def test_inert_hook_is_a_builtin():
    """What a copy carries instead of a hook does nothing and needs no package."""
    hook = copy.deepcopy(QuietHook(print))
    assert hook.func is sys.audit
    assert hook(nn.ReLU(), (torch.ones(1),), torch.ones(1)) is None


@pytest.mark.parametrize("keep", [lambda t: t.detach().clone(), lambda t: t.clone(), lambda t: t.std()])
def test_a_copy_for_a_log_is_no_reader(keep):
    """Somebody's hook that keeps or measures the pre-activation must not make a dead filter look alive."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    kept = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(keep(output)))
    _, ends, _ = trace(model, torch.randn(2, 1, 3, 3))
    assert [(end.unit, end.activation) for end in ends] == [("0", "relu")]


def test_attention_does_not_silence_the_rest():
    """Behind an attention block in eval mode the layers outside are followed again."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return F.relu(self.head(self.encoder(F.relu(self.stem(x)))))

    model = Net().eval()
    with torch.no_grad():
        _, ends, _ = trace(model, torch.randn(2, 5, 4))
    assert [(end.unit, end.activation) for end in ends] == [("stem", "relu"), ("head", "relu")]
    assert torch._C._len_torch_function_stack() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_attention_fast_path_finds_no_hook_inside(monkeypatch):
    """It is taken as if nobody listened: the same kernel is called."""
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        trace(layer, torch.randn(2, 5, 16))
    assert calls == [1]


def test_forwards_of_other_callbacks_are_not_counted():
    """A callback that runs the model undisturbed while a reader is open is not taken for the user."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    ends: list[End] = []
    with ActivationTracer(model, ends.append):
        with undisturbed(model, training=None):
            model(torch.randn(2, 1, 3, 3))
        assert not ends
        model(torch.randn(2, 1, 3, 3))
    assert len(ends) == 1
