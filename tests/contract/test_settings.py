"""The settings in which people really train: no crash, or one clear message."""

import copy
import importlib
import math
import multiprocessing
import pickle
import sys
from collections import UserList

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_interp
from lightning_interp import (
    ActivationSparsity,
    Alert,
    Alerts,
    DeadFilters,
    EmbeddingProjection,
    FilterGrid,
    Interp,
    SaliencyMaps,
    TrainingDynamics,
)
from lightning_interp.callbacks._family import with_children
from tests.contract.battery import fit_quietly
from tests.contract.factories import ALL, CLASSES, WHOLE, often
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import NAMESPACES, Capture, Images, Net, Stream, kit, loader, pl, quiet_trainer, seed_all
from tests.contract.recipes import TwoOptimizers
from tests.reading import event_files

VAL = {"samples": 12, "seed": 1, "shuffle": False}
MONITORED = (
    "interp/dead_filters", "interp/dead_fraction_max", "interp/sparsity_mean", "interp/update_ratio_median",
    "interp/alerts_active",
)  # fmt: skip


def fit(callbacks, model=None, *, train=None, val=..., **options):
    """One fit with all errors raised; the model, its Trainer and what was said."""
    model = Net() if model is None else model
    trainer = quiet_trainer(callbacks=callbacks, **options)
    val = loader(**VAL) if val is ... else val
    said = fit_quietly(trainer, model, loader() if train is None else train, val)
    assert trainer.state.finished
    assert_nothing_left(model, trainer.optimizers)
    return model, trainer, said


# ---------------------------------------------------------------------- loggers


@pytest.mark.parametrize("name", WHOLE)
def test_without_a_logger_the_measurements_go_on(name):
    """`logger=False`: metrics and alerts are still there."""
    callbacks = WHOLE[name]()
    _, trainer, said = fit(callbacks, logger=False)
    assert said == []
    assert set(MONITORED) <= set(trainer.callback_metrics)
    assert math.isfinite(trainer.callback_metrics["interp/update_ratio_median"])
    assert next(each for each in with_children(callbacks) if isinstance(each, DeadFilters)).dead


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_csv_logger_gets_the_numbers(namespace, tmp_path):
    """It can't take pictures."""
    own = kit(namespace)
    logger = own.pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = own.trainer(callbacks=[Interp(on_error="raise")], logger=logger)
    assert fit_quietly(trainer, own.Net(), loader(), loader(**VAL)) == []
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_step", "val/loss", "interp/dead_filters", "interp.dead_filters/00_net.0"} <= set(header)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_two_loggers_both_get_the_numbers(namespace, tmp_path):
    """One event file, and all numbers in the other logger."""
    own = kit(namespace)
    capture, board = own.Capture(), own.pl.loggers.TensorBoardLogger(tmp_path)
    trainer = own.trainer(callbacks=often(), logger=[capture, board])
    assert fit_quietly(trainer, own.Net(), loader(), loader(**VAL)) == []
    assert len(event_files(tmp_path)) == 1
    assert {"interp/dead_filters", "interp/sparsity_mean", "interp/learning_rate"} <= set(capture.of_interp())
    assert capture.of_the_user()


# ---------------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", ["often", "Interp"])
@pytest.mark.parametrize("fast_dev_run", [True, 2])
def test_fast_dev_run_writes_nothing(namespace, name, fast_dev_run, tmp_path, monkeypatch):
    """One batch of each."""
    monkeypatch.chdir(tmp_path)
    own = kit(namespace)
    trainer = own.trainer(callbacks=WHOLE[name](), fast_dev_run=fast_dev_run, logger=True)
    assert fit_quietly(trainer, own.Net(), loader(), loader(**VAL)) == []
    assert not list(tmp_path.rglob("*"))


