"""One of two processes that train together on the CPU: `ddp_embedding_projection.py FOLDER`; writes what it found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from lightning_interp import EmbeddingProjection
from lightning_interp.callbacks.embedding_projection import NUMBERS
from lightning_interp.functional import embed
from lightning_interp.functional.separation import separation
from tests.contract.nets import Capture, Net, loader


class Failing(EmbeddingProjection):
    """Fails on one rank only."""

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if trainer.global_rank == 1:
            raise RuntimeError("on purpose")
        super().measure(trainer, pl_module, step)


def train(callback: EmbeddingProjection, folder: Path, logger: Capture) -> tuple[Net, pl.Trainer]:
    torch.manual_seed(0)
    model = Net()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        limit_train_batches=1,
        callbacks=[callback],
        logger=logger,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(noise=0.0), loader(13, seed=1, shuffle=False, noise=0.0, batch=2))
    return model, trainer


def main(folder: Path) -> None:
    """Thirteen points on two ranks."""
    logger, callback = Capture(), EmbeddingProjection(on_error="raise")
    model, trainer = train(callback, folder, logger)
    data = loader(13, seed=1, shuffle=False, noise=0.0).dataset
    failing = Failing()
    _, second = train(failing, folder, Capture())
    logged = {tag: values[-1][1] for tag, values in logger.of_interp().items()}
    result = {
        "resting": callback.resting,
        "knn_accuracy": float(trainer.callback_metrics["interp/knn_accuracy"]),
        "alone": separation(embed(model, data.images), data.labels),
        "logged": {name: logged[f"interp/{name}"] for name in NUMBERS if f"interp/{name}" in logged},
        "failing": [failing.resting, second.current_epoch],
    }
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
