"""Samplers, a network and a clock whose times are made up, for the tests of the budget."""

from __future__ import annotations

from lightning_interp import DeadFilters, FilterGrid, Interp
from lightning_interp.callbacks._periodic import PeriodicCallback
from lightning_interp.callbacks.base import InterpCallback
from tests.contract.nets import Capture, Net, loader, quiet_trainer, seed_all

STEPS = 4  # of an epoch


class Clock:
    """Stands still but for what is added."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


class Sampler(PeriodicCallback):
    """Takes made-up seconds each time, and notes when it was shown."""

    def __init__(self, name, clock, seconds, **options):
        super().__init__(name=name, **options)
        self.timer, self.takes = clock, seconds
        self.steps = []

    def measure(self, trainer, pl_module, step):
        self.timer.now += self.takes
        self.steps.append(step)


class Slow(Net):
    """Each training step takes made-up seconds."""

    def __init__(self, clock, seconds=25.0):
        super().__init__()
        self.timer, self.takes = clock, seconds

    def training_step(self, batch, batch_idx):
        self.timer.now += self.takes
        return super().training_step(batch, batch_idx)


def use(clock, monkeypatch=None):
    """All callbacks count by this clock."""
    if monkeypatch is None:
        InterpCallback.clock = staticmethod(clock)
    else:
        monkeypatch.setattr(InterpCallback, "clock", staticmethod(clock))


def interp(budget, *samplers, measuring=False):
    """An `Interp` that holds these samplers, and what measures all the time if asked to."""
    made = Interp("standard" if measuring else "light", budget=budget, on_error="raise")
    kept = [child for child in made.children if isinstance(child, DeadFilters | FilterGrid)] if measuring else []
    made.children = [*kept, *samplers]
    return made


def fit(callback, model, epochs, *, callbacks=(), train=None, ckpt_path=None, val=False, **options):
    """Trains for so many epochs of four steps; the tags that were logged."""
    seed_all(1)
    logger = Capture()
    trainer = quiet_trainer(max_epochs=epochs, logger=logger, callbacks=[callback, *callbacks], **options)
    validation = loader(12, seed=1, shuffle=False) if val else None
    trainer.fit(model, loader() if train is None else train, validation, ckpt_path=ckpt_path)
    return logger
