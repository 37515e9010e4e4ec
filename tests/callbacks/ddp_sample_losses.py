"""One of two processes that train together on the CPU: `ddp_sample_losses.py FOLDER`; writes what was collected.

Two epochs, a resume in the middle of the third from a checkpoint of rank zero, and the fourth.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from pytorch_lightning.strategies import DDPStrategy

from tests.callbacks.losses_kit import Collector, kit, numbered

pl = kit().pl


class SaveInMidEpoch(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 0:
            trainer.save_checkpoint(self.path)


def main(folder: Path) -> None:
    """Writes what the samples noted, what was collected, and what each rank's batches brought along."""
    rank = int(os.environ["LOCAL_RANK"])
    save = SaveInMidEpoch()
    save.path = folder / "middle.ckpt"
    options = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "default_root_dir": folder}
    result = {}
    for name, epochs, path in (("first", 3, None), ("second", 4, save.path)):
        torch.manual_seed(0)
        model, collector = kit().Net(), Collector()
        options["strategy"] = DDPStrategy(process_group_backend="gloo")
        kit().fit(model, numbered(21), collector, save, max_epochs=epochs, ckpt_path=path, **options)
        result[name] = {
            "seen": model.seen,
            "scores": [part.tolist() for part in collector.losses.means()],
            "pairs": collector.pairs,
            "reasons": [collector.order.reason, collector.losses.reason],
        }
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
