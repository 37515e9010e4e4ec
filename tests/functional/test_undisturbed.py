"""What runs inside `undisturbed` leaves no trace."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from lightning_interp.functional import attributes
from lightning_interp.functional.undisturbed import generators_kept, shapeless, tensors_to, undisturbed


class Net(nn.Module):
    """Frozen children, batch statistics, a buffer that is replaced, and a `log` as Lightning's modules have."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)
        self.logged = []
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("empty", None)

    def log(self, name, value):
        self.logged.append(name)

    def forward(self, x):
        self.seen = self.seen + 1
        self.log("x", 0.0)
        return self.drop(self.norm(self.conv(x)))


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (value.data_ptr(), id(value)) for name, value in model.named_buffers()},
        [module.training for module in model.modules()],
        [(parameter.grad, parameter.requires_grad) for parameter in model.parameters()],
        (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    )


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3]
    assert all(a[0] is b[0] and a[1] == b[1] for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(before[4][0], after[4][0])
    assert np.array_equal(before[4][1], after[4][1])
    assert before[4][2] == after[4][2]


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net()
    net.norm.eval()
    net.conv.bias.requires_grad_(False)
    net(torch.randn(2, 1, 3, 3)).sum().backward()
    net.logged.clear()
    return net


def meddle(model):
    """All that a forward and a backward of someone else's can do."""
    model.train()
    model(torch.randn(2, 1, 3, 3)).sum()
    with torch.enable_grad():
        model.zero_grad()
        model.conv.bias.requires_grad_()
        model(torch.randn(2, 1, 3, 3)).sum().backward()
    np.random.rand()
    random.random()


@pytest.mark.parametrize("training", [True, False, None])
def test_all_is_put_back(model, training):
    """Buffers in value and identity, modes per module, gradients, flags, generators; `log` is mute."""
    before = snapshot(model)
    with undisturbed(model, training=training):
        modes = [module.training for module in model.modules()]
        assert modes == (before[2] if training is None else [training] * len(modes))
        meddle(model)
    assert_same(before, snapshot(model))
    assert model.logged == []
    model.log("y", 0.0)
    assert model.logged == ["y"]


class Bookkeeper(nn.Module):
    """Has one attribute of each kind that a forward may change."""

    def __init__(self):
        super().__init__()
        self.number, self.name, self.pair = 0, "a", (1, 2)
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.row, self.queue, self.members = [[1], torch.zeros(1)], deque([1], maxlen=2), {1}
        self.table, self.counts = {"a": 1, "b": [1]}, Counter("ab")
        self.defaults, self.order = defaultdict(list), OrderedDict(a=1, b=2)
        self.generators = [torch.Generator(), np.random.RandomState(0), np.random.default_rng(0), random.Random(0)]
        with torch.inference_mode():
            self.inferred = torch.zeros(2)

    def forward(self, x):
        self.number, self.name, self.pair, self.new = self.number + 1, "b", (3,), "new"
        self.tensor += 1
        self.tensor.data.add_(1)
        self.array += 1
        self.row[0].append(2)
        self.row[1].add_(1)
        self.row.append(3)
        self.queue.extend([2, 3])
        self.members.add(2)
        self.table["b"].append(2)
        self.table["a"] = 2
        self.counts.update("bc")
        self.defaults["x"].append(1)
        self.order.move_to_end("a")
        torch.rand(1, generator=self.generators[0]), self.generators[1].rand(), self.generators[2].random()
        self.generators[3].random()
        with torch.inference_mode():
            self.inferred.add_(1)
        return x

    def books(self):
        draws = [torch.rand(3, generator=self.generators[0]).tolist(), self.generators[1].rand(3).tolist()]
        draws += [self.generators[2].random(3).tolist(), [self.generators[3].random() for _ in range(3)]]
        skipped = {"generators", "training"}
        held = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in skipped}
        return repr([held, list(self.order)]), draws


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_are_put_back(fails):
    """Counters, running values, lists in lists, generators, new attributes; also after an exception."""
    untouched, model = Bookkeeper(), nn.Sequential(Bookkeeper())
    held = {name: id(value) for name, value in vars(model[0]).items()}
    with suppress(ZeroDivisionError), undisturbed(model):
        model(torch.ones(1))
        model(torch.ones(1))
        assert model[0].books() != Bookkeeper().books()
        if fails:
            raise ZeroDivisionError
    assert {name: id(value) for name, value in vars(model[0]).items()} == held
    assert model[0].books() == untouched.books()


