"""Dead filters in loops of every shape: splits, windows, several forwards, manual optimisation, endless data."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.errors import InterpWarning
from tests.callbacks.watched import Plain, Watched, check, fit, images, loader, schedule


class Flicker(pl.Callback):
    """Silences another filter of the first layer after every batch, and wakes the one before."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with torch.no_grad():
            module.first.bias.fill_(2.0)
            module.first.bias[trainer.global_step % 4] = -100.0


def test_windows_of_n_steps_end_with_the_epoch_at_the_latest():
    """Seven batches an epoch in windows of three: 3, 3, 1."""
    _, windows = check(Plain(), window_steps=3, train=loader(7, batch_size=1), callbacks=[Flicker()])
    assert schedule(windows) == [("first", 0), *(("train", step) for step in (2, 5, 6, 9, 12, 13))]
    assert len({str(found) for _, _, _, found, _ in windows}) > 1


def test_windows_of_one_step():
    """The first window is full at once: the next one does not go on with its evidence."""
    _, windows = check(Plain(rate=0.0), window_steps=1, train=loader(4, batch_size=1), epochs=1, callbacks=[Flicker()])
    assert [step for _, step, _, _, _ in windows] == [0, 1, 2, 3]
    assert [found["first"] for _, _, _, found, _ in windows][1:] == [[1], [2], [3]]


def test_gradient_accumulation_counts_every_batch():
    """Seven batches, three for an update: the first window holds three, the epoch all."""
    _, windows = check(Plain(), train=loader(7, batch_size=1), accumulate_grad_batches=3, window_steps=2)
    assert schedule(windows) == [("first", 0), ("train", 1), ("train", 2), ("train", 4), ("train", 5)]


def test_auto_takes_validation_where_there_is_one():
    """And training where there is none, or it is switched off."""
    _, windows = check(Plain(), split="auto", val=loader(5, seed=1))
    assert schedule(windows) == [("first", 0), ("val", 2), ("val", 5)]
    _, windows = check(Plain(), split="auto")
    assert schedule(windows) == [("first", 0), ("train", 2), ("train", 5)]
    watcher = DeadFilters(on_error="raise")
    fit(Plain(), watcher, val=loader(), limit_val_batches=0)
    assert set(watcher.dead) == {"first", "second"}


def test_validation_that_is_missing_is_said_once():
    """Asked for validation, there is none: the training batches are watched."""
    watcher = DeadFilters(split="val", on_error="raise")
    with pytest.warns(InterpWarning, match="has no validation to watch") as said:
        fit(Plain(), watcher)
    assert len([warning for warning in said if warning.category is InterpWarning]) == 1
    assert set(watcher.dead) == {"first", "second"}


def test_each_validation_run_is_a_window():
    """Two runs in each epoch, two loaders in each run, training batches between them that do not count."""
    val = [loader(4, seed=1), loader(3, seed=2)]
    _, windows = check(
        Plain(), split="val", val=val, train=loader(8, batch_size=2), val_check_interval=0.5, callbacks=[Flicker()]
    )
    assert schedule(windows) == [("first", 0), *(("val", step) for step in (1, 3, 5, 7))]


def test_the_second_validation_loader_can_prove_life():
    """Filter 1 needs the bright images of the second loader."""
    dark, bright = images(4), images(4)
    dark[0].mul_(0.1)
    module = Plain(rate=0.0)
    with torch.no_grad():
        module.first.weight[1], module.first.bias[1] = 0.0, -0.5
        module.first.weight[1, :, 1, 1] = 0.5
    loaders = [DataLoader(list(zip(*data, strict=True)), batch_size=2) for data in (dark, bright)]
    assert 1 not in check(module, split="val", val=loaders)[0].dead["first"]
    assert 1 in check(module, split="val", val=loaders[:1])[0].dead["first"]


class Views(Plain):
    """SimCLR's way: two views of each image, each with a forward of its own; one of them alone fires filter 1."""

    def __init__(self):
        super().__init__(rate=0.0)
        with torch.no_grad():
            self.first.weight[1], self.first.bias[1] = -0.1, -0.1

    def training_step(self, batch, batch_idx):
        return F.cosine_similarity(self(batch[0]), self(-batch[0])).mean()


