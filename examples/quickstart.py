"""The shortest way in: your own LightningModule, your own data, and one more callback.

python examples/quickstart.py
tensorboard --logdir lightning_logs
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_interp import Interp


class DigitsClassifier(pl.LightningModule):
    """A small CNN for 8x8 digits."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(images).flatten(1))
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(dim=1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Digits(pl.LightningDataModule):
    """The 1,797 digits that scikit-learn ships: 1,400 to train on, 397 to validate with."""

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        data = TensorDataset(images, torch.tensor(digits.target))
        split = random_split(data, [1400, 397], generator=torch.Generator().manual_seed(0))
        self.train, self.validation = split

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validation, batch_size=self.batch_size)


def main(epochs: int = 10) -> pl.Trainer:
    """Trains with everything that is cheap enough to leave on."""
    pl.seed_everything(0)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[Interp()])
    trainer.fit(DigitsClassifier(), Digits())
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a small CNN on digits, watched.")
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