def test_sanity_check_is_not_measured():
    """Whatever the sanity check saw, the numbers are those of a run without it."""
    found = []
    for checks in (0, 2):
        torch.manual_seed(0)
        model, logger = Net(), Capture()
        model.loss = lambda batch, model=model: nn.functional.cross_entropy(model(batch[0]), batch[1])
        torch.manual_seed(1)
        train, val = loader(noise=0.0, shuffle=False), loader(**VAL, noise=0.0)
        fit(often(), model, train=train, val=val, logger=logger, num_sanity_val_steps=checks)
        found.append({tag: [step for step, _ in rows] for tag, rows in logger.of_interp().items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ALL)
def test_without_a_validation_set(name):
    """Training batches are watched."""
    _, _, said = fit(ALL[name](), val=None)
    assert said == []


def test_asking_for_a_validation_that_is_not_there_is_said_once():
    """It falls back to the training batches."""
    callback = DeadFilters(split="val")
    _, _, said = fit([callback], val=None)
    assert said == ['DeadFilters(split="val") has no validation to watch; it watches the training batches instead.']
    assert callback.dead


@pytest.mark.parametrize("name", ["often", "Interp"])
def test_iterable_data_set_is_said_at_most_once_per_callback(name):
    """The fixed samples can't be read by index."""
    callbacks = WHOLE[name]()
    train = DataLoader(Stream(), batch_size=6)
    _, trainer, said = fit(callbacks, train=train, val=DataLoader(Stream(12), batch_size=6))
    assert trainer.global_step == 8
    assert len(said) == len(set(said)) <= 1
    assert all("fixed samples" in message for message in said)


@pytest.mark.parametrize("name", ALL)
def test_endless_loader_ends_with_max_steps_and_reports_before(name):
    """Nothing waits for an epoch that never ends."""
    logger = Capture()
    train = DataLoader(Stream(endless=True), batch_size=6)
    _, trainer, said = fit(ALL[name](), train=train, val=None, max_epochs=-1, max_steps=9, logger=logger)
    assert trainer.global_step == 9
    assert len(said) <= 1
    # A stream holds no known images.
    assert logger.of_interp() or (name in ("TopPatches", "Influence") and said)


def test_endless_loader_with_validation_by_steps():
    """`val_check_interval` in steps."""
    logger = Capture()
    train = DataLoader(Stream(endless=True), batch_size=6)
    options = {"max_epochs": -1, "max_steps": 9, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fit([Interp(on_error="raise")], train=train, logger=logger, **options)
    validated = [step for step, row in logger.of_the_user() if "val/loss" in row]
    assert len(validated) == 3
    assert [step for step, _ in logger.of_interp()["interp/dead_filters"]] == [0, *validated]


@pytest.mark.parametrize("limits", [{"limit_train_batches": 2}, {"limit_train_batches": 0.5, "limit_val_batches": 1}])
def test_limited_batches(limits):
    """Epochs end early."""
    _, trainer, said = fit(often(), **limits)
    assert trainer.global_step == 4
    assert said == []


def test_no_training_batches_at_all():
    """Lightning skips the training."""
    trainer = quiet_trainer(callbacks=often(), limit_train_batches=0)
    assert fit_quietly(trainer, Net(), loader(), loader(**VAL)) == []


def test_zero_epochs():
    """Nothing to do."""
    trainer = quiet_trainer(callbacks=[Interp(on_error="raise")], max_epochs=0)
    assert fit_quietly(trainer, Net(), loader(), loader(**VAL)) == []


def test_barebones_trainer():
    """Lightning's mode without anything."""
    callbacks = often()
    trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=callbacks)
    assert fit_quietly(trainer, Unlogged(), loader()) == []
    assert callbacks[0].dead


class Unlogged(Net):
    """Logs nothing, which a barebones Trainer asks for."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    validation_step = None


# ---------------------------------------------------------------------- monitors


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", ["often", "Interp"])
def test_early_stopping_can_monitor_from_the_first_validation(name, ours_first, tmp_path):
    """Listed before ours and after, in the middle of the first epoch, with the strictest settings; all metrics."""
    theirs = []
    for monitor in MONITORED:
        theirs.append(pl.callbacks.EarlyStopping(monitor=monitor, patience=50, check_finite=False, strict=True))
        theirs.append(pl.callbacks.ModelCheckpoint(tmp_path / monitor, monitor=monitor, save_top_k=1))
    callbacks = [*WHOLE[name](), *theirs] if ours_first else [*theirs, *WHOLE[name]()]
    _, trainer, said = fit(callbacks, val_check_interval=0.5, enable_checkpointing=True)
    assert said == []
    assert trainer.global_step == 8


@pytest.mark.parametrize("ours_first", [True, False])
def test_early_stopping_stops_on_dead_filters(ours_first):
    """It sees the number of the validation that has just ended."""

    class Dying(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                with torch.no_grad():
                    self.net[1].bias.fill_(-100.0)
                    self.net[1].weight.fill_(0.0)

    options = {"patience": 50, "mode": "min", "divergence_threshold": 3.5}
    stopper = pl.callbacks.EarlyStopping(monitor="interp/dead_filters", **options)
    ours = [DeadFilters(layers=["net.0"], on_error="raise")]  # four filters
    callbacks = [*ours, stopper] if ours_first else [stopper, *ours]
    fit(callbacks, Dying(), max_epochs=6, num_sanity_val_steps=0)
    assert stopper.stopped_epoch == 2


# ---------------------------------------------------------------------- batches, models, steps


class Dictionary(Images):
    """Samples as dictionaries."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "name": f"sample {index}"}


class FromDictionary(Net):
    """Reads batches that are dictionaries."""

    def training_step(self, batch, batch_idx):
        return self.loss((batch["image"], batch["label"]))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss((batch["image"], batch["label"])), batch_size=len(batch["label"]))