class Attack(Plain):
    """Eval-mode forwards with input gradients inside the training step: not the batch's own forward."""

    def __init__(self):
        super().__init__(rate=0.0)
        with torch.no_grad():
            self.first.weight[1], self.first.bias[1] = -0.1, -0.1

    def training_step(self, batch, batch_idx):
        self.eval()
        pages = list(self.book)
        attacked = (-batch[0]).requires_grad_()
        self(attacked).sum().backward()
        self.book = pages
        self.train()
        return super().training_step(batch, batch_idx)


def test_all_forwards_of_a_step_count():
    """The second view proves filter 1 alive."""
    torch.manual_seed(0)
    assert 1 not in check(Views())[0].dead["first"]


def test_forwards_in_another_mode_do_not_count():
    """An attack would prove filter 1 alive, the batch does not."""
    torch.manual_seed(0)
    assert 1 in check(Attack())[0].dead["first"]


class Frozen(Plain):
    """A backbone in eval mode without gradients, under a head that trains: its filters still count."""

    def on_train_epoch_start(self):
        self.first.requires_grad_(False).eval()


def test_frozen_backbone_counts():
    """Also from the second epoch on, when Lightning has put it into training mode and back."""
    torch.manual_seed(0)
    watcher, windows = check(Frozen().rig())
    assert all(0 in found["first"] for _, _, _, found, _ in windows)
    assert list(watcher.dead) == ["first", "second"]


class Skips(Watched):
    """Stochastic depth by control flow: a block runs in some batches only, not in the first one."""

    def __init__(self, runs):
        super().__init__(4)
        self.first, self.block = nn.Conv2d(2, 4, 1), nn.Module()
        self.block.a = nn.Conv2d(4, 4, 3, padding=1)
        self.runs, self.count = runs, -1

    def features(self, x):
        self.count += self.training
        x = self.note("first", F.relu(self.first(x)))
        if not self.runs[self.count % len(self.runs)]:
            return x.mean((2, 3))
        y = self.note("block.a", self.block.a(x), zero=False)
        return self.note("block", F.relu(x + y)).mean((2, 3))


def test_layer_that_runs_in_some_batches_only():
    """Known from the first batch on, skipped in others."""
    torch.manual_seed(0)
    watcher, _ = check(Skips([True, False, True]).rig())
    assert watcher.dead["block.a"] == [0]


def test_layer_that_is_skipped_in_the_first_batch_is_found_later():
    """By the second epoch at the latest, whose first batch is read wholly; what is said until then is right too."""
    torch.manual_seed(0)
    module = Skips([False, True, True, True]).rig()
    with torch.no_grad():
        module.block.a.bias[3] = -100.0
    watcher, _ = check(module, epochs=3)
    assert list(watcher.dead) == ["first", "block.a", "block"]
    assert watcher.dead["block.a"] == [0]


class Latent(Watched):
    """A generator: what it calls its layers with is no image, and `forward` does not exist."""

    def __init__(self):
        super().__init__(4)
        self.grow = nn.ConvTranspose2d(3, 4, 4)

    forward = None

    def training_step(self, batch, batch_idx):
        latent = torch.randn(len(batch[0]), 3, 1, 1)
        return self.note("grow", F.relu(self.grow(latent))).mean()


def test_model_whose_forward_can_not_be_called():
    """The running forward is all that is needed."""
    torch.manual_seed(0)
    assert 0 in check(Latent().rig())[0].dead["grow"]


class Manual(Plain):
    """Two optimizers, stepped by hand, with a forward for each."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.first, self.second)]


def test_manual_optimisation_with_two_optimizers():
    """A step is a batch, not an optimizer's step: the axis of `self.log`."""
    torch.manual_seed(0)
    _, windows = check(Manual().rig(), window_steps=2)
    assert schedule(windows) == [("first", 0), ("train", 1), ("train", 2), ("train", 4), ("train", 5)]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*images(), strict=True)


def test_endless_data_has_windows_too():
    """No epoch ever ends: windows of so many steps, the last one cut by `max_steps`."""
    train = DataLoader(Endless(), batch_size=2)
    _, windows = check(Plain(), train=train, max_steps=8, epochs=-1, window_steps=3, callbacks=[Flicker()])
    assert schedule(windows) == [("first", 0), ("train", 2), ("train", 5), ("train", 7)]


def test_endless_data_with_validation():
    """A validation run every three steps."""
    train = DataLoader(Endless(), batch_size=2)
    _, windows = check(Plain(), split="auto", train=train, val=loader(4), max_steps=6, epochs=-1, val_check_interval=3)
    assert schedule(windows) == [("first", 0), ("val", 2), ("val", 5)]
