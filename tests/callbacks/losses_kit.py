"""Numbered samples, a small network that notes its own losses one by one, and a callback that only collects."""

from __future__ import annotations

import functools
import importlib
import math
import random
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_interp.callbacks._sample_losses import SampleLosses
from lightning_interp.callbacks._sample_order import SampleOrder
from lightning_interp.callbacks.base import InterpCallback

CLASSES = 4
CHATTER = (
    "ignore:.*does not have many workers",
    "ignore:.*lower value for log_every_n_steps",
    "ignore:.*log_every_n_steps",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:Your `val_dataloader`'s sampler has shuffling enabled",
    "ignore:You requested to overfit but enabled",
    "ignore:Found `dataloader_iter` argument",
    "ignore:You are using the `dataloader_iter` step",
    "ignore:The batch_idx argument is currently not supported",
    "ignore:.*resuming from a checkpoint that ended before the epoch",
    "ignore:This process .* is multi-threaded, use of fork",
    "ignore:You defined a `validation_step` but have no",
    "ignore:`training_step` returned `None`",
)


class Numbered(Dataset):
    """Sample i is (noise, label, i)."""

    def __init__(self, count=23):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index], torch.as_tensor(index)


def numbered(count=23, **options):
    """A shuffled loader of five at a time."""
    return DataLoader(Numbered(count), **({"batch_size": 5, "shuffle": True} | options))


class Collector(InterpCallback):
    """Collects, and compares each batch's indices with those that the batch brings along."""

    def __init__(self, head="net.2", **options):
        super().__init__(on_error="raise", **options)
        self.head = head
        self.order, self.losses = SampleOrder(), SampleLosses()
        self.pairs = []

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.order.install(trainer)
            self.losses = SampleLosses()

    def on_train_start(self, trainer, pl_module):
        self.losses.open(trainer, pl_module, self.head, self.order)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.losses.begin_batch(pl_module, batch, self.order)
        if isinstance(batch, list | tuple) and len(batch) == 3:
            found = self.order.indices(len(batch[2]))
            self.pairs.append((None if found is None else found.tolist(), batch[2].tolist()))

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.stop_listening()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.end_batch()

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.unpack(self.meet(trainer, self.losses.pack), trainer)

    def teardown(self, trainer, pl_module, stage):
        self.release()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer, pl_module, exception):
        self.release()
        super().on_exception(trainer, pl_module, exception)

    def release(self):
        self.order.remove()
        self.losses.close()

    def state_dict(self):
        return self.losses.state_dict()

    def load_state_dict(self, state_dict):
        self.losses.load_state_dict(state_dict)


@functools.cache
def kit(namespace="pytorch_lightning"):
    """`pl`, `Net` and `fit` for one namespace."""
    pl = importlib.import_module(namespace)

    class Net(pl.LightningModule):
        """Notes the loss, the margin and the winner of each sample of each batch, by brute force."""

        def __init__(self, lr=0.3):
            super().__init__()
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, CLASSES))
            self.lr = lr
            self.seen = {}

        def note(self, scores, labels, numbers):
            rows = scores.detach().double().tolist()
            for row, label, number in zip(rows, labels.tolist(), numbers.tolist(), strict=True):
                if 0 <= label < CLASSES and all(map(math.isfinite, row)):
                    rival = max((k for k in range(CLASSES) if k != label), key=row.__getitem__)
                    loss = math.log(sum(math.exp(value) for value in row)) - row[label]
                    winner = rival if row[rival] > row[label] else -1
                    self.seen.setdefault(number, []).append((loss, row[label] - row[rival], winner))

        def training_step(self, batch, batch_idx):
            images, labels, numbers = batch
            scores = self.net(images)
            self.note(scores, labels, numbers)
            return F.cross_entropy(scores, labels)

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    def fit(model, loader, *callbacks, val=None, ckpt_path=None, **options):
        quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        quiet |= {"enable_progress_bar": False, "max_epochs": 2}
        trainer = pl.Trainer(**(quiet | options), callbacks=list(callbacks))
        if isinstance(loader, pl.LightningDataModule):
            trainer.fit(model, datamodule=loader)
        else:
            trainer.fit(model, loader, val, ckpt_path=ckpt_path)
        return trainer

    return SimpleNamespace(pl=pl, Net=Net, fit=fit)


def differences(scores, seen):
    """The largest differences between what was collected and what the model noted; fails where the counts differ."""
    loss = margin = 0.0
    for index in range(len(scores.counts)):
        noted = seen.get(index, [])
        assert scores.counts[index] == len(noted), index
        winners = [winner for _, _, winner in noted if winner >= 0]
        assert scores.suggested[index] == (winners[-1] if winners else -1), index
        if not noted:
            assert math.isnan(scores.losses[index])
            assert scores.labels[index] == -1
            continue
        loss = max(loss, abs(scores.losses[index].item() - sum(n[0] for n in noted) / len(noted)))
        margin = max(margin, abs(scores.margins[index].item() - sum(n[1] for n in noted) / len(noted)))
    return loss, margin


def draws():
    """What the generators would give next; does not move them."""
    states = torch.get_rng_state(), random.getstate()
    following = torch.rand(3).tolist(), random.random()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    return following