class Returning(Net):
    """Its forward returns the scores inside something else."""

    def __init__(self, wrap, unwrap):
        super().__init__()
        self.wrap, self.unwrap = wrap, unwrap

    def forward(self, x):
        return self.wrap(self.net(x))

    def loss(self, batch):
        return nn.functional.cross_entropy(self.unwrap(self(batch[0])), batch[1])


class NoImages(Net):
    """Its forward takes something else than images: the label too."""

    def forward(self, x, y):
        return self.net(x) + y[:, None]

    def loss(self, batch):
        return nn.functional.cross_entropy(self(*batch), batch[1])


class NoForward(Net):
    """It has no forward at all."""

    forward = pl.LightningModule.forward

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class ReturnsADictionary(Net):
    """`training_step` returns a dictionary with more in it."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "scores": [1, 2], "name": "x"}


class ReturnsNothing(TwoOptimizers):
    """Manual optimisation that skips some batches altogether."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0:
            super().training_step(batch, batch_idx)


class Late(Net):
    """Builds its network in `configure_model`."""

    def __init__(self):
        super().__init__(net=nn.Identity())
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net().net


class Lazy(Net):
    """Its layers get their shapes in the first forward."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)))
        self.net(torch.zeros(2, 1, 8, 8))


class NoConvolution(Net):
    """Linear layers only."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)))


class LosesNothing(Net):
    """Skips every second batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


MODELS = {
    "returns a tuple": (lambda: Returning(lambda s: (s, s.mean()), lambda out: out[0]), 0),
    "returns a dict": (lambda: Returning(lambda s: {"logits": s, "n": 1}, lambda out: out["logits"]), 0),
    "returns nothing at times": (LosesNothing, 0),
    "step returns a dict": (ReturnsADictionary, 0),
    "two optimizers": (TwoOptimizers, 0),
    "manual and nothing": (ReturnsNothing, 0),
    "forward takes the label": (NoImages, 2),
    "no forward": (NoForward, 2),
    "configure_model": (Late, 0),
    "lazy layers": (Lazy, 0),
    "no convolution": (NoConvolution, 2),  # no filters, and nothing for Grad-CAM
}


@pytest.mark.parametrize("make", [often, WHOLE["Interp"]], ids=["often", "Interp"])
@pytest.mark.parametrize("kind", MODELS)
def test_odd_models_train_and_at_most_one_thing_is_said(kind, make):
    """What can't be shown is said once, with the reason; numbers that need only the running forward are there."""
    make_model, most = MODELS[kind]
    logger = Capture()
    _, trainer, said = fit(make(), make_model(), logger=logger)
    assert len(said) == len(set(said)) == most, said
    assert all("Training goes on without it" not in message for message in said)
    rows = logger.of_interp()
    assert "interp/dead_filters" in rows
    if kind != "manual and nothing":
        assert "interp/update_ratio_median" in rows
    assert trainer.global_step > 0


@pytest.mark.parametrize("name", ["often", "Interp"])
def test_batches_that_are_dictionaries(name):
    """With strings among them."""
    train, val = (DataLoader(Dictionary(n), batch_size=6) for n in (24, 12))
    _, _, said = fit(WHOLE[name](), FromDictionary(), train=train, val=val)
    assert said == []


def test_batches_that_nobody_can_read_are_said_once():
    """A list of views."""

    class Views(Images):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return [[image, image + 1.0], {"label": label}]

    class FromViews(Net):
        def training_step(self, batch, batch_idx):
            return self.loss((batch[0][0] + batch[0][1], batch[1]["label"]))

        def validation_step(self, batch, batch_idx):
            pass

    train, val = (DataLoader(Views(n), batch_size=6) for n in (24, 12))
    _, _, said = fit(often(), FromViews(), train=train, val=val)
    assert len(said) == 1
    assert "interp_batch" in said[0]


