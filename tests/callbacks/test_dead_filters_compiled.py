"""Compiled models: the counts are over the fixed samples, exactly, and the message is said once."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import InterpWarning
from tests.callbacks.watched import fit, images, loader


class Net(pl.LightningModule):
    """A body with BatchNorm that can be compiled, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.fc = nn.Linear(4, 3)
        with torch.no_grad():
            self.body[3].bias.copy_(torch.tensor([-9.0, 0.0, 0.0, 9.0]))

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.3)


def whole(module):
    return module, torch.compile(module, backend="eager")


def child(module):
    module.body = torch.compile(module.body, backend="eager")
    return module, module


def child_in_place(module):
    module.body.compile(backend="eager")
    return module, module


def brute_force(module, pictures):
    """The formulas by hand: in eval mode over the samples at once, and normalised by the batch over two batches."""
    conv, norm, _, last, _ = getattr(module.body, "_orig_mod", module.body)
    silent = []
    with torch.no_grad():
        for some, statistics in [
            (pictures, (norm.running_mean, norm.running_var)),
            (pictures[:3], (None, None)),
            (pictures[3:], (None, None)),
        ]:
            a = F.conv2d(some, conv.weight, conv.bias)
            a = F.batch_norm(a, *statistics, norm.weight, norm.bias, training=statistics[0] is None).relu()
            b = F.conv2d(a, last.weight, last.bias).relu()
            silent.append([(values.transpose(0, 1).flatten(1) == 0).all(1) for values in (a, b)])
    return [torch.stack(layer).all(0).nonzero().flatten().tolist() for layer in zip(*silent, strict=True)]


class Reference(pl.Callback):
    """Silences a filter before each epoch's last batch, and counts at the end of each window."""

    def __init__(self, watcher, pictures, *, validation):
        self.watcher, self.pictures, self.validation = watcher, pictures, validation
        self.expected, self.found, self.steps = [], [], []

    def _close(self, trainer, module):
        self.expected.append(brute_force(module, self.pictures))
        self.found.append(list(self.watcher.dead.values()))
        layer = next(iter(self.watcher.dead))
        self.steps.append(Session.of(trainer).history.get("dead_filters", layer).steps[-1])

    def on_train_start(self, trainer, module):
        self._close(trainer, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not trainer.is_last_batch:
            return
        with torch.no_grad():
            last = next(layer for name, layer in module.named_modules() if name.endswith("3"))
            last.bias[trainer.current_epoch] = -99.0

    def on_validation_end(self, trainer, module):
        if self.validation and not trainer.sanity_checking:
            self._close(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not self.validation and trainer.is_last_batch:
            self._close(trainer, module)


@pytest.mark.parametrize("way", [whole, child, child_in_place])
@pytest.mark.parametrize("split", ["train", "val"])
def test_compiled_model_is_counted_over_the_fixed_samples(way, split):
    """Window by window, with the weights of its end; training goes on through the compiled code."""
    torch.manual_seed(0)
    module, compiled = way(Net())
    watcher = DeadFilters(split=split, on_error="raise")
    pictures, _ = images(5, seed=1)
    reference = Reference(watcher, pictures, validation=split == "val")
    with pytest.warns(InterpWarning) as said:
        fit(compiled, watcher, reference, val=loader(5, seed=1), epochs=3, num_sanity_val_steps=0)
    ours = [str(warning.message) for warning in said if warning.category is InterpWarning]
    assert len(ours) == 1
    assert "eager pass over 5 fixed samples" in ours[0]
    assert reference.found == reference.expected
    assert reference.steps == [0, 2, 5, 8]
    assert len({str(found) for found in reference.found}) > 1
    assert module.training
    assert not any(layer._forward_hooks for layer in module.modules())


def test_compiled_run_is_the_same_with_and_without():
    """Bit for bit, with batch statistics."""
    states = []
    for callbacks in ([], [DeadFilters(on_error="raise"), ActivationSparsity(on_error="raise")]):
        torch.manual_seed(0)
        module, compiled = whole(Net())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InterpWarning)
            fit(compiled, *callbacks, val=loader(5, seed=1), epochs=2)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_sparsity_says_once_that_it_can_not_watch():
    """Maps are still made."""
    _, compiled = whole(Net())
    with pytest.warns(InterpWarning, match="can't watch its batches") as said:
        fit(compiled, ActivationSparsity(on_error="raise"), epochs=2)
    assert len([warning for warning in said if warning.category is InterpWarning]) == 1