def test_data_that_a_module_holds_is_not_copied(monkeypatch):
    """A data set in an attribute: more values than a forward would change."""
    monkeypatch.setattr(attributes, "_LARGE", 3)
    model = Bookkeeper()
    model.small, model.large = torch.zeros(3), torch.zeros(4)
    with undisturbed(model):
        model.small += 1
        model.large += 1
    assert model.small.tolist() == [0, 0, 0]
    assert model.large.tolist() == [1, 1, 1, 1]


def test_all_is_put_back_after_an_exception(model):
    """The exception goes on its way."""
    before = snapshot(model)

    def fail():
        with undisturbed(model):
            meddle(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same(before, snapshot(model))
    assert "log" not in vars(model)


def test_log_of_the_instance_itself_comes_back(model):
    """A user may have shadowed it."""
    calls = []
    model.log = lambda *args: calls.append(args)
    with undisturbed(model):
        model(torch.randn(2, 1, 3, 3))
    assert calls == []
    model(torch.randn(2, 1, 3, 3))
    assert len(calls) == 1


def test_graph_of_a_pending_backward_survives(model):
    """A forward inside, between the user's own forward and backward, breaks nothing."""
    model.norm.train()
    output = model(torch.randn(2, 1, 3, 3)).sum()
    with undisturbed(model, training=True):
        model(torch.randn(2, 1, 3, 3))
    output.backward()
    assert model.conv.weight.grad is not None


def test_gradients_inference_and_autocast():
    """Off inside, or gradients on where asked for; as they were afterwards."""
    model = nn.Linear(2, 2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(model, gradients=True):
            output = model(torch.ones(1, 2))
            assert output.requires_grad
            assert output.dtype == torch.float32
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    with undisturbed(model):
        assert not model(torch.ones(1, 2)).requires_grad
    assert torch.is_grad_enabled()


def test_generators_are_kept_after_an_exception():
    """Torch, numpy and python."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def fail():
        with generators_kept():
            torch.rand(3), np.random.rand(3), random.random()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_nested_batches_are_copied_to_a_device():
    """Tuples, named tuples, lists and dicts; a tensor made in inference mode is fit for autograd afterwards."""
    from collections import namedtuple

    pair = namedtuple("pair", "image label")
    with torch.inference_mode():
        image = torch.ones(2)
    batch = {"a": [image, "name"], "b": pair(image, (image, 3)), "c": None}
    copied = tensors_to(batch, torch.device("cpu"))
    assert type(copied["b"]) is pair
    assert copied["a"][1] == "name"
    assert copied["b"].label[1] == 3
    assert copied["c"] is None
    inner = copied["b"].label[0]
    assert torch.equal(inner, torch.ones(2))
    assert inner.data_ptr() != image.data_ptr()
    assert not inner.is_inference()
    inner.requires_grad_().sum().backward()


def test_an_expanded_buffer_does_not_keep_the_rest_from_being_put_back():
    """It can't be written to; the statistics behind it can, and are."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    model[0].register_buffer("mean", torch.zeros(1, 2, 1, 1).expand(1, 2, 4, 4))
    before = model[1].running_mean.clone()
    with undisturbed(model, training=True):
        model(torch.randn(4, 1, 4, 4))
        assert not torch.equal(model[1].running_mean, before)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_stay_without_a_shape():
    """Batches are read inside it before the first step."""
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Sequential(nn.LazyLinear(2)), nn.Linear(2, 2))
    with undisturbed(model):
        pass
    assert shapeless(model) == ["0", "1", "2.0"]
    model(torch.zeros(2, 1, 4, 4))
    assert shapeless(model) == []