# ---------------------------------------------------------------------- callbacks as objects


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_two_instances_with_names_log_under_names_of_their_own(cls):
    """And have states of their own."""
    logger = Capture()
    pair = [cls(name="a", on_error="raise"), cls(name="b", on_error="raise")]
    assert pair[0].state_key != pair[1].state_key
    _, _, said = fit(pair, logger=logger)
    assert said == []
    tags = set(logger.of_interp())
    assert tags
    first = {tag for tag in tags if tag.startswith("interp.a/") or ".a/" in tag}
    second = {tag for tag in tags if tag.startswith("interp.b/") or ".b/" in tag}
    assert first | second == tags
    assert {tag.replace(".a/", ".b/", 1) for tag in first} == second


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_two_instances_without_names_are_refused_by_lightning(cls):
    """They have a state, which needs a key of its own; Lightning says so at once."""
    with pytest.raises(RuntimeError, match="state_key"):
        quiet_trainer(callbacks=[cls(), cls()])


class ListOfConfigurations(UserList):
    """As Hydra's: behaves like a list and isn't one."""


@pytest.mark.parametrize("kind", [list, tuple, ListOfConfigurations])
def test_callbacks_and_options_in_other_sequences(kind):
    """Configuration tools have list types of their own."""
    made = often()
    callbacks = kind(made)
    _, _, said = fit(list(callbacks) if kind is not list else callbacks)
    assert said == []
    callback = DeadFilters(layers=kind(["net.0", "net.3"]))
    fit([callback])
    assert set(callback.dead) == {"net.0", "net.3"}


@pytest.mark.parametrize("name", ALL)
def test_callbacks_can_be_pickled_and_copied_before_and_after_a_fit(name):
    """`ddp_spawn` pickles them; a sweep copies them."""
    callbacks = ALL[name]()
    twin = copy.deepcopy(pickle.loads(pickle.dumps(callbacks)))
    logger = Capture()
    fit(twin, logger=logger)
    assert logger.of_interp()
    again = copy.deepcopy(pickle.loads(pickle.dumps(twin)))
    assert [callback.state_key for callback in again] == [callback.state_key for callback in callbacks]


class Keeping(Net):
    """Copies its callbacks while the validation runs, as whoever keeps the whole trainer does."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def _copy(self):
        callbacks = self.trainer.callbacks
        self.copied.append(_keys(copy.deepcopy(pickle.loads(pickle.dumps(callbacks)))) == _keys(callbacks))

    def validation_step(self, batch, batch_idx):
        self._copy()
        super().validation_step(batch, batch_idx)

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._copy()


def test_callbacks_can_be_pickled_and_copied_during_validation():
    """Inside a batch and between two of them."""
    model, callbacks = Keeping(), [*often(), Interp("full", name="second", on_error="raise")]
    trainer = quiet_trainer(callbacks=callbacks, logger=Capture(), num_sanity_val_steps=0, max_epochs=1)
    trainer.fit(model, loader(), loader(samples=12, seed=1, shuffle=False))
    assert model.copied == [True] * 4


class KeepingSteps(Keeping):
    """Copies them in the middle of each training step."""

    def training_step(self, batch, batch_idx):
        self._copy()
        loss = super().training_step(batch, batch_idx)
        self._copy()
        return loss

    def on_before_backward(self, loss):
        self._copy()

    def on_before_optimizer_step(self, optimizer):
        self._copy()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._copy()


def test_callbacks_can_be_pickled_and_copied_in_the_middle_of_a_step():
    """A probed one too, in which hooks are on the model."""
    model, callbacks = KeepingSteps(), [*often(), Interp("full", name="second", on_error="raise")]
    trainer = quiet_trainer(callbacks=callbacks, logger=Capture(), num_sanity_val_steps=0, max_epochs=1)
    trainer.fit(model, loader(), loader(samples=12, seed=1, shuffle=False))
    assert len(model.copied) > 8
    assert all(model.copied)


def _keys(callbacks):
    return [callback.state_key for callback in callbacks]


@pytest.mark.slow
def test_callbacks_survive_the_way_to_a_spawned_process():
    """With a fresh interpreter on the other side."""
    callbacks = [*often(), Interp(name="second")]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_keys, (callbacks,)) == _keys(callbacks)


# ---------------------------------------------------------------------- both namespaces, data modules, YAML


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", WHOLE)
def test_both_namespaces_with_a_data_module(namespace, name):
    """The Trainer, the module, the data and the logger of one namespace, our callbacks in both."""
    own = kit(namespace)
    logger = own.Capture()
    trainer = own.trainer(callbacks=WHOLE[name](), logger=logger)
    assert fit_quietly(trainer, own.Net(), datamodule=own.DataModule()) == []
    assert "interp/dead_filters" in logger.of_interp()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lightning_cli_takes_the_callbacks_from_yaml(namespace, tmp_path, monkeypatch):
    """`class_path: lightning_interp.Interp`, with options and without, and its parts."""
    own = kit(namespace)
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # what Lightning itself calls
    cli = importlib.import_module(f"{namespace}.cli").LightningCLI
    options = {"save_config_callback": None, "seed_everything_default": False}
    made = cli(own.Net, own.DataModule, args=["fit", "--config", str(config)], **options)
    kinds = [type(callback).__name__ for callback in made.trainer.callbacks if "interp" in type(callback).__module__]
    assert kinds == ["Interp", "DeadFilters", "FilterGrid", "Alerts", "ActivationSparsity", "TrainingDynamics"]
    assert "interp/dead_filters" in made.trainer.callback_metrics


YAML = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_interp.Interp
      init_args:
        level: light
        layers: ["net.*"]
        on_alert: log
    - class_path: lightning_interp.DeadFilters
      init_args: {split: train, name: own, window_steps: 2}
    - lightning_interp.FilterGrid
    - class_path: lightning_interp.Alerts
      init_args:
        name: own
        mute: ["dead_filters:net.9"]
        rules:
          - class_path: lightning_interp.DeadFiltersRule
    - class_path: lightning_interp.ActivationSparsity
      init_args: {every_n_train_steps: 2, num_samples: 2}
    - class_path: lightning_interp.TrainingDynamics
      init_args: {name: own, dense_steps: 3}
"""


