"""One of two processes that train together, with a budget and unlike clocks: `ddp_budget.py FOLDER`."""

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from lightning_interp.callbacks import _ranks
from tests.callbacks.budget_kit import Clock, Sampler, Slow, interp, use
from tests.contract.nets import loader, quiet_trainer

PATIENCE = timedelta(seconds=40)  # a collective that one rank misses ends in an error


class Meeting(Sampler):
    """The ranks meet whenever it is shown."""

    def meets(self, hook, trainer):
        """In each event."""
        return self.due(hook, trainer) is not None

    def measure(self, trainer, pl_module, step):
        """Both ranks contribute."""
        both = _ranks.total(trainer, self.meet(trainer, lambda: torch.ones(1)))
        assert both.item() == 2.0
        super().measure(trainer, pl_module, step)


class Failing(Meeting):
    """Fails on rank one, in its first epoch."""

    def measure(self, trainer, pl_module, step):
        """Before the ranks meet."""
        if step and trainer.global_rank == 1:
            raise RuntimeError("on this rank only")
        super().measure(trainer, pl_module, step)


def train(clock, epochs, *samplers):
    """Fits with a budget of 5 %."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
    options = {"devices": 2, "strategy": strategy, "max_epochs": epochs, "logger": pl.loggers.logger.DummyLogger()}
    trainer = quiet_trainer(callbacks=[interp(0.05, *samplers)], **options)
    trainer.fit(Slow(clock), loader(samples=48))  # four steps a rank


def main(folder):
    """Writes when the samplers were shown on this rank."""
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    clock = Clock()
    use(clock)
    pace = 0.01 if rank else 1.0  # rank one would decide otherwise
    sampler = Meeting("a", clock, 10.0 * (1.0 if rank else pace))
    train(clock, 20, sampler)
    clock.now = 0.0
    failing, sound = Failing("b", clock, 1.0), Meeting("c", clock, 30.0 * pace)
    train(clock, 10, failing, sound)
    found = {"steps": sampler.steps, "after_failure": sound.steps}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
