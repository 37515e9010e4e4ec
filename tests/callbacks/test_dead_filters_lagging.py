"""Filters that are silent in eval mode alone, since the running statistics lag behind, are not dead."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.callbacks._batch_statistics import by_the_batch
from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.session import Session
from tests.callbacks.watched import Plain, Watched, check, fit, loader, scores
from tests.diary import Diary


class Lagging(Watched):
    """Running means that are far above what comes, and hardly move; filter 0 is silent by its bias, however seen."""

    def __init__(self, norm=nn.BatchNorm2d, activation=F.relu, rate=0.05, **options):
        super().__init__(4, rate)
        self.conv, self.activation = nn.Conv2d(2, 4, 3), activation
        self.norm = norm(4, momentum=0.001, affine=True, track_running_stats=True, **options)
        self.forwards = Diary()
        with torch.no_grad():
            self.norm.running_mean.fill_(100.0)
            self.norm.bias[0] = -100.0

    def features(self, x):
        x = self.activation(self.norm(self.conv(x)))
        return self.note("conv", x, zero=self.activation is F.relu).mean((2, 3))

    def forward(self, x):
        self.forwards.append(len(x))
        return super().forward(x)


class Frozen(Lagging):
    """The user keeps the normalisation in eval mode while training, so all filters are silent there too."""

    def on_train_start(self):
        self.norm.eval()


class FrozenLater(Lagging):
    """From the second epoch on."""

    def on_train_epoch_start(self):
        self.norm.train(not self.current_epoch)


class Uncallable(Lagging):
    """What it trains on is no image: `forward` can't be called with what the data set holds."""

    def forward(self, x, scale):
        return super().forward(x * scale)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], 1.0), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0], 1.0)


def _dead_after(module, *, epochs=2, **options):
    torch.manual_seed(0)
    watcher, _ = check(module, split="auto", val=loader(5, seed=1), epochs=epochs, **options)
    return watcher.dead["conv"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_filters_that_fire_in_training_are_not_dead(norm, precision):
    """Filters 1 to 3 are silent in each validation, and fire in training; filter 0 never does."""
    assert _dead_after(Lagging(norm), precision=precision) == [0]


def test_normalisation_that_is_frozen_stays_so():
    """All are silent in training too; where it is frozen later, from then on."""
    assert _dead_after(Frozen()) == [0, 1, 2, 3]
    assert _dead_after(FrozenLater(), epochs=1) == [0]
    assert _dead_after(FrozenLater(), epochs=2) == [0, 1, 2, 3]


def test_a_model_that_can_not_be_called_is_left_at_what_was_seen():
    """Without a word: all warnings are errors here."""
    watcher = DeadFilters(on_error="raise")
    fit(Uncallable(), watcher, val=loader(5, seed=1))
    assert watcher.dead["conv"] == [0, 1, 2, 3]


def test_training_goes_on_bit_for_bit():
    """Weights, running statistics and modes."""
    states = []
    for callbacks in ([], [DeadFilters(on_error="raise")]):
        torch.manual_seed(0)
        module = Lagging()
        fit(module, *callbacks, val=loader(5, seed=1))
        assert module.norm.training
        assert module.norm.track_running_stats
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


class Counted(Plain):
    """Filter 0 of each layer is dead, and nothing is normalised."""

    def __init__(self):
        super().__init__()
        self.forwards = Diary()

    def forward(self, x):
        self.forwards.append(len(x))
        return super().forward(x)


def _alive():
    module = Lagging()
    with torch.no_grad():
        module.norm.running_mean.zero_()
        module.norm.bias.fill_(1.0)
    return module


@pytest.mark.parametrize(("make", "extra"), [(lambda: Counted().rig(), 0), (_alive, 0), (Frozen, 0), (Lagging, 4)])
def test_forwards_are_added_only_where_they_can_tell_something(make, extra):
    """Two validations of five images, seen in two batches: the training has three in one."""
    counts = []
    for callbacks in ([], [DeadFilters(on_error="raise")]):
        torch.manual_seed(0)
        module = make()
        fit(module, *callbacks, val=loader(5, seed=1))
        counts.append(len(module.forwards))
    assert counts[1] - counts[0] == extra


class Dormancy(pl.Callback):
    """The share of dormant units of a validation by the formula, and what was recorded."""

    def __init__(self):
        self.notes, self.expected, self.found = [], [], []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        module.book = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):  # noqa: PLR0917
        self.notes += module.book

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.expected.append((scores(self.notes, "conv") <= 0.5).double().mean().item())
            self.found.append(Session.of(trainer).history.get("dormant_fraction", "conv").values[-1])
        self.notes = []


def test_how_strongly_they_fire_is_of_the_validation_alone():
    """Three filters that a batch would show at full strength are weak in eval mode; a fourth is constant."""
    torch.manual_seed(0)
    module, reference = Lagging(activation=torch.tanh, rate=0.0), Dormancy()
    with torch.no_grad():
        module.norm.running_mean.zero_()
        module.norm.running_var.copy_(torch.tensor([1.0, 1e4, 1e4, 1e4]))
        module.conv.weight[0] = 0.0
    watcher = DeadFilters(dormant_threshold=0.5, on_error="raise")
    fit(module, watcher, reference, val=loader(5, seed=1))
    assert watcher.dead["conv"] == [0]
    assert reference.found == reference.expected == [0.75, 0.75]


def test_synchronised_normalisation_waits_for_no_other_rank():
    """It would in training mode only."""
    norm, x = nn.SyncBatchNorm(4), torch.rand(3, 4, 5, 5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with undisturbed(norm), by_the_batch([norm]):
        assert not norm.training
        assert torch.equal(norm(x), F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))
    assert norm.training
    assert norm.track_running_stats
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
