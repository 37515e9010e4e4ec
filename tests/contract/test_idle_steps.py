"""Steps on which nothing is due: nothing on the model, and a number of calls that knows nothing of its size.

The goal in seconds is for `benchmarks/`; what makes the seconds is counted here.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import (
    ActivationSparsity,
    Alerts,
    ClassImages,
    DeadFilters,
    EmbeddingProjection,
    FilterGrid,
    Influence,
    Interp,
    OcclusionMaps,
    SaliencyMaps,
    TopPatches,
    TrainingDynamics,
)
from tests.contract.calls import calls_in
from tests.contract.hooks import hooks_on, modes_on_stack
from tests.contract.nets import pl, quiet_trainer

MAKE = {
    "DeadFilters": lambda: DeadFilters(on_error="raise"),
    "DeadFilters_train": lambda: DeadFilters(split="train", window_steps=10_000, on_error="raise"),
    "ActivationSparsity": lambda: ActivationSparsity(on_error="raise"),
    "FilterGrid": lambda: FilterGrid(on_error="raise"),
    "TrainingDynamics": lambda: TrainingDynamics(on_error="raise"),
    "SaliencyMaps": lambda: SaliencyMaps(num_samples=1, curve_steps=0, on_error="raise"),
    "OcclusionMaps": lambda: OcclusionMaps(num_samples=1, window=4, on_error="raise"),
    "ClassImages": lambda: ClassImages(steps=2, num_samples=4, on_error="raise"),
    "TopPatches": lambda: TopPatches(k=1, filters_per_layer=1, on_error="raise"),
    "EmbeddingProjection": lambda: EmbeddingProjection(max_points=9, on_error="raise"),
    "Influence": lambda: Influence(num_test=2, num_train=12, top_k=2, on_error="raise"),
    "Alerts": lambda: Alerts(on_error="raise"),
    "Interp": lambda: Interp("full", on_error="raise"),
    "standard": lambda: Interp(on_error="raise"),
}
# What follows the loss of each training image is on the head in every batch: its purpose is to miss none.
FOLLOWS_EVERY_BATCH = {"Influence", "Interp"}
BEGIN, END = 122, 137  # steps between two probes, two samples and two looks
STEPS = 140  # of the only epoch
HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Deep(pl.LightningModule):
    """Convolutions whose filters all fire, so that none has to be read again."""

    def __init__(self, depth):
        super().__init__()
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(4 if i else 1, 4, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    module.bias.fill_(0.5)
        self.seen = {}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        handles = [name for (name, place) in hooks_on(self)]
        self.seen[self.trainer.global_step] = (handles, modes_on_stack())
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


class Counter:
    """Counts the calls of Python and C functions in the hooks of a callback, by step."""

    def __init__(self, callback):
        self.calls = {}
        for name in HOOKS:
            setattr(callback, name, self._counting(getattr(callback, name), name))

    def _counting(self, hook, name):
        @functools.wraps(hook)
        def counted(trainer, *args, **kwargs):
            step = trainer.global_step - (name == "on_train_batch_end")
            self.calls[step] = self.calls.get(step, 0) + calls_in(hook, trainer, *args, **kwargs)

        return counted


def _fit(callback, depth):
    torch.manual_seed(0)
    images = torch.randn(2 * STEPS, 1, 8, 8)
    data = TensorDataset(images, torch.arange(len(images)) % 3)
    val = TensorDataset(images[:4], torch.arange(4) % 3)
    model = Deep(depth)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(model, DataLoader(data, batch_size=2), DataLoader(val, batch_size=2))
    return model


@pytest.mark.parametrize("name", MAKE)
def test_when_nothing_is_due_nothing_is_on_the_model(name):
    """No hook and no mode during the user's own step; but what follows every image is on the head, once."""
    model = _fit(MAKE[name](), 3)
    allowed = ["net.8"] if name in FOLLOWS_EVERY_BATCH else []
    for step in range(BEGIN, END):
        assert model.seen[step] == (allowed, (0, 0)), step


def test_a_window_that_is_open_is_seen():
    """The count of hooks is no empty promise: on the first step all layers are followed."""
    model = _fit(DeadFilters(split="train", on_error="raise"), 3)
    assert len(model.seen[0][0]) >= 3


@pytest.mark.parametrize("name", MAKE)
def test_when_nothing_is_due_the_calls_do_not_depend_on_the_size_of_the_model(name):
    """The same number for three layers and for nine, on each of the steps, and few."""
    counts = []
    for depth in (3, 9):
        callback = MAKE[name]()
        counter = Counter(callback)
        _fit(callback, depth)
        counts.append([counter.calls[step] for step in range(BEGIN, END)])
    assert counts[0] == counts[1]
    assert len(set(counts[0])) == 1
    assert 0 < counts[0][0] <= MOST.get(name, 100)


def test_when_nothing_is_due_no_hook_of_a_child_is_called():
    """Of `Interp`: the loss of every step is kept, and nothing else of its seven callbacks runs."""
    interp, called = Interp(on_error="raise"), []

    def noting(child, name, hook):
        @functools.wraps(hook)
        def noted(trainer, *args, **kwargs):
            step = trainer.global_step - (name == "on_train_batch_end")
            called.append((step, type(child).__name__, name))
            return hook(trainer, *args, **kwargs)

        return noted

    for child in interp.children:
        for name in HOOKS:
            setattr(child, name, noting(child, name, getattr(child, name)))
    _fit(interp, 3)
    idle = [entry for entry in called if BEGIN <= entry[0] < END]
    assert idle == []
    assert {name for step, _, name in called if step == 0} == set(HOOKS) - {"on_before_zero_grad"}


MOST = {"Influence": 250, "Interp": 300, "standard": 80}  # calls in all hooks of a step


def test_calls_are_counted():
    """Negative control: a callback that looks at each layer at each step."""

    class Walks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            [name for name, _ in pl_module.named_modules()]

    counts = []
    for depth in (3, 9):
        callback = Walks()
        counter = Counter(callback)
        _fit(callback, depth)
        counts.append(counter.calls[BEGIN])
    assert counts[0] < counts[1]
