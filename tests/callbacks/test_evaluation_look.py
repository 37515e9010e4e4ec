"""How far running statistics and averaged weights lag, against the same by hand, and what it takes to know."""

import copy
import random
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.callbacks.session import Session
from lightning_interp.rules import OverfittingRule, ValidationMismatchRule
from tests.diary import Diary

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

VALIDATION = 96


class Net(pl.LightningModule):
    """Learns three classes quickly; a norm whose running means hardly move from where they began, far off."""

    def __init__(self, momentum=0.001, dropout=0.5, offset=20.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, momentum=momentum)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(6, 3)
        self.norm.running_mean.fill_(offset)
        self.forwards = Diary()

    def forward(self, x):
        self.forwards.append("trained" if self.training else "evaluated")
        return self.head(self.dropout(F.relu(self.norm(self.conv(x)))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Averaged(pl.Callback):
    """Puts other weights into the model for the time of the validation: those of the start."""

    def on_fit_start(self, trainer, module):
        self.first = copy.deepcopy(list(module.parameters()))

    def _swap(self, module):
        for ours, theirs in zip(self.first, module.parameters(), strict=True):
            kept = theirs.detach().clone()
            theirs.data.copy_(ours)
            ours.data.copy_(kept)

    def on_validation_epoch_start(self, trainer, module):
        self._swap(module)

    def on_validation_epoch_end(self, trainer, module):
        self._swap(module)


class ByHand(pl.Callback):
    """The same losses from copies of the model; after `Averaged` in the list, before `Alerts` sees the batch."""

    def __init__(self, val):
        drawn = random.Random(0).sample(range(len(val)), min(64, len(val)))
        self.images, self.labels = val[drawn]
        self.rows, self.during = [], None

    def _loss(self, module, *, by_the_batch, parts=4):
        twin = copy.deepcopy(module).eval()
        twin.norm.train(by_the_batch)
        losses = []
        with torch.no_grad():
            for images, labels in zip(self.images.tensor_split(parts), self.labels.tensor_split(parts), strict=True):
                losses.append(F.cross_entropy(twin(images), labels, reduction="none"))
        return torch.cat(losses).mean().item()

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.during = self._loss(module, by_the_batch=False), self._loss(module, by_the_batch=True)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.rows.append((*self.during, self._loss(module, by_the_batch=True)))


def data(count, seed, *, noise=0.3, ordered=False):
    """Bright, dark and striped images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    labels = labels.sort().values if ordered else labels
    kinds = torch.stack((torch.ones(8, 8), -torch.ones(8, 8), torch.ones(8, 8) * torch.tensor([1.0, -1.0] * 4)))
    images = kinds[labels] + noise * torch.randn(count, 8, 8, generator=generator)
    return TensorDataset(images.unsqueeze(1), labels)


def fit(module, *callbacks, val=None, epochs=8, alerts=True, rules=None, **options):
    """Four batches of 16 an epoch; returns the callback."""
    val = data(VALIDATION, 1) if val is None else val
    watching = Alerts(rules=rules or [ValidationMismatchRule(), OverfittingRule(min_samples=1)], on_error="raise")
    settings = {"max_epochs": epochs, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=[*callbacks, *([watching] if alerts else [])], **settings | quiet | options)
    trainer.fit(module, DataLoader(data(64, 0), 16, shuffle=True), DataLoader(val, 16))
    watching.lags = _lags(trainer) if alerts else []
    return watching


def _lags(trainer):
    history = Session.of(trainer).history
    lags = zip(history.get("statistics_lag"), history.get("weights_lag"), strict=True)
    return [(point.step, point.value, other.value) for point, other in lags]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_lags_are_those_of_copies_of_the_model(averaged, ordered):
    """From the first validation that follows a high one; four steps an epoch. Dropout is off in all of them."""
    val = data(VALIDATION, 1, ordered=ordered)
    reference = ByHand(val)
    watching = fit(Net(), *([Averaged()] if averaged else []), reference, val=val)
    assert len(watching.lags) >= 5
    for step, statistics, weights in watching.lags:
        running, batch, trained = reference.rows[step // 4]
        assert statistics == pytest.approx(running - batch, abs=1e-5)
        assert weights == pytest.approx(batch - trained, abs=1e-5)
    largest = max(abs(weights) for _, _, weights in watching.lags)
    assert largest > 0.3 if averaged else largest == 0.0


def test_running_statistics_that_lag_are_told_and_are_no_overfitting():
    """A network that knows all images, by the batch."""
    watching = fit(Net(dropout=0.0), epochs=16)
    assert [(alert.rule, alert.severity) for alert in watching.active] == [("validation_mismatch", "warning")]
    assert watching.active[0].cause == "running statistics lag behind"


@pytest.mark.parametrize("change", [lambda images: images + 4, lambda images: images * 0.05 + 0.5])
def test_images_that_are_scaled_otherwise_are_no_lag(change):
    """Normalised in the training and not in the validation, for example: the statistics of the batch undo it."""
    images, labels = data(VALIDATION, 1).tensors
    module = Net(momentum=0.5, dropout=0.0, offset=0.0)
    watching = fit(module, val=TensorDataset(change(images), labels), epochs=16)
    assert [alert.rule for alert in watching.active] == ["validation_mismatch"]
    assert watching.active[0].cause == "validation images are unlike the training images"
    assert "momentum" not in watching.active[0].advice


def test_weights_that_lag_are_told_and_are_no_overfitting():
    """Statistics that keep up, but other weights in the validation."""
    watching = fit(Net(momentum=0.5, dropout=0.0, offset=0.0), Averaged(), epochs=16)
    assert [alert.rule for alert in watching.active] == ["validation_mismatch"]
    assert watching.active[0].cause == "averaged weights lag behind"


def test_what_is_learned_by_heart_is_still_overfitting():
    """The labels of the validation have nothing to do with its images: no lag explains that; asked every fifth time."""
    module, val = Net(momentum=0.5, dropout=0.0, offset=0.0), data(VALIDATION, 1)
    wrong = TensorDataset(val.tensors[0], (val.tensors[1] + 1) % 3)
    watching = fit(module, val=wrong, epochs=20)
    assert [alert.rule for alert in watching.active] == ["overfitting"]
    asked = [step for step, _, _ in watching.lags]
    assert len(asked) >= 3
    assert {later - step for step, later in pairwise(asked)} == {20}


def _healthy():
    return Net(momentum=0.5, dropout=0.0, offset=0.0), data(VALIDATION, 1)


def _lagging():
    return Net(dropout=0.0), data(VALIDATION, 1)


@pytest.mark.parametrize(("make", "asked"), [(_healthy, 0), (_lagging, 7)])
def test_forwards_are_added_only_where_the_validation_loss_is_high(make, asked):
    """None in a run in which it falls with the training loss; else five times four batches in all but the first."""
    counts = []
    for alerts in (False, True):
        module, val = make()
        fit(module, val=val, alerts=alerts, rules=[ValidationMismatchRule()])
        counts.append(module.forwards.count("evaluated"))
    assert counts[1] - counts[0] == 5 * 4 * asked


def test_training_goes_on_bit_for_bit():
    """Weights, running statistics, modes, and the generators that dropout draws from."""
    states = []
    for alerts in (False, True):
        module = Net()
        watching = fit(module, alerts=alerts)
        assert bool(watching.lags) is alerts
        assert module.norm.training
        assert module.norm.track_running_stats
        states.append((module.state_dict(), torch.get_rng_state()))
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())


class Stream(IterableDataset):
    """Can't be read by index."""

    def __iter__(self):
        yield from data(VALIDATION, 1)


class Scaled(Net):
    """Takes more than images."""

    def forward(self, x, scale):
        return super().forward(x * scale)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], 1.0), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0], 1.0), batch[1]))


class Frozen(Net):
    """The norm goes by its running statistics in training too: what is validated is what is trained."""

    def on_train_epoch_start(self):
        self.norm.eval()


@pytest.mark.parametrize(("module", "val"), [(Net, Stream()), (Scaled, None)])
def test_what_can_not_be_read_is_left_alone(module, val):
    """Without a word: all warnings are errors here."""
    assert fit(module(), val=val).lags == []


def test_frozen_statistics_do_not_lag():
    """However far they are from those of the batch."""
    lags = fit(Frozen(dropout=0.0), val=TensorDataset(data(VALIDATION, 1).tensors[0], torch.zeros(96).long())).lags
    assert lags
    assert all((statistics, weights) == (0.0, 0.0) for _, statistics, weights in lags)
