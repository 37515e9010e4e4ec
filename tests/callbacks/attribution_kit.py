"""What the tests of `SaliencyMaps` and `OcclusionMaps` share: a deterministic network, data, a logger with pictures."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.contract.nets import Capture, pl, quiet_trainer

CLASSES = 3


def images(count=12, size=(8, 10), *, seed=0):
    """Each class has a bright quarter of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 0.3 * torch.randn(count, 1, *size, generator=generator)
    for index, label in enumerate(labels):
        top, left = int(label) // 2 * (size[0] // 2), int(label) % 2 * (size[1] // 2)
        pixels[index, 0, top : top + size[0] // 2, left : left + size[1] // 2] += 1.0
    return pixels, labels


def loader(count=12, *, seed=0, batch=4):
    """In a fixed order."""
    return DataLoader(TensorDataset(*images(count, seed=seed)), batch_size=batch)


class Masked(Dataset):
    """Dict samples with the mask of the object, or its box."""

    def __init__(self, key):
        self.pixels, self.labels = images()
        self.key = key

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label = int(self.labels[index])
        mask = torch.zeros(8, 10, dtype=torch.bool)
        top, left = label // 2 * 4, label % 2 * 5
        mask[top : top + 4, left : left + 5] = True
        place = mask if self.key == "mask" else torch.tensor([left, top, left + 5, top + 4])
        return {"image": self.pixels[index], "label": label, self.key: place}


class Lit(pl.LightningModule):
    """Without random numbers: the same steps after a resume."""

    def __init__(self, activation=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True) if activation is None else activation,
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU() if activation is None else activation,
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(120, CLASSES),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            batch = batch["image"], batch["label"]
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", Lit.training_step(self, batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Gallery(Capture):
    """Keeps pictures too."""

    def __init__(self):
        super().__init__()
        self.pictures = {}

    def log_image(self, key, images, step=None):
        self.pictures.setdefault(key, []).append((step, images[0].copy()))


def fit(callbacks, *, model=None, train=None, val=None, ckpt_path=None, **options):
    """Trains, and returns what was logged, the model and the trainer."""
    gallery = Gallery()
    model = Lit() if model is None else model
    trainer = quiet_trainer(**{"callbacks": callbacks, "logger": gallery, "num_sanity_val_steps": 0, **options})
    trainer.fit(
        model, loader() if train is None else train, loader(seed=1) if val is None else val, ckpt_path=ckpt_path
    )
    return gallery, model, trainer
