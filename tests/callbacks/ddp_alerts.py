"""Trains on two CPU processes and prints at which step each rank ended: `python ddp_alerts.py MODE FAILING_RANK`."""

import sys
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.rules import Alert, Rule


@dataclass(frozen=True)
class After50(Rule):
    """Critical from step 50 on."""

    name: ClassVar[str] = "after_50"
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, history, active):
        """One alert."""
        return [Alert(rule=self.name, severity="critical")] if history.step >= 50 else []


class FailsOnOneRank(Alerts):
    """Its first look fails, on one rank."""

    failing = -1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Fails before it has looked for the first time."""
        if trainer.global_rank == self.failing and batch_idx == 10:
            raise RuntimeError("on this rank only")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Net(pl.LightningModule):
    """A linear classifier that says when it ends."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self):
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_end(self):
        """Prints rank and steps."""
        sys.stdout.write(f"\nrank {self.global_rank} ended at {self.global_step}\n")
        sys.stdout.flush()


def main(mode, failing):
    """Fits."""
    warnings.simplefilter("ignore")
    alerts = FailsOnOneRank(rules=[After50()], on_alert=mode)
    alerts.failing = failing
    data = DataLoader(TensorDataset(torch.zeros(480, 4), torch.zeros(480, dtype=torch.long)), batch_size=2)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[alerts], enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(Net(), data)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