def test_alerts_alone_bring_what_their_rules_need():
    """And write nothing but alerts."""
    logger = Capture()
    alerts = Alerts(on_error="raise")
    fit([alerts], logger=logger)
    assert {type(child) for child in alerts.children} >= {DeadFilters, TrainingDynamics}
    assert {tag for tag in logger.of_interp() if "alerts" not in tag} == set()


def test_interp_holds_all_of_its_parts():
    """Each callback once; the list for those who want to change it is the same."""
    parts = [type(child) for child in Interp().children]
    drawing = {ActivationSparsity, FilterGrid, SaliencyMaps, EmbeddingProjection}
    assert set(parts) == {DeadFilters, TrainingDynamics, Alerts, *drawing}
    assert parts == [type(callback) for callback in lightning_interp.standard_callbacks()]


# ---------------------------------------------------------------------- what a second pair of eyes found


def test_the_same_trainer_in_a_second_fit_keeps_the_alerts_of_the_first(tmp_path):
    """A warm-up and a fine-tuning write into one folder."""
    board = pl.loggers.TensorBoardLogger(tmp_path, version=0)
    trainer = quiet_trainer(callbacks=[Interp(on_error="raise")], logger=board, max_epochs=1)
    trainer.fit(Net(), loader(), loader(12, seed=1, shuffle=False))
    (path,) = tmp_path.rglob("alerts.jsonl")
    line = Alert(rule="bad_start", severity="warning", message="Kept.").to_json() + "\n"
    path.write_text(line)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Net(), loader(), loader(12, seed=1, shuffle=False))
    assert path.read_text().startswith(line)


def test_layers_may_name_what_only_some_callbacks_show():
    """A convolution and a linear layer: `FilterGrid` shows the one, `DeadFilters` both."""
    logger = Capture()
    names = [name for name, module in Net().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][:3]
    fit([Interp(layers=[*names, "*"], on_error="raise")], logger=logger, max_epochs=1)
    assert logger.of_interp()


def test_rare_validation_does_not_delay_the_dead_filters():
    """With a validation in every tenth epoch the training batches are watched."""
    logger = Capture()
    fit([DeadFilters(on_error="raise")], logger=logger, max_epochs=2, check_val_every_n_epoch=10)
    assert len(logger.of_interp()["interp/dead_filters"]) == 3


def test_a_second_instance_does_not_write_into_the_history_of_the_first():
    """The rules would read every number twice."""
    alone, both = Interp("light", on_error="raise"), Interp("light", on_error="raise")
    seed_all(0)
    fit([alone], max_epochs=2)
    seed_all(0)
    fit([both, DeadFilters(split="train", name="second", on_error="raise")], max_epochs=2)
    series = [interp.alerts.state_dict()["history"]["series"] for interp in (alone, both)]
    assert [row[0] for row in series[0]] == [row[0] for row in series[1]]
    assert [len(row[3]) for row in series[0]] == [len(row[3]) for row in series[1]]
