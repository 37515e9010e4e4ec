"""What a callback writes during a fit, read back in both of TensorBoard's data back ends.

Each test is a pitfall of TensorBoard or of Lightning's step counters.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import math
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from torch import nn

from examples.figures import tensorboard_server, wait_for_tag
from lightning_interp import sinks
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.errors import InterpWarning
from lightning_interp.records import Histogram, Image, Scalar, Text
from tests.reading import BACK_ENDS, event_files, read, summaries

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*lower value for log_every_n_steps",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)
NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
BATCHES, EPOCHS = 4, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 31, 3), dtype=np.uint8)


@pytest.fixture(params=NAMESPACES)
def pl(request):
    return importlib.import_module(request.param)


def make_module(pl, optimizers=1):
    """A module that logs `user/step`, `user/val` and `user/epoch`: the axis that is to be met."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
            self.automatic_optimization = optimizers == 1

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = self(batch).square().mean()
            self.log("user/step", loss, on_step=True, on_epoch=False)
            if optimizers > 1:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self(batch).square().mean())
                    optimizer.step()
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("user/val", self(batch).mean())

        def on_train_epoch_end(self):
            self.log("user/epoch", 1.0)

        def configure_optimizers(self):
            made = [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(optimizers)]
            return made if optimizers > 1 else made[0]

    return Module()


class Everywhere(InterpCallback):
    """Writes at every moment at which callbacks measure."""

    def __init__(self, **options):
        super().__init__(on_error="raise", **options)

    def put(self, trainer, moment, step):
        self.write(trainer, [Scalar(tag=f"interp/{moment}", step=step, value=float(step))])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.put(trainer, "step", self.step_of(trainer))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.put(trainer, "val", self.step_of(trainer))

    def on_train_epoch_end(self, trainer, pl_module):
        self.put(trainer, "epoch", self.step_of(trainer) - 1)


class AtStart(InterpCallback):
    """Writes given lists of records, one list after the other, before the first step."""

    def __init__(self, *calls, **options):
        super().__init__(on_error="raise", **options)
        self.calls = calls

    def on_train_start(self, trainer, pl_module):
        for records in self.calls:
            self.write(trainer, records)


def fit(pl, folder, *callbacks, logger=None, optimizers=1, **options):
    """Trains into `folder/run`, unless loggers are given; returns the trainer."""
    if logger is None:
        logger = pl.loggers.TensorBoardLogger(folder, name="", version="run", default_hp_metric=False)
    settings = {"max_epochs": EPOCHS, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1, "logger": logger}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**{**settings, **options}, callbacks=list(callbacks), default_root_dir=folder)
    batches = torch.utils.data.DataLoader(torch.ones(2 * BATCHES, 1, 4, 4), batch_size=2)
    trainer.fit(make_module(pl, optimizers), batches, batches)
    return trainer


def scalars(tag, steps, first=0):
    """Scalars at these steps whose values number them, from `first`."""
    return [Scalar(tag=tag, step=step, value=first + i) for i, step in enumerate(steps)]


# ---------------------------------------------------------------------------------------------------- the step axis

