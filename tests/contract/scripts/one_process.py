"""A training run as a process of its own: `one_process.py FOLDER CALLBACKS [CHECKPOINT]`.

CALLBACKS is `none`, `often` or `Interp`. Prints `step N` before each batch, so that whoever started it can end it at a
known place; writes `FOLDER/weights.pt` if it gets to its end. With `WORLD_SIZE=2` it is one of two ranks, and rank one
kills itself where `KILL` says: the name of a hook, after `KILL_STEP` steps.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from tests.contract.nets import Net, body, loader, pl, quiet_trainer, seed_all
from tests.contract.odd import MAKERS

EPOCHS, STEPS = 4, 4  # of 4 batches
PAUSE = 0.05  # seconds a batch: time enough to be hit by a signal in


class Steady(Net):
    """Without random numbers of its own, so that a run that was killed and resumed can be the same."""

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        print(f"step {self.global_step}", flush=True)
        time.sleep(PAUSE)


class Killed(pl.Callback):
    """Kills the process, listed before ours and thus in the middle of what all ranks do."""

    def _kill(self, trainer, *args, **kwargs):
        if trainer.global_step >= int(os.environ["KILL_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in(hook):
    """A callback that kills in this hook; on rank one only."""
    callback = Killed()
    if os.environ["LOCAL_RANK"] == "1":
        setattr(callback, hook, callback._kill)
    return callback


def main(folder, callbacks, checkpoint=None):
    """Trains."""
    seed_all(5)
    two = os.environ.get("WORLD_SIZE") == "2"
    saver = pl.callbacks.ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    trainer = quiet_trainer(
        callbacks=[
            *([killed_in(os.environ["KILL"])] if two else []),
            *([] if callbacks == "none" else MAKERS[callbacks]()),
            saver,
        ],
        logger=pl.loggers.TensorBoardLogger(folder, name="board"),
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        devices=2 if two else 1,
        strategy=DDPStrategy(timeout=timedelta(seconds=30), process_group_backend="gloo") if two else "auto",
    )
    model, data = Steady(body(0.0)), {"shuffle": False, "noise": 0.0}
    trainer.fit(model, loader(**data), loader(12, seed=1, **data), ckpt_path=checkpoint)
    torch.save(model.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
