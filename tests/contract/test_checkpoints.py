"""Checkpoints: written at any moment, readable without this package, and a resumed run goes on as if never stopped."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

from lightning_interp import Interp
from tests.contract.battery import differences, fit_quietly
from tests.contract.factories import ALL, WHOLE, often
from tests.contract.hooks import assert_nothing_left, hooks_on
from tests.contract.nets import Capture, Net, body, loader, pl, quiet_trainer
from tests.reading import summaries

LOAD_WITHOUT_US = """
import importlib.abc, json, sys
import torch

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"lightning_interp", "tests"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
checkpoint = torch.load(sys.argv[1], weights_only=False)
network = checkpoint["hyper_parameters"]["network"]
hooks = [hook for module in network.modules() for place, table in vars(module).items()
         if "forward" in place and "hook" in place for hook in table.values() if callable(hook)]
inert = all(type(hook).__module__ in {"functools", "builtins"} for hook in hooks)
scores = network.eval()(torch.zeros(2, 1, 8, 8)).tolist()
print(json.dumps({"hooks": len(hooks), "inert": inert, "scores": scores, "callbacks": sorted(checkpoint["callbacks"])}))
"""


class Saving(pl.LightningModule):
    """Keeps the network itself among its hyperparameters; optionally writes checkpoints from inside its own step."""

    def __init__(self, network, folder=None):
        super().__init__()
        self.save_hyperparameters()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        if self.hparams.folder is not None and batch_idx == 1:
            self.trainer.save_checkpoint(f"{self.hparams.folder}/inside.ckpt")
        return nn.functional.cross_entropy(scores, batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Lightning says itself that a module among the hyperparameters is stored twice.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Attribute 'network' is an instance of `nn.Module`",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


def load_without_us(path, tmp_path):
    """What a process that can't import this package finds in a checkpoint."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD_WITHOUT_US, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["often", "Interp"])
def test_checkpoints_of_every_step_load_without_this_package(name, tmp_path):
    """Written in the middle of windows, with the network among the hyperparameters: no hook goes along."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    model = Saving(body())
    trainer = quiet_trainer(callbacks=[saver, *WHOLE[name]()], enable_checkpointing=True, max_epochs=1)
    trainer.fit(model, loader(), loader(12, seed=1, shuffle=False))
    written = sorted(tmp_path.glob("*.ckpt"))
    assert len(written) == 4
    for path in written:
        network = torch.load(path, weights_only=False)["hyper_parameters"]["network"]
        assert hooks_on(network) == {}, path.name
    found = load_without_us(written[1], tmp_path)
    assert found["hooks"] == 0
    assert len(found["scores"]) == 2
    assert found["callbacks"]


def test_checkpoint_from_inside_a_step_loads_without_this_package(tmp_path):
    """In mid-forward hooks are on; what is left of them in the file is a call of Python's own that does nothing."""
    model = Saving(body(), str(tmp_path))
    quiet_trainer(callbacks=often(), max_epochs=1).fit(model, loader(), loader(12, seed=1, shuffle=False))
    found = load_without_us(tmp_path / "inside.ckpt", tmp_path)
    assert found["inert"]
    loaded = torch.load(tmp_path / "inside.ckpt", weights_only=False)["hyper_parameters"]["network"]
    fresh = body()
    fresh.load_state_dict(loaded.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(images), loaded.eval()(images))


