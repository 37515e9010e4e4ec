"""Dead filters of a model over batches, and dormancy, against plain loops over full tensors."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.dead import MeanMagnitude, dead_filters, dormancy_scores
from lightning_interp.functional.layout import Layout
from lightning_interp.functional.units import End, pruned_filters


class Net(nn.Module):
    """conv, BatchNorm, ReLU, conv, ReLU, linear, ReLU, linear."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.up, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def steps(self, x):
        """Layer to activation, all of them."""
        a = F.relu(self.norm(self.a(x)))
        b = F.relu(self.b(a))
        up = F.relu(self.up(b.mean((2, 3))))
        return {"a": a, "b": b, "up": up, "head": self.head(up)}

    def forward(self, x):
        return self.steps(x)["head"]


def brute_force(model, batches):
    """Everything that the layers give, batch after batch, as one tensor."""
    with torch.no_grad():
        steps = [model.steps(batch) for batch in batches]
    whole = {name: torch.cat([step[name] for step in steps]) for name in ("a", "b", "up")}
    return {name: (values.transpose(0, 1).flatten(1) == 0).all(dim=1).tolist() for name, values in whole.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_dead_filters_equal_brute_force(seed, sizes):
    """Random weights with low biases, batches of random size."""
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.norm, model.b, model.up):
            layer.bias.sub_(0.7 * torch.rand_like(layer.bias))
    batches = [torch.randn(size, 1, 5, 5) for size in sizes]
    found = dead_filters(model, batches)
    assert {name: mask.tolist() for name, mask in found.items()} == brute_force(model, batches)


def test_nothing_of_the_model_is_changed():
    """Batch statistics, modes, gradients, generators: as before, in training mode too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).train()
    model[1].eval()
    model(torch.randn(2, 1, 5, 5)).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    dead_filters(model, [torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(1))])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(before is parameter.grad for before, parameter in zip(gradients, model.parameters(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_real_network_with_killed_filters():
    """ResNet-18: exactly those that were silenced by their BatchNorm, and the sums stay alive."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).train()
    with torch.no_grad():
        for norm, index in ((model.bn1, 5), (model.layer2[0].bn1, 17)):
            norm.weight[index], norm.bias[index] = 0.0, -1.0
        model.layer3[1].bn2.weight[3] = 0.0
    found = dead_filters(model, (torch.randn(2, 3, 32, 32) for _ in range(3)))
    silenced = {name: mask.nonzero().flatten().tolist() for name, mask in found.items() if mask.any()}
    assert silenced == {"conv1": [5], "layer2.0.conv1": [17], "layer3.1.conv2": [3]}
    assert "layer3.1" in found
    assert "fc" not in found


def test_layers_are_chosen_and_stand_in_the_order_of_the_forward():
    """Globs."""
    torch.manual_seed(0)
    model, batches = Net(), [torch.randn(2, 1, 5, 5)]
    assert list(dead_filters(model, batches)) == ["a", "b", "up"]
    assert list(dead_filters(model, batches, layers=["u*", "a"])) == ["a", "up"]


@pytest.mark.parametrize(
    ("batches", "layers", "match"),
    [
        ([], None, "`batches`.*at least one batch"),
        ([torch.ones(1, 1, 5, 5)], ["up2"], "No layer matches 'up2'.*Did you mean 'up'"),
        ([torch.ones(1, 1, 5, 5)], "up", "`layers`.*list of strings.*'up'"),
        ([torch.ones(1, 1, 5, 5)], ["head"], "No layer matches 'head'"),
    ],
)
def test_wrong_arguments(batches, layers, match):
    """No batch, and names that are no layers with filters: logits are none."""
    with pytest.raises(ArgumentError, match=match):
        dead_filters(Net(), batches, layers=layers)


def test_error_of_the_model_is_raised_and_nothing_is_left():
    """Wrong images."""
    model = Net()
    with pytest.raises(RuntimeError, match="channels"):
        dead_filters(model, [torch.ones(1, 2, 5, 5)])
    assert not any(module._forward_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


# ---------------------------------------------------------------------- dormancy


def test_scores_by_hand():
    """Sokar's equation: each over the mean of the layer."""
    assert dormancy_scores(torch.tensor([1.0, 3.0, 0.0, 4.0])).tolist() == [0.5, 1.5, 0.0, 2.0]
    assert dormancy_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_layer_has_no_scores(broken):
    """Else all its other units would look dormant beside an infinite mean."""
    assert dormancy_scores(torch.tensor([1.0, broken, 2.0])).isnan().all()


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_scores_have_mean_one_and_no_scale(magnitudes, factor):
    """Whatever unit the activations have."""
    scores = dormancy_scores(torch.tensor(magnitudes, dtype=torch.float64))
    assert scores.mean().item() == pytest.approx(1.0)
    assert torch.allclose(scores, dormancy_scores(factor * torch.tensor(magnitudes, dtype=torch.float64)))


def _end(values):
    return End("a", "gelu", values, Layout(1, 0, values.shape[1], values.shape[1]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_magnitudes_are_means_over_all_values_of_a_window(seed, sizes, in_half):
    """Batches of different size weigh by their values; the sum is exact to float32 within a row."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, 3, 2, 5, generator=generator) for size in sizes]
    batches = [batch.bfloat16() if in_half else batch for batch in batches]
    magnitude = MeanMagnitude()
    for batch in batches:
        magnitude.read(_end(batch))
    total, count = magnitude.sums()["a"]
    whole = torch.cat(batches).double().abs()
    assert total.dtype == torch.float64
    assert count == whole.shape[0] * 10
    assert torch.allclose(total / count, whole.mean(dim=(0, 2, 3)), rtol=1e-6)


def test_sums_from_before_a_resume_are_added():
    """Those of a layer that has been read since, and those of one that has not."""
    first, second, whole = MeanMagnitude(), MeanMagnitude(), MeanMagnitude()
    one, two = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    first.read(_end(one))
    second.read(_end(two))
    whole.read(_end(one))
    whole.read(_end(two))
    second.absorb(first.sums())
    assert second.sums()["a"][1] == whole.sums()["a"][1]
    assert torch.allclose(second.sums()["a"][0], whole.sums()["a"][0])
    late = MeanMagnitude()
    late.absorb(first.sums())
    late.read(_end(two))
    assert torch.allclose(late.sums()["a"][0], whole.sums()["a"][0])


def test_filters_that_were_pruned_whole_are_known_for_each_kind_of_layer():
    """By the mask alone: a filter whose weights happen to be zero was not pruned."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 6, 3), nn.Linear(5, 3))
    prune.custom_from_mask(net[0], "weight", torch.tensor([0.0, 1, 0, 1]).view(4, 1, 1, 1).expand(4, 1, 3, 3))
    prune.custom_from_mask(net[1], "weight", torch.ones(4, 6, 3, 3).index_fill(1, torch.tensor([5]), 0))
    nn.init.zeros_(net[2].weight)
    assert pruned_filters(net, "0").tolist() == [True, False, True, False]
    assert pruned_filters(net, "1").tolist() == [False] * 5 + [True]
    assert pruned_filters(net, "2") is None
    assert pruned_filters(net, "a block of a sum") is None