LAST = EPOCHS * BATCHES - 1
LOOPS = {
    "plain": ({}, list(range(LAST + 1))),
    "accumulation": ({"accumulate_grad_batches": 2}, list(range((LAST + 1) // 2))),
    "two_optimizers": ({"optimizers": 2}, list(range(LAST + 1))),
    "two_validations": ({"val_check_interval": 0.5}, list(range(LAST + 1))),
    "max_steps": ({"max_steps": 6, "max_epochs": -1}, list(range(6))),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_steps_equal_the_axis_of_self_log(pl, tmp_path, loop):
    """In training steps, at the end of validation and of training epochs, records lie where `self.log` puts its own."""
    options, expected = LOOPS[loop]
    fit(pl, tmp_path, Everywhere(), **options)
    assert len(event_files(tmp_path)) == 1
    for back_end in BACK_ENDS:
        log = read(tmp_path / "run", back_end)
        assert log.steps("interp/step") == expected
        for moment in ("step", "val", "epoch"):
            steps = log.steps(f"interp/{moment}")
            assert steps == log.steps(f"user/{moment}")
            assert steps == sorted(set(steps))
            assert log.values(f"interp/{moment}") == steps


def test_two_optimizers_make_global_step_a_different_axis(tmp_path):
    """Why `trainer.global_step` isn't used: it counts every optimizer."""
    trainer = fit(importlib.import_module("pytorch_lightning"), tmp_path, Everywhere(), optimizers=2)
    assert trainer.global_step == 2 * (LAST + 1)
    assert max(read(tmp_path / "run", "slow").steps("user/step")) == LAST


def test_sanity_check_writes_nothing(pl, tmp_path):
    """The first validation record is that of the first epoch, not that of the two batches before training."""
    fit(pl, tmp_path, Everywhere(), num_sanity_val_steps=2)
    assert read(tmp_path / "run", "slow").steps("interp/val")[0] == BATCHES - 1


# ---------------------------------------------------------------------------------------------------- lost events


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_same_step_twice_keeps_the_first_and_loses_nothing(tmp_path, back_end):
    """Whether in one call or in two."""
    pl = importlib.import_module("pytorch_lightning")
    twice = [scalars("x", [0, 5, 5, 7]), scalars("x", [7, 9], first=10)]
    fit(pl, tmp_path, AtStart(*twice), max_epochs=1)
    assert read(tmp_path / "run", back_end).scalars["x"] == [(0, 0), (5, 1), (7, 3), (9, 11)]


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_smaller_step_later_deletes_nothing(tmp_path, back_end):
    """A record that comes too late is left out, and takes no other one with it; other tags have steps of their own."""
    pl = importlib.import_module("pytorch_lightning")
    calls = [scalars("x", [0, 100, 200, 300]), [*scalars("x", [3]), *scalars("y", [3])], scalars("x", [301], first=4)]
    fit(pl, tmp_path, AtStart(*calls), max_epochs=1)
    log = read(tmp_path / "run", back_end)
    assert log.scalars["x"] == [(0, 0), (100, 1), (200, 2), (300, 3), (301, 4)]
    assert log.scalars["y"] == [(3, 0)]


@pytest.mark.skipif("fast" not in BACK_ENDS, reason="TensorBoard has no data server for this machine")
def test_smaller_step_without_the_session_deletes_events(tmp_path):
    """What the two tests above guard against does happen when records go straight to the sinks."""
    logger = importlib.import_module("pytorch_lightning.loggers").TensorBoardLogger(tmp_path, name="", version="run")
    sinks.write([logger], scalars("x", [0, 100, 200, 300, 3]))
    logger.finalize("success")
    assert read(tmp_path / "run", "slow").steps("x") == [0, 100, 200, 300, 3]
    assert read(tmp_path / "run", "fast").steps("x") == [0, 3]


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_all_kinds_survive_a_fit(pl, tmp_path, back_end):
    """Pictures pixel by pixel, histograms, text and numbers that aren't finite, among the user's own scalars."""
    records = [
        Image(tag="interp.filters/00_net.0", step=0, pixels=PIXELS),
        Histogram(tag="interp.sparsity/00_net.0", step=0, counts=np.array([3.0]), edges=np.array([0.0, 1.0])),
        Histogram(tag="interp.sparsity/00_net.0", step=1, counts=np.array([math.nan]), edges=np.array([math.nan] * 2)),
        Histogram(tag="interp.sparsity/00_net.0", step=2, counts=np.array([]), edges=np.array([])),
        *[Scalar(tag="interp/x", step=i, value=value) for i, value in enumerate((math.nan, math.inf, 1.0))],
        Text(tag="interp/alerts", step=0, markdown="none"),
    ]
    fit(pl, tmp_path, AtStart(records), max_epochs=1)
    log = read(tmp_path / "run", back_end)
    np.testing.assert_array_equal(log.images["interp.filters/00_net.0"][0][1], PIXELS)
    assert [step for step, _ in log.histograms["interp.sparsity/00_net.0"]] == [0]
    np.testing.assert_array_equal(log.values("interp/x"), [math.nan, math.inf, 1.0])
    assert log.text["interp/alerts/text_summary"] == [(0, "none")]
    assert log.steps("user/step") == list(range(BATCHES))


def test_300_layers_cost_one_event_a_step(tmp_path):
    """Not 300."""
    records = [Scalar(tag=f"interp.sparsity/{i:03d}_conv", step=7, value=i) for i in range(300)]
    fit(importlib.import_module("pytorch_lightning"), tmp_path, AtStart(records), max_epochs=1)
    found = [event for event in summaries(tmp_path) if event.summary.value[0].tag.startswith("interp")]
    assert [(event.step, len(event.summary.value)) for event in found] == [(7, 300)]


# ---------------------------------------------------------------------------------------------------- one event file


def test_nothing_is_written_after_fit(pl, tmp_path):
    """Lightning closes the log before `fit` returns; writing later would open a second event file."""
    callback = Everywhere()
    trainer = fit(pl, tmp_path, callback, max_epochs=1)
    [file] = event_files(tmp_path)
    size = file.stat().st_size
    with contextlib.suppress(KeyError):  # the session has ended
        callback.put(trainer, "late", 99)
        callback.on_train_epoch_end(trainer, trainer.lightning_module)
    assert event_files(tmp_path) == [file]
    assert file.stat().st_size == size


class Fails(Everywhere):
    """Ends training in the second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise ConnectionError("no more data")


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_log_is_readable_after_an_exception(pl, tmp_path, back_end):
    """One file, with all that was written before the end."""
    with pytest.raises(ConnectionError):
        fit(pl, tmp_path, Fails())
    assert len(event_files(tmp_path)) == 1
    assert read(tmp_path / "run", back_end).steps("interp/step") == list(range(BATCHES))


# ---------------------------------------------------------------------------------------------------- other loggers


def test_csv_logger_gets_the_scalars(pl, tmp_path):
    """At the steps of `self.log`, beside the user's own columns."""
    fit(pl, tmp_path, Everywhere(), logger=pl.loggers.CSVLogger(tmp_path, name="", version="run"))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {tag: [int(row["step"]) for row in rows if row[tag]] for tag in ("interp/epoch", "user/epoch")}
    assert steps["interp/epoch"] == steps["user/epoch"] == [BATCHES * e - 1 for e in range(1, EPOCHS + 1)]
    assert not event_files(tmp_path)


def test_two_loggers_both_get_the_scalars(pl, tmp_path):
    """In whatever order they are given."""
    csv_logger = pl.loggers.CSVLogger(tmp_path, name="", version="csv")
    tensorboard = pl.loggers.TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    fit(pl, tmp_path, Everywhere(), logger=[csv_logger, tensorboard])
    assert read(tmp_path / "run", "slow").steps("interp/step") == list(range(LAST + 1))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert sum(bool(row["interp/step"]) for row in csv.DictReader(file)) == LAST + 1


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}], ids=["no_logger", "fast_dev_run"])
def test_without_a_logger_nothing_is_written(pl, tmp_path, options):
    """And nothing is raised."""
    fit(pl, tmp_path, Everywhere(), **options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_failing_logger_is_reported_once_and_training_goes_on(pl, tmp_path):
    """The callback rests, the other logger has the records up to then."""

    class Broken(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            if "interp/step" in metrics:
                raise ConnectionError("unplugged")

    class Quiet(Everywhere):
        def __init__(self):
            super().__init__()
            self.on_error = "warn"

    tensorboard = pl.loggers.TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    with pytest.warns(InterpWarning, match="ConnectionError: unplugged") as caught:
        fit(pl, tmp_path, Quiet(), logger=[Broken(tmp_path / "csv"), tensorboard])
    assert sum(issubclass(warning.category, InterpWarning) for warning in caught) == 1
    log = read(tmp_path / "run", "slow")
    assert log.steps("interp/step") == [0]
    assert log.steps("user/step") == list(range(LAST + 1))


# ---------------------------------------------------------------------------------------------------- the dashboards


@pytest.mark.parametrize("load_fast", [back_end == "fast" for back_end in BACK_ENDS])
def test_server_shows_one_run_with_folded_tags_and_tables(tmp_path, load_fast):
    """One run, groups by the text before the first slash, layers in depth order, a table with escaped bars."""
    table = "Alerts\n\n| rule | layer |\n|---|---|\n| dead_filters | a\\|b |\n"
    layers = [f"{quantity}/{i:02d}_layer{i}.conv" for quantity in ("interp.dead", "interp.sparsity") for i in range(11)]
    records = [Text(tag="interp/alerts", step=0, markdown=table)]
    records += [Scalar(tag=tag, step=0, value=0.0) for tag in [*layers, "interp/dead_max"]]
    fit(importlib.import_module("pytorch_lightning"), tmp_path, AtStart(records), max_epochs=1)
    with tensorboard_server(tmp_path, load_fast=load_fast) as url:
        wait_for_tag(url, "user/epoch")
        tags = get(f"{url}data/plugin/scalars/tags")
        where = urllib.parse.urlencode({"run": "run", "tag": "interp/alerts/text_summary"})
        [text] = get(f"{url}data/plugin/text/text?{where}")
    assert list(tags) == ["run"]
    found = sorted(tag for tag in tags["run"] if tag.startswith("interp"))
    assert found == sorted([*layers, "interp/dead_max"])
    assert {tag.split("/", 1)[0] for tag in found} == {"interp", "interp.dead", "interp.sparsity"}
    assert "<td>a|b</td>" in text["text"]
    assert "<th>layer</th>" in text["text"]


def get(url):
    """The JSON behind an address, once there is something."""
    for _ in range(100):
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.loads(answer.read())
        if found:
            return found
        time.sleep(0.2)
    raise TimeoutError(url)
