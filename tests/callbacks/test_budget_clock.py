"""`Interp(budget=0.02)` against a clock that is not its own.

Time is made up: it passes in the user's training step, and with each call of a function of this package, wherever that
is called from. So all that it does counts, also what its own clock might overlook: outside its hooks, in the forward,
around its children. Nothing here is timed.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_interp
from lightning_interp import Interp, TrainingDynamics
from lightning_interp.callbacks import _tape
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.functional import tracing
from tests.callbacks.budget_kit import STEPS, Clock, Slow, fit
from tests.contract.nets import Net, pl

OURS = str(Path(lightning_interp.__file__).parent)
PICTURES = str(Path(OURS) / "render")
CALL, DRAWING, STEP = 1e-3, 0.05, 400.0  # seconds of a call, of one that draws, and of a training step
SHARE, EPOCHS = 0.02, 40
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated", "ignore:.*does not have many workers"
)


class Calls(Clock):
    """Goes on with each call into this package; `ours` is the time that went by so."""

    def __init__(self):
        super().__init__()
        self.ours = 0.0

    def see(self, frame, event, argument):
        """For `sys.setprofile`."""
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seconds = DRAWING if frame.f_code.co_filename.startswith(PICTURES) else CALL
            self.now += seconds
            self.ours += seconds


class ByEpoch(pl.Callback):
    """Listed last: time of ours at the end of each epoch, and what `Interp` believes it to be."""

    def __init__(self, clock, callback):
        self.clock, self.callback = clock, callback
        self.ours, self.believed = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.ours.append(self.clock.ours)
        self.believed.append(self.callback.cost)


def run(monkeypatch, budget):
    """A fit of real callbacks: time of ours by epoch, and what `Interp` believes."""
    clock = Calls()
    monkeypatch.setattr(InterpCallback, "clock", staticmethod(clock.__call__))
    for module in (tracing, _tape):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    callback = Interp(budget=budget, on_error="raise")
    told = ByEpoch(clock, callback)
    before = sys.getprofile()
    sys.setprofile(clock.see)
    try:
        fit(callback, Slow(clock, STEP), EPOCHS, callbacks=[told], val=True)
    finally:
        sys.setprofile(before)
    return told


def test_share_keeps_to_the_budget_by_another_clock(monkeypatch):
    """But for what is shown whatever it costs: the first time that each is due, and the last."""
    told, free = run(monkeypatch, SHARE), run(monkeypatch, None)
    trained = EPOCHS * STEPS * STEP
    assert free.ours[-1] / trained > 3 * SHARE, "else there would be nothing to leave out"
    shown_anyway = (told.ours[0] + told.ours[-1] - told.ours[-2]) / trained
    assert told.ours[-1] / trained <= SHARE + shown_anyway
    assert told.ours[-1] / trained <= 1.05 * SHARE, "by then the first times are paid for"
    assert 0.9 <= told.believed[-1] / told.ours[-1] <= 1.0


def test_what_follows_the_loss_through_the_forward_counts(monkeypatch):
    """`TrainingDynamics` records the step in the user's own time."""
    clock, records, record = Clock(), [], _tape.Tape._record

    def slow(self, *args):
        records.append(1)
        clock.now += 3.0
        return record(self, *args)

    monkeypatch.setattr(InterpCallback, "clock", staticmethod(clock))
    monkeypatch.setattr(_tape, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(_tape.Tape, "_record", slow)
    callback = TrainingDynamics(dense_steps=100, on_error="raise")
    fit(callback, Net(), 1, val=True)
    assert len(records) >= STEPS
    assert callback.cost == 3.0 * len(records)
