"""What the tests of `Influence` share: real digits with planted wrong labels, a small network, and independent sums."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_interp import Influence
from tests.contract.nets import pl, quiet_trainer

CLASSES = 10
WIDTH = 16  # of the embedding


class Digits(Dataset):
    """Sample i is (image, label, i); a tenth of the labels is wrong if asked for."""

    def __init__(self, count=400, *, start=0, flipped=True):
        data = load_digits()
        chosen = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(1))[start : start + count]
        self.images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] / 16
        self.true = torch.tensor(data.target)[chosen].long()
        self.labels = self.true.clone()
        self.flips = list(range(3, count, 10)) if flipped else []
        flips = torch.tensor(self.flips, dtype=torch.int64)
        self.labels[flips] = (self.true[flips] + 1 + flips % 9) % CLASSES

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index], index


class Net(pl.LightningModule):
    """Notes the loss of each sample of each training batch, one by one."""

    def __init__(self, lr=5e-3, classes=CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, classes),
        )
        self.lr = lr
        self.seen = {}

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        losses = F.cross_entropy(scores.detach().double(), batch[1], reduction="none")
        for index, loss in zip(batch[2].tolist(), losses.tolist(), strict=True):
            self.seen.setdefault(index, []).append(loss)
        return F.cross_entropy(scores, batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


class Recorded(Influence):
    """Keeps what it hands to the loggers."""

    def __init__(self, **options):
        super().__init__(**({"on_error": "raise"} | options))
        self.records = []

    def write(self, trainer, records):
        records = list(records)
        self.records += records
        super().write(trainer, records)

    def newest(self, tag):
        return [record for record in self.records if record.tag == tag][-1]

    def tags(self):
        return {record.tag for record in self.records if not record.tag.startswith("interp.cost")}

    def numbers(self, quantity):
        return [(record.step, record.value) for record in self.records if record.tag == f"interp/{quantity}"]


def fit(model, train, val, *callbacks, ckpt_path=None, **options):
    """Trains on the CPU into `default_root_dir`, with TensorBoard."""
    trainer = quiet_trainer(**({"logger": True, "callbacks": list(callbacks)} | options))
    trainer.fit(model, train, val, ckpt_path=ckpt_path)
    return trainer


def loaders(train=None, **options):
    """Shuffled training digits, and others in order."""
    train = Digits() if train is None else train
    options = {"batch_size": 16, "shuffle": True} | options
    return DataLoader(train, **options), DataLoader(Digits(60, start=1000, flipped=False), batch_size=32)


def refit(features, labels, weight_decay, weights=None):
    """The optimum (C, d + 1) of a softmax head by L-BFGS and Newton steps with autograd's Hessian, in float64."""
    points = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    weights = torch.full((len(points),), 1 / len(points), dtype=torch.float64) if weights is None else weights
    classes = int(labels.max()) + 1

    def loss(flat):
        scores = points @ flat.view(classes, -1).T
        each = F.cross_entropy(scores, labels, reduction="none")
        return (weights * each).sum() + weight_decay / 2 * flat.square().sum()

    flat = torch.zeros(classes * points.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([flat], max_iter=500, history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(flat)
        value.backward()
        return value

    optimizer.step(closure)
    flat = flat.detach()
    for _ in range(3):
        flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(loss, flat), torch.func.grad(loss)(flat))
    return flat.view(classes, -1), loss


def head_losses(weight, features, labels):
    """Cross-entropy (m,) of a head (C, d + 1)."""
    scores = features.double() @ weight[:, :-1].T + weight[:, -1]
    return F.cross_entropy(scores, labels, reduction="none")
