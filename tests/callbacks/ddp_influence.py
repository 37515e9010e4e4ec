"""One of two processes that train together on the CPU: `ddp_influence.py FOLDER`; writes what its callback showed."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from pytorch_lightning.strategies import DDPStrategy

from tests.callbacks.influence_kit import Digits, Net, Recorded, fit, loaders


class Failing(Recorded):
    """Rank one fails in the second measurement, between two meetings of the ranks."""

    def measure(self, trainer, pl_module, step):
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            merged = self._watch.losses._merged
            merged.add = self._fail
        super().measure(trainer, pl_module, step)

    @staticmethod
    def _fail(since):
        raise OSError("no more room on rank one")


class Peek(Recorded):
    """Notes after each epoch how many samples have been counted: that is what a checkpoint would hold."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        self.counted = [*getattr(self, "counted", []), int(self._watch.losses.means().counts.sum())]


def train(folder: Path, callback: Recorded, count: int, epochs: int) -> int:
    """Trains a network that stands still; gives the number of epochs."""
    strategy = DDPStrategy(process_group_backend="gloo")
    batches, test = loaders(Digits(count), batch_size=4)
    model = Net(lr=0.0)
    trainer = fit(
        model, batches, test, callback, max_epochs=epochs, devices=2, strategy=strategy, default_root_dir=folder
    )
    return trainer.current_epoch


def main(folder: Path) -> None:
    """Runs that go well, and one in which a rank fails."""
    warnings.simplefilter("ignore")
    rank, result = int(os.environ["LOCAL_RANK"]), {}
    for name, count in (("many", 61), ("two", 2)):
        callback = Recorded(num_train=40, num_test=1)
        train(folder / name, callback, count, 2)
        shown = {"tags": sorted(callback.tags()) if rank else []}
        if rank == 0:
            shown |= {
                "influence": callback.newest("interp.influence/table").markdown,
                "suspects": callback.newest("interp.suspect_labels/table").markdown,
                "shares": [value for _, value in callback.numbers("suspect_label_share")],
            }
        counts = callback._watch.losses.means().counts.tolist()
        result[name] = {**shown, "counts": counts, "resting": callback.resting}
    failing = Failing(num_train=40, num_test=1, every_n_epochs=1, on_error="warn")
    result["fails"] = {"epochs": train(folder / "fails", failing, 21, 3), "resting": failing.resting}
    seldom = Peek(num_train=20, num_test=1, every_n_epochs=5)
    train(folder / "seldom", seldom, 20, 3)
    result["seldom"] = seldom.counted
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
