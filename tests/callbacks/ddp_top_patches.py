"""One of two processes that train together on the CPU: `ddp_top_patches.py FOLDER`; writes what its callback found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from lightning_interp.callbacks.top_patches import TopPatches
from tests.contract.nets import Net, loader


def main(folder: Path) -> None:
    """One epoch without a learning rate to speak of; nine validation images on two ranks, so one is seen twice."""
    torch.manual_seed(0)
    model = Net(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    model.loss = lambda batch: model(batch[0]).square().mean()
    callback = TopPatches(k=3, on_error="raise")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        limit_train_batches=1,
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    validation = loader(9, seed=1, shuffle=False, noise=0.0, batch=2)
    trainer.fit(model, loader(noise=0.0), validation)
    with torch.no_grad():
        maps = model.eval().net[:3](validation.dataset.images).flatten(2).amax(dim=2)
    result = {"top": callback.top, "maps": maps.tolist(), "resting": callback.resting}
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