@pytest.mark.parametrize("name", ["often", "Interp"])
def test_copies_made_inside_a_step_are_free_of_hooks_that_do_anything(name):
    """Momentum twins are often made by `deepcopy(model)` in mid-training; they must neither listen nor be heard."""

    class Copying(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                self.__dict__["twin"] = copy.deepcopy(self.net)
                self.twin(batch[0])
                self.__dict__["pickled"] = pickle.dumps(self.twin)
            return loss

    model = Copying()
    callbacks = WHOLE[name]()
    quiet_trainer(callbacks=callbacks).fit(model, loader(), loader(12, seed=1, shuffle=False))
    assert_nothing_left(model)
    images = torch.randn(2, 1, 8, 8)
    expected = model.twin.eval()(images)
    assert torch.equal(pickle.loads(model.pickled).eval()(images), expected)
    trainer = quiet_trainer(callbacks=WHOLE[name](), max_epochs=1)
    trainer.fit(Net(model.twin.train()), loader(), loader(12, seed=1, shuffle=False))


def test_deepcopy_inside_a_step_does_not_disturb_the_measurement():
    """The same deaths with the copy and without."""

    class Copying(Quiet):
        def training_step(self, batch, batch_idx):
            copy.deepcopy(self)(batch[0] - 5.0)
            return super().training_step(batch, batch_idx)

    found = []
    for cls in (Quiet, Copying):
        model, loaders = steady()
        logger = Capture()
        quiet_trainer(callbacks=often(), logger=logger).fit(cls(model.net), *loaders)
        found.append({tag: rows for tag, rows in logger.of_interp().items() if "dead" in tag or "sparsity" in tag})
    assert differences(*found) == []
    assert found[0]


# ---------------------------------------------------------------------- several runs


def test_two_trainers_in_one_script_do_not_mix():
    """Callbacks of their own, run one after the other, and one Trainer inside the other's training."""
    logs = []
    for _ in range(2):
        torch.manual_seed(0)
        logger = Capture()
        quiet_trainer(callbacks=often(), logger=logger).fit(Net(), loader(), loader(12, seed=1, shuffle=False))
        logs.append(logger)

    class Nested(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                with torch.random.fork_rng():
                    quiet_trainer(callbacks=often(), max_epochs=1).fit(Net(), loader(), loader(12, shuffle=False))

    torch.manual_seed(0)
    outer = Capture()
    quiet_trainer(callbacks=often(), logger=outer).fit(Nested(), loader(), loader(12, seed=1, shuffle=False))
    tags = [set(logger.of_interp()) for logger in (*logs, outer)]
    assert tags[0] == tags[1] == tags[2]
    assert [len(rows) for rows in logs[0].of_interp().values()] == [len(rows) for rows in outer.of_interp().values()]


class Quiet(Net):
    """No random numbers of its own, so that a resumed run can be the same."""

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.6, momentum=0.9)


def steady():
    """Loaders in a fixed order, and a model without dropout; some filters die."""
    torch.manual_seed(3)
    net = body(0.0)
    with torch.no_grad():
        net[1].bias[0] = -100.0  # born dead
        net[3].bias[1] = -0.4
    loaders = loader(shuffle=False, noise=0.0), loader(12, seed=1, shuffle=False, noise=0.0)
    return Quiet(net), loaders


@pytest.mark.parametrize("name", ALL)
def test_same_callbacks_in_two_fits_give_the_same_twice(name):
    """Nothing of the first fit is left in them."""
    callbacks = ALL[name]()
    found = []
    for _ in range(2):
        model, loaders = steady()
        logger = Capture()
        quiet_trainer(callbacks=callbacks, logger=logger).fit(model, *loaders)
        found.append(logger.of_interp())
        assert_nothing_left(model)
    assert differences(*found) == []
    assert found[0]


@pytest.mark.parametrize("name", WHOLE)
def test_same_trainer_can_fit_again_and_test_validate_predict(name):
    """Only `fit` is watched."""
    model, loaders = steady()
    logger = Capture()
    trainer = quiet_trainer(callbacks=WHOLE[name](), logger=logger)
    trainer.fit(model, *loaders)
    before = len(logger.of_interp()["interp/dead_filters"])
    trainer.validate(model, loaders[1], verbose=False)
    trainer.test(model, loaders[1], verbose=False)
    assert len(trainer.predict(model, loaders[1])) == 2
    assert len(logger.of_interp()["interp/dead_filters"]) == before
    assert_nothing_left(model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, *loaders)
    assert len(logger.of_interp()["interp/dead_filters"]) > before
    assert_nothing_left(model)


def test_validate_test_and_predict_without_a_fit_do_nothing(tmp_path):
    """A Trainer that only evaluates."""
    model, loaders = steady()
    logger = Capture()
    trainer = quiet_trainer(callbacks=often(), logger=logger)
    trainer.validate(model, loaders[1], verbose=False)
    trainer.test(model, loaders[1], verbose=False)
    trainer.predict(model, loaders[1])
    assert logger.of_interp() == {}
    assert_nothing_left(model)


# ---------------------------------------------------------------------- resume


class Killed(pl.Callback):
    """Ends the process, as far as a test can: after so many batches."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise SystemExit(1)


def killed(make_callbacks, *, epochs, after, folder, saves):
    """The first part of a run, which wrote a checkpoint and was killed at the beginning of the next batch."""
    model, loaders = steady()
    logger = Capture()
    saver = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **saves)
    callbacks = [*make_callbacks(), saver, Killed(after)]
    trainer = quiet_trainer(callbacks=callbacks, logger=logger, max_epochs=epochs, enable_checkpointing=True)
    with pytest.raises(SystemExit):
        trainer.fit(model, *loaders)
    return logger


def fit_from(make_callbacks, *, epochs, ckpt_path=None, folder=None, saves=None):
    """One part of a run: the logger, the callbacks and the model."""
    model, loaders = steady()
    logger, callbacks = Capture(), make_callbacks()
    savers = [] if saves is None else [pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **saves)]
    trainer = quiet_trainer(
        callbacks=[*callbacks, *savers], logger=logger, max_epochs=epochs, enable_checkpointing=saves is not None
    )
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return logger, callbacks, model


def alerts_of(callbacks):
    """All alerts as dictionaries."""
    from lightning_interp import Alerts
    from lightning_interp.callbacks._family import with_children

    found = [alert for each in with_children(callbacks) if isinstance(each, Alerts) for alert in each.history]
    return [asdict(alert) for alert in found]


@pytest.mark.parametrize("name", ALL)
def test_resume_at_an_epoch_boundary_equals_the_uninterrupted_run(name, tmp_path):
    """All numbers of all tags and all alerts; what the first part wrote and the second add up to the whole."""
    whole, whole_callbacks, whole_model = fit_from(ALL[name], epochs=4)
    first = killed(ALL[name], epochs=4, after=8, folder=tmp_path, saves={"every_n_epochs": 1})
    path = tmp_path / "step=8.ckpt"
    second, second_callbacks, second_model = fit_from(ALL[name], epochs=4, ckpt_path=path)
    for expected, actual in zip(whole_model.parameters(), second_model.parameters(), strict=True):
        assert torch.equal(expected, actual)
    joined = {tag: list(rows) for tag, rows in first.of_interp().items()}
    for tag, rows in second.of_interp().items():
        joined.setdefault(tag, []).extend(rows)
    assert differences(_by_tag(whole.of_interp()), _by_tag(joined)) == []
    assert alerts_of(second_callbacks) == alerts_of(whole_callbacks)


def _by_tag(rows):
    return {tag: sorted(rows[tag]) for tag in sorted(rows)}


@pytest.mark.parametrize("step", [2, 3, 5])
@pytest.mark.parametrize("name", ["DeadFilters_train", "TrainingDynamics", "FilterGrid", "Interp"])
def test_resume_in_mid_epoch_loses_and_repeats_nothing(name, step, tmp_path):
    """With the order of the data fixed by position in the epoch, what is written after the resume follows on."""
    killed(ALL[name], epochs=3, after=step, folder=tmp_path, saves={"every_n_train_steps": 1})
    second, callbacks, _ = fit_from(ALL[name], epochs=3, ckpt_path=tmp_path / f"step={step}.ckpt")
    whole, _, _ = fit_from(ALL[name], epochs=3)
    for tag, rows in second.of_interp().items():
        steps = [at for at, _ in rows]
        assert steps == sorted(set(steps)), tag
    keys = [(alert["rule"], alert["layer"], alert["status"], alert["severity"]) for alert in alerts_of(callbacks)]
    assert len(keys) == len(set(keys))
    if name in {"TrainingDynamics", "Interp"}:
        tag = "interp/learning_rate"
        expected = [at for at, _ in whole.of_interp()[tag] if at >= step]
        actual = [at for at, _ in second.of_interp()[tag] if at >= step]
        assert actual == expected


@pytest.fixture
def _held(monkeypatch):
    """Event files keep what is written to them until they are flushed, as those of TensorFlow do."""
    write, flush, held = RecordWriter.write, RecordWriter.flush, []

    def release(writer):
        while held:
            write(*held.pop(0))
        flush(writer)

    monkeypatch.setattr(RecordWriter, "write", lambda writer, data: held.append((writer, data)))
    monkeypatch.setattr(RecordWriter, "flush", release)


@pytest.mark.usefixtures("_held")
def test_what_a_checkpoint_takes_for_written_is_on_disk(tmp_path):
    """A resumed run does not write it again."""
    from lightning_interp import DeadFilters

    class Silent(Net):
        """Logs nothing, which would have the logger write what it holds."""

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    class Looking(pl.Callback):
        """After each checkpoint: the steps that somebody would find if the process were killed now."""

        def __init__(self):
            self.found = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            values = [(event.step, value.tag) for event in summaries(tmp_path) for value in event.summary.value]
            self.found.append([step for step, tag in values if tag == "interp.dead_filters/00_net.0"])

    looking, saver = Looking(), pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    ours = DeadFilters(split="train", window_steps=1, on_error="raise")
    options = {"logger": pl.loggers.TensorBoardLogger(tmp_path), "enable_checkpointing": True, "max_epochs": 1}
    quiet_trainer(callbacks=[ours, saver, looking], **options).fit(Silent(), loader())
    assert looking.found == [list(range(step)) for step in range(4)]


def test_open_window_goes_on_after_a_resume(tmp_path):
    """A filter that fired before the cut is not called dead because it is silent after it."""
    from lightning_interp import DeadFilters

    def make():
        return [DeadFilters(split="train", window_steps=4, on_error="raise")]

    class Early(Quiet):
        """Filter 0 of the last convolution fires in the first batch of each epoch only."""

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net[0].bias[0] = 50.0 if batch_idx == 0 else -50.0
            return super().training_step(batch, batch_idx)

    def run(epochs, ckpt_path=None, saver=()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        callbacks = make()
        trainer = quiet_trainer(callbacks=[*callbacks, *saver], max_epochs=epochs, enable_checkpointing=bool(saver))
        trainer.fit(Early(net), loader(shuffle=False, noise=0.0), ckpt_path=ckpt_path)
        return callbacks[0]

    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = run(2, saver=[saver])
    resumed = run(2, tmp_path / "step=6.ckpt")
    assert 0 not in whole.dead["net.0"]
    assert resumed.dead == whole.dead
    assert resumed.events == whole.events


@pytest.mark.parametrize("name", ALL)
def test_state_of_the_callbacks_is_plain(name, tmp_path):
    """Lightning and torch load checkpoints with `weights_only=True` by default."""
    saves = {"every_n_train_steps": 1}
    fit_from(ALL[name], epochs=1, folder=tmp_path, saves=saves)
    keys = {callback.state_key for callback in ALL[name]()}
    for path in tmp_path.glob("*.ckpt"):
        loaded = torch.load(path, weights_only=True)["callbacks"]
        assert any(key in loaded for key in keys) or name == "ActivationSparsity"


def test_checkpoint_of_a_run_without_callbacks_can_be_resumed_with_them(tmp_path):
    """Somebody adds the line later."""
    fit_from(list, epochs=1, folder=tmp_path, saves={"every_n_epochs": 1})
    model, loaders = steady()
    logger = Capture()
    trainer = quiet_trainer(callbacks=[Interp()], logger=logger)
    said = fit_quietly(trainer, model, *loaders, ckpt_path=tmp_path / "step=4.ckpt")
    assert len(said) == 1
    assert "does not have the weights before the first step" in said[0]
    assert min(step for rows in logger.of_interp().values() for step, _ in rows) >= 3


def _without_schema(state):
    """As a state was written before it had a schema: the same, without that number, and batches one by one."""
    if not isinstance(state, dict):
        return state
    older = {key: _without_schema(value) for key, value in state.items() if key != "schema"}
    if "sparsity" in older:
        older["fractions"] = {name: [zeros / count] for name, (zeros, count) in older.pop("zeros").items()}
        older["version"] = 1
    return older


@pytest.mark.parametrize("name", ["often", "Interp"])
def test_checkpoint_of_the_version_before_is_read_as_if_it_were_ours(name, tmp_path):
    """In mid-epoch, with open windows: what follows equals, number by number, what follows our own checkpoint."""
    killed(WHOLE[name], epochs=3, after=6, folder=tmp_path, saves={"every_n_train_steps": 1})
    path = tmp_path / "step=6.ckpt"
    own, own_callbacks, own_model = fit_from(WHOLE[name], epochs=3, ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    assert any("schema" in state for state in checkpoint["callbacks"].values())
    checkpoint["callbacks"] = {key: _without_schema(state) for key, state in checkpoint["callbacks"].items()}
    torch.save(checkpoint, tmp_path / "older.ckpt")
    older, older_callbacks, older_model = fit_from(WHOLE[name], epochs=3, ckpt_path=tmp_path / "older.ckpt")
    assert differences(dict(own_model.state_dict()), dict(older_model.state_dict())) == []
    expected, found = own.of_interp(), older.of_interp()
    assert expected.keys() == found.keys()
    for tag, rows in expected.items():
        assert [step for step, _ in rows] == [step for step, _ in found[tag]], tag
        if "sparsity" in tag:
            assert [v for _, v in rows] == pytest.approx([v for _, v in found[tag]], rel=1e-6), tag
        else:
            assert differences(rows, found[tag]) == [], tag
    assert len(alerts_of(own_callbacks)) == len(alerts_of(older_callbacks))


@pytest.mark.parametrize("name", ["often", "Interp"])
def test_checkpoint_of_a_newer_version_is_said_once_a_callback_and_begun_anew(name, tmp_path):
    """What its numbers mean is not known here; the training goes on, and so do the measurements."""
    killed(WHOLE[name], epochs=3, after=4, folder=tmp_path, saves={"every_n_train_steps": 1})
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    checkpoint["callbacks"] = {key: _newer(state) for key, state in checkpoint["callbacks"].items()}
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    model, loaders = steady()
    logger = Capture()
    trainer = quiet_trainer(callbacks=WHOLE[name](), logger=logger, max_epochs=3)
    said = fit_quietly(trainer, model, *loaders, ckpt_path=tmp_path / "newer.ckpt")
    newer = [message for message in said if "newer version of lightning-interp (schema 99" in message]
    assert len(newer) == len(set(newer)) > 1 - (name == "Interp")
    assert all("failed in" not in message for message in said)
    assert max(step for step, _ in logger.of_interp()["interp/learning_rate"]) == 11
    assert_nothing_left(model)


def _newer(state):
    if not isinstance(state, dict):
        return state
    return {key: 99 if key == "schema" else _newer(value) for key, value in state.items()}


def test_checkpoint_of_another_version_costs_the_callback_at_most():
    """A state that can't be read is said once; training goes on."""
    callback = Interp()
    with pytest.warns(UserWarning, match="failed in load_state_dict"):
        callback.load_state_dict({child.state_key: {"nonsense": 1} for child in callback.children})
