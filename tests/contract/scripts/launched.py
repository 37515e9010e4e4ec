"""A fit whose processes Lightning itself spawns or forks: `launched.py FOLDER STRATEGY CALLBACKS`.

Both hand the callbacks over, pickled or as they are, and the weights come back to the process that called `fit`. What a
second `fit` of the same callbacks and the same model says is told too, as when a cell of a notebook runs twice.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch

from tests.contract.factories import WHOLE
from tests.contract.hooks import hooks_on
from tests.contract.nets import Net, loader, quiet_trainer, seed_all


class Tell(pl.Callback):
    """Each process, at the end: its batches, and the hooks that are left on the model."""

    def __init__(self, folder):
        self.folder, self.batches = folder, 0

    def setup(self, trainer, pl_module, stage):
        seed_all(3)  # Python seeds `random` anew in a process that was forked

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1

    def teardown(self, trainer, pl_module, stage):
        told = {"batches": self.batches, "hooks": len(hooks_on(pl_module)), "world": trainer.world_size}
        (self.folder / f"rank.{trainer.global_rank}.json").write_text(json.dumps(told))


def main(folder: Path, strategy: str, name: str) -> None:
    """Two fits; writes the weights after the first."""
    warnings.simplefilter("ignore")
    seed_all(2)
    model, callbacks = Net(), WHOLE[name]() if name in WHOLE else []
    for number in range(2):
        board = pl.loggers.TensorBoardLogger(folder, version=number)
        trainer = quiet_trainer(
            devices=2, strategy=strategy, max_epochs=1, logger=board, callbacks=[*callbacks, Tell(folder)]
        )
        trainer.fit(model, loader(), loader(12, seed=1, shuffle=False))
        torch.save(model.state_dict(), folder / f"weights.{number}.pt")
    (folder / "hooks.json").write_text(json.dumps(len(hooks_on(model))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
