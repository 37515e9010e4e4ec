"""Small data, small networks and a watcher for the tests of `TrainingDynamics`."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks.session import Session
from lightning_interp.callbacks.training_dynamics import TrainingDynamics

CHATTER = (
    "ignore:.*does not have many workers",
    "ignore:.*log_every_n_steps",
    "ignore:`training_step` returned `None`",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:.*resuming from a checkpoint that ended before the epoch",
    "ignore:Checkpoint directory",
)
BATCH, CLASSES = 8, 4


def loader(batches=6, *, shuffle=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(batches * BATCH) % CLASSES
    images = torch.randn(len(labels), 2, 6, 5, generator=generator) + labels[:, None, None, None]
    return DataLoader(TensorDataset(images.to(dtype), labels), batch_size=BATCH, shuffle=shuffle)


def body():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def tame(parameters):
    """Steps that mostly go downhill."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.5)


class Net(pl.LightningModule):
    """A small CNN; subclasses and arguments change one thing each."""

    def __init__(self, net=None, optimizer=None):
        super().__init__()
        self.net = body() if net is None else net
        self.make_optimizer = optimizer or sgd

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Watcher(pl.Callback):
    """Brute force: keeps the weights around each batch, and the history at the end."""

    def __init__(self):
        self.before, self.after, self.batches, self.losses = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(copy.deepcopy(pl_module.state_dict()))
        self.batches.append(copy.deepcopy(batch))
        self.losses.append(outputs["loss"].item() if outputs else math.nan)

    def on_train_end(self, trainer, pl_module):
        if any(isinstance(callback, TrainingDynamics) for callback in trainer.callbacks):
            self.history = Session.of(trainer).history


class Memory(pl.loggers.logger.Logger):
    """Keeps what is logged."""

    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows += [(tag, step, float(value)) for tag, value in metrics.items()]

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def points(self, tag):
        return [(step, value) for name, step, value in self.rows if name == tag]


def fit(model, dynamics, data=None, *, others=(), fit_options=None, **options):
    defaults = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False}
    watcher = Watcher()
    callbacks = [*([dynamics] if dynamics is not None else []), watcher, *others]
    trainer = pl.Trainer(**(defaults | options), callbacks=callbacks)
    trainer.fit(model, data or loader(), **(fit_options or {}))
    return watcher


def strict(**options):
    return TrainingDynamics(on_error="raise", **options)


def nothing_left(model):
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    taps = [p for p in model.parameters() if p._backward_hooks]
    return hooks == [] and taps == [] and torch._C._len_torch_function_stack() == 0


class Noisy(Net):
    """A forward that draws from all three generators, in train mode, with buffers."""

    def forward(self, x):
        noise = torch.rand_like(x) + float(np.random.rand()) + random.random()
        return self.net(x + noise)


class Plain(Net):
    """Without randomness, in double precision: brute force can repeat it."""

    def __init__(self, optimizer=None):
        layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)]
        super().__init__(nn.Sequential(*layers), optimizer or tame)


class MixUp(Plain):
    """Two targets, mixed; returned in a dict."""

    def loss(self, batch):
        scores = self.net(batch[0])
        return 0.7 * F.cross_entropy(scores, batch[1]) + 0.3 * F.cross_entropy(scores, batch[1].flip(0))

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "extra": 1}


class Binary(Plain):
    """One score, squeezed."""

    def loss(self, batch):
        score = self(batch[0])[:, :1].squeeze(1)
        return F.binary_cross_entropy_with_logits(score, (batch[1] > 1).to(score.dtype))


class Checkpointed(Plain):
    """The forward runs again inside backward."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


class TwoOptimizers(Net):
    """Two networks with an optimizer each, toggled; one of them steps every other batch only."""

    turns = False

    def __init__(self):
        super().__init__(nn.ModuleDict({"a": body(), "b": body()}))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for index, (name, optimizer) in enumerate(zip("ab", self.optimizers(), strict=True)):
            if self.turns and batch_idx % 2 != index:
                continue
            self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self.net[name](batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net["a"].parameters(), lr=0.1),
            torch.optim.Adam(self.net["b"].parameters(), lr=0.3),
        ]


class Manual(Plain):
    """Manual optimisation, one loss."""

    returns = True

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        return loss if self.returns else None
