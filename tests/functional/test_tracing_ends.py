"""Where chains end, in networks that are read in unusual ways: each test failed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.functional.tracing import ActivationTracer


class Net(nn.Module):
    """Two convolutions and a forward given as a function of them."""

    def __init__(self, body, inputs=2, filters=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, filters, 1), nn.Conv2d(filters, filters, 1)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def trace(model, count=2, *, units=None, follow=None, size=4):
    """Names and activations of the ends; the output is gone before the tracer is left, as in a training step."""
    ends = []
    tracer = ActivationTracer(model, lambda end: ends.append((end.unit, end.activation)), units=units, follow=follow)
    with tracer:
        model(torch.randn(count, 2, size, size))
    assert tracer.error is None
    return ends


@pytest.mark.parametrize("count", [1, 2])
def test_sum_with_the_input_is_a_sum_in_a_batch_of_one_too(count):
    """An image has one entry on the first axis then, as a constant of the model has."""
    ends = trace(Net(lambda net, x: F.relu(net.a(x) + x)), count)
    assert ends == [("a", None), ("sum", "relu")]


@pytest.mark.parametrize("count", [1, 2])
def test_shortcut_that_is_not_followed_ends_the_chain_in_a_batch_of_one_too(count):
    """Only the second layer is under suspicion; what it is added to was not followed."""
    net = Net(lambda net, x: F.relu(net.b(y := F.relu(net.a(x))) + y))
    units = {}
    assert trace(net, units=units) == [("a", "relu"), ("b", None), ("sum", "relu")]
    assert trace(net, count, units=units, follow={"b"}) == [("b", None), ("sum", "relu")]


@pytest.mark.parametrize("count", [1, 2])
def test_gate_that_is_not_followed_ends_the_chain_in_a_batch_of_one_too(count):
    """A gate of (1, C, 1, 1) is no constant."""
    net = Net(lambda net, x: F.relu(net.a(x) * net.b(x.mean((2, 3), keepdim=True)).sigmoid()))
    assert trace(net, count, follow={"a"}) == [("a", None)]


@pytest.mark.parametrize("count", [1, 2])
def test_buffer_is_a_constant_in_a_batch_of_one_too(count):
    """A table of positions, for instance."""
    net = Net(lambda net, x: F.relu(net.a(x) + net.table))
    net.register_buffer("table", torch.randn(1, 2, 4, 4))
    assert trace(net, count) == [("a", "relu")]


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: F.relu(net.a(x).view(len(x), 2, 1, 2, 4, 4).unflatten(1, (1, 2))).sum(1),
        lambda net, x: F.relu(net.a(x).view(len(x), 2, 2, 4, 4)),
        lambda net, x: net.a(x).mean(1),
        lambda net, x: net.a(x).unflatten(1, (2, 2)).amax(2),
    ],
)
def test_channels_that_are_mixed_or_spread_end_the_chain(body):
    """Groups, a mean over channels: the layer counts up to there, and is not lost."""
    assert trace(Net(body, filters=4)) == [("a", None)]


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores: F.cross_entropy(scores, torch.zeros(2, 4, 4, dtype=torch.long)),
        lambda scores: F.mse_loss(scores, torch.zeros(2, 2, 4, 4)),
        lambda scores: scores.mean(),
        lambda scores: -torch.mean(scores) + 1,
    ],
)
def test_last_layer_that_only_a_loss_reads_counts(loss):
    """A segmentation network, a critic: its output is gone when the forward is over."""
    assert trace(Net(lambda net, x: loss(net.b(F.relu(net.a(x)))))) == [("a", "relu"), ("b", None)]


def test_numbers_for_a_log_are_no_readers():
    """Means of what comes before the ReLU, taken on the way: the ReLU is what counts."""

    def body(net, x):
        y = net.a(x)
        net.seen = y.mean(), y.std(), (y > 0).sum(), torch.linalg.vector_norm(y)
        return F.relu(y)

    assert trace(Net(body)) == [("a", "relu")]


def test_memory_is_held_only_for_what_a_loss_reads():
    """Nothing of the forward lives on in the tracer."""
    import gc
    import weakref

    alive = []

    def body(net, x):
        y = net.a(x)
        y.mean()
        z = F.relu(y)
        alive.extend([weakref.ref(y), weakref.ref(z)])
        return z.mean()

    with torch.no_grad(), ActivationTracer(Net(body), lambda end: None) as tracer:
        tracer._model(torch.randn(2, 2, 4, 4))
        gc.collect()
        assert [reference() for reference in alive] == [None, None]


def test_layer_used_again_at_the_end_counts_there_too():
    """Its first use ends in a ReLU, the second one is the output."""
    kept = []
    ends = trace(Net(lambda net, x: kept.append(net.a(F.relu(net.a(x))))))
    assert ends == [("a", "relu"), ("a", None)]


def test_copies_that_a_hook_keeps_are_no_readers():
    """Before the ReLU, with and without `detach`."""
    net, kept = Net(lambda net, x: F.relu(net.a(x))), []
    for keep in (lambda y: y, lambda y: y.detach(), lambda y: y.clone(), lambda y: y.detach().double()):
        handle = net.a.register_forward_hook(lambda module, args, output, keep=keep: kept.append(keep(output)))
        assert trace(net) == [("a", "relu")]
        handle.remove()


def test_sum_of_activations_is_seen_whichever_layers_are_followed():
    """It comes from the layers that made the summands, not from the one that ran last."""

    def body(net, x):
        y, z = F.relu(net.a(x)), F.relu(net.a(-x))
        attention = net.b(y).mean()
        return F.relu(y - z) * attention

    net, units = Net(body), {}
    assert ("sum", "relu") in trace(net, units=units)
    assert ("sum", "relu") in trace(net, units=units, follow=set(units["sum"].layers))


@pytest.mark.parametrize("training", [True, False])
def test_patches_before_attention_count_in_both_modes(training):
    """In eval mode nothing listens inside the attention: what goes in counts as it is."""

    def body(net, x):
        return net.encoder(net.a(x).flatten(2).transpose(1, 2)).mean()

    net = Net(body, filters=4)
    net.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    net.train(training)
    with torch.no_grad():
        assert ("a", None) in trace(net)
