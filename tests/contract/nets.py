"""Tiny data and a tiny network that does what training scripts do: random numbers everywhere, logs, a diary.

Everything exists once for each of Lightning's two namespaces; `kit(namespace)` gives its classes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import random
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.diary import Diary

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
SAMPLES, BATCH, CLASSES = 24, 6, 3


class Images(Dataset):
    """8x8 images and labels; each reading adds noise from all three generators and is noted in `reads`."""

    def __init__(self, samples=SAMPLES, *, seed=0, noise=0.05, shape=(1, 8, 8), classes=CLASSES):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(samples) % classes
        self.images = torch.randn(samples, *shape, generator=generator)
        self.images += self.labels.reshape(-1, *(1 for _ in shape))
        self.noise = noise
        self.reads = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads.append(int(index))
        noise = self.noise * (torch.rand(()) + float(np.random.rand()) + random.random())
        return self.images[index] + noise, self.labels[index]


class Stream(IterableDataset):
    """The same images as a stream, endless if asked to."""

    def __init__(self, samples=SAMPLES, *, endless=False):
        self.source = Images(samples, noise=0.0)
        self.endless = endless

    def __iter__(self):
        index = 0
        while self.endless or index < len(self.source):
            yield self.source[index % len(self.source)]
            index += 1


class Listened(nn.Conv2d):
    """A convolution whose maker put a hook on it: it is not ours to remove."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_forward_hook(_halve)


def _halve(module, args, output):
    return output / 2


def body(dropout=0.25):
    """(N, 1, 8, 8) -> (N, classes): batch normalisation, in-place and plain ReLU, dropout, a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


def seed_all(seed):
    """Seeds all three generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def generators_digest():
    """A short name for the states of all generators."""
    states = [torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), str(random.getstate())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def gradients_digest(model):
    """A short name for all gradients."""
    gradients = [None if p.grad is None else p.grad.double().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(repr(gradients).encode()).hexdigest()[:16]


def sgd(parameters):
    """The plain optimizer of the tests."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@functools.cache
def kit(namespace):  # noqa: C901
    """The classes of the tests for one namespace.

    Attributes of the result: `pl`, `Net`, `Capture` (a logger), `trainer` (a function), `DataModule`.
    """
    pl = importlib.import_module(namespace)

    class Net(pl.LightningModule):
        """Keeps a diary: what the user's own code could notice at each step."""

        def __init__(self, net=None, make_optimizer=sgd):
            super().__init__()
            self.net = body() if net is None else net
            self.make_optimizer = make_optimizer
            self.diary = Diary()

        def forward(self, x):
            return self.net(x)

        def note(self, what, batch_idx, **more):
            modes = [module.training for module in self.modules()]
            graded = [parameter.grad is not None for parameter in self.parameters()]
            wanted = [parameter.requires_grad for parameter in self.parameters()]
            state = (generators_digest(), modes, graded, wanted, torch.is_grad_enabled())
            self.diary.append((what, batch_idx, *state, more))

        def loss(self, batch):
            x, y = batch
            x = x + 0.01 * torch.randn_like(x) + 0.01 * float(np.random.rand()) + 0.01 * random.random()
            return F.cross_entropy(self(x), y)

        def training_step(self, batch, batch_idx):
            self.note("train", batch_idx, labels=batch[1].tolist(), pixels=batch[0].sum().item())
            loss = self.loss(batch)
            self.log("train/loss", loss, on_step=True, on_epoch=True)
            self.log("train/noise", torch.rand(()), on_step=True, on_epoch=False)
            return loss

        def validation_step(self, batch, batch_idx):
            self.note("val", batch_idx, labels=batch[1].tolist())
            self.log("val/loss", self.loss(batch), prog_bar=True)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.note("end", batch_idx, gradients=gradients_digest(self))  # Lightning calls this after all callbacks

        def test_step(self, batch, batch_idx):
            self.log("test/loss", self.loss(batch))

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def configure_optimizers(self):
            return self.make_optimizer(self.parameters())

    class Capture(pl.loggers.logger.Logger):
        """Keeps what is logged, in memory."""

        def __init__(self):
            super().__init__()
            self.rows = []

        name = "capture"
        version = 0

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params, *args, **kwargs):
            pass

        def of_the_user(self):
            """Rows without what begins with `interp`."""
            kept = [(step, {k: v for k, v in row.items() if not k.startswith("interp")}) for step, row in self.rows]
            return [(step, row) for step, row in kept if set(row) - {"epoch"}]

        def of_interp(self):
            """Tag to its (step, value) pairs; without the cost, which is a time."""
            found = {}
            for step, row in self.rows:
                for tag, value in row.items():
                    if tag.startswith("interp") and not tag.startswith("interp.cost"):
                        found.setdefault(tag, []).append((step, float(value)))
            return found

    class DataModule(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(seed=1, shuffle=False)

    def trainer(**options):
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(**{**quiet, **options})

    return SimpleNamespace(pl=pl, Net=Net, Capture=Capture, DataModule=DataModule, trainer=trainer)


def loader(samples=SAMPLES, *, seed=0, shuffle=True, batch=BATCH, workers=0, **data):
    """A loader of `Images`; `data` are their options."""
    return DataLoader(Images(samples, seed=seed, **data), batch_size=batch, shuffle=shuffle, num_workers=workers)


# The classes of the first namespace under names of their own, so that they can be pickled.
_first = kit(NAMESPACES[0])
Net, Capture, DataModule, quiet_trainer, pl = _first.Net, _first.Capture, _first.DataModule, _first.trainer, _first.pl
for _class in (Net, Capture, DataModule):
    _class.__qualname__ = _class.__name__
