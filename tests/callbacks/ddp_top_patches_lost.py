"""Rank one validates in a function that is compiled in mid-run; no test, see `test_top_patches.py`."""

import json
import logging
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import TopPatches

EPOCHS, COMPILED = 5, 2


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
        net = self.net
        self.__dict__["hidden"] = torch.compile(lambda images: net(images), backend="eager")
        self.by_loop = []

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        lost = self.global_rank == 1 and self.current_epoch >= COMPILED
        self.log("val/loss", nn.functional.cross_entropy((self.hidden if lost else self.net)(batch[0]), batch[1]))

    def on_train_epoch_end(self):
        self.by_loop.append(next(c for c in self.trainer.callbacks if isinstance(c, TopPatches))._by_loop)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 2)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=2, strategy="ddp", default_root_dir=folder,
        callbacks=[TopPatches(k=1, every_n_epochs=1, on_error="raise")], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model()
    trainer.fit(model, DataLoader(data, 4), DataLoader(data, 4))
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps({"by_loop": model.by_loop}))
