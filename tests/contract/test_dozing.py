"""While nothing is due, `Interp` takes its hooks out of Lightning's sight, and measures the same."""

import copy
import gc
import itertools
import pickle
import weakref
from unittest import mock

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import Alerts, Interp
from lightning_interp.callbacks import training_dynamics
from lightning_interp.callbacks._backlog import Backlog
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks._guarding import IN_BATCH
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import InterpWarning
from tests.contract.calls import calls_in
from tests.contract.nets import pl, quiet_trainer

STEPS = 180  # of an epoch
IDLE = range(122, 138)  # steps between two probes, two samples and two looks


class Net(pl.LightningModule):
    """One convolution.

    Args:
        returns: What `training_step` gives: "loss", "dict", "sometimes" (every third one gives None) or "manual": a
            dict with a loss that still has its graph.
    """

    def __init__(self, returns="loss"):
        super().__init__()
        torch.manual_seed(0)
        self.returns, self.automatic_optimization = returns, returns != "manual"
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.returns == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if self.returns == "sometimes" and batch_idx % 3 == 2:
            return None
        return loss if self.returns in ("loss", "sometimes") else {"loss": loss, "more": 1}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Sight(pl.Callback):
    """What Lightning finds on another callback, in the middle of each step."""

    def __init__(self, watched):
        self.watched, self.found = watched, {}

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.found[trainer.global_step] = {name for name in IN_BATCH if callable(getattr(self.watched, name))}


def loader(count=2 * STEPS):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=2)


def fit(*callbacks, module=None, ckpt_path=None, **options):
    module = Net() if module is None else module
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
    trainer.fit(module, loader(), loader(8), ckpt_path=ckpt_path)
    return trainer


def kept_awake(monkeypatch):
    monkeypatch.setattr(Family, "_doze", lambda *args: None)


def written(trainer):
    """All numbers that the rules read, but for the time that something took."""
    history = Session.of(trainer).history
    series = {key: list(series) for key, series in history.series.items()}
    return series, dict(history.facts)


def test_lightning_finds_one_hook_where_nothing_is_due_and_all_elsewhere():
    interp = Interp(on_error="raise")
    sight = Sight(interp)
    fit(interp, sight)
    assert [step for step in IDLE if sight.found[step] != {"on_train_batch_end"}] == []
    assert [step for step in (0, 1, 199) if sight.found[step] != set(IN_BATCH)] == []
    assert not IN_BATCH & vars(interp).keys()


@pytest.mark.parametrize(
    ("returns", "options"),
    [
        *itertools.product(
            ["loss", "dict", "sometimes", "manual"],
            [{}, {"val_check_interval": 50}, {"max_steps": 130, "max_epochs": -1}],
        ),
        ("loss", {"accumulate_grad_batches": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_what_is_measured_is_the_same_as_awake(returns, options, monkeypatch):
    """Each loss at its own step, and so all that the rules say of it."""
    results = []
    for _ in range(2):
        interp = Interp(on_error="raise")
        trainer = fit(interp, module=Net(returns), **options)
        results.append((written(trainer), [alert.message for alert in interp.alerts.history]))
        kept_awake(monkeypatch)
    assert results[0] == results[1]
    losses = results[0][0][0]["loss", None]
    assert len(losses) > 60


def test_values_that_arrive_a_step_later_are_the_same_as_awake(monkeypatch):
    """As on a GPU: the step after each fetch reads them."""
    monkeypatch.setattr(training_dynamics, "_reads_later", lambda trainer: True)
    interp = Interp(on_error="raise")
    sight = Sight(interp)
    results = [written(fit(interp, sight))]
    assert all(sight.found[step] == {"on_train_batch_end"} for step in IDLE)
    kept_awake(monkeypatch)
    results.append(written(fit(Interp(on_error="raise"))))
    assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_with_what_was_noted(tmp_path, monkeypatch):
    """From a checkpoint that was written while it dozed."""
    results = []
    for _ in range(2):
        path = tmp_path / "step=130.ckpt"
        for options in ({"max_steps": 140, "max_epochs": -1}, {"ckpt_path": path, "max_epochs": 1}):
            saving = ModelCheckpoint(tmp_path, every_n_train_steps=130, save_top_k=-1, filename="{step}")
            trainer = fit(Interp(on_error="raise"), saving, enable_checkpointing=True, **options)
        results.append(written(trainer))
        path.unlink()
        kept_awake(monkeypatch)
    assert results[0] == results[1]
    assert [step for step, _ in results[0][0]["loss", None]][-60:] == list(range(120, 180))


def test_a_hook_that_was_replaced_on_the_instance_is_called_at_each_step():
    """By a tool that wraps callbacks, for example."""
    interp, called = Interp(on_error="raise"), []
    original = interp.on_before_backward
    interp.on_before_backward = lambda trainer, *args: (called.append(trainer.global_step), original(trainer, *args))
    fit(interp)
    assert called == list(range(2 * STEPS))


class Counts(InterpCallback):
    """Has something to do in each batch, but not at its end; as one of a user's, it says nothing about it."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.steps.append(trainer.global_step)


class Own(Interp):
    """Does so itself."""

    def __init__(self):
        super().__init__(on_error="raise")
        self.steps = []

    def on_after_backward(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


def test_whoever_has_something_to_do_is_called_at_each_step():
    interp, own = Interp(on_error="raise"), Own()
    counts = Counts()
    interp.children.append(counts)
    fit(interp, own)
    assert counts.steps == own.steps == list(range(2 * STEPS))


def test_inside_a_callback_of_the_users_all_hooks_stay():
    class Holder(pl.Callback):
        """Passes hooks on without a look at what it calls."""

        def __init__(self, inner):
            self.inner, self.seen = inner, set()

        def __getattribute__(self, name):
            if not name.startswith("on_") and name not in ("setup", "teardown"):
                return super().__getattribute__(name)
            if name in IN_BATCH:
                self.seen.add(callable(getattr(self.inner, name)))
            return getattr(self.inner, name)

    holder = Holder(Interp(on_error="raise"))
    fit(holder, max_epochs=1)
    assert holder.seen == {True}
    assert not holder.inner.alerts.resting


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_all_hooks_are_back(kind):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == IDLE[3]:
                raise kind("in the middle")
            return super().training_step(batch, batch_idx)

    interp = Interp(on_error="raise")
    sight = Sight(interp)
    with pytest.raises((kind, SystemExit)):
        fit(interp, sight, module=Fails())
    assert sight.found[IDLE[2]] == {"on_train_batch_end"}
    assert not IN_BATCH & vars(interp).keys()
    trainer = fit(interp, max_epochs=1)
    assert [point.step for point in Session.of(trainer).history.get("loss")] == list(range(STEPS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_one_that_dozes_works(copied):
    class Copies(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == IDLE[3]:
                self.copy = copied(interp)

    interp, copies = Interp(on_error="raise"), Copies()
    fit(interp, copies, max_epochs=1)
    assert not callable(copies.copy.on_before_backward)  # it was asleep
    trainer = fit(copies.copy, max_epochs=1)
    assert not IN_BATCH & vars(copies.copy).keys()
    assert [point.step for point in Session.of(trainer).history.get("loss")] == list(range(STEPS))


def test_a_note_that_fails_makes_its_callback_rest_and_no_other(monkeypatch):
    def broken(backlog, outputs):
        raise ValueError("no room")

    monkeypatch.setattr(Backlog, "_note", broken)
    interp = Interp()
    with pytest.warns(InterpWarning, match="TrainingDynamics failed in on_train_batch_end with ValueError: no room"):
        trainer = fit(interp)
    assert [type(child).__name__ for child in interp.children if child.resting] == ["TrainingDynamics"]
    assert trainer.global_step == 2 * STEPS


def test_what_a_loss_was_computed_from_is_not_kept():
    """Where the user hands it back with its graph; the activations of fifty steps would be."""
    backlog = Backlog()
    hidden = torch.ones(3, requires_grad=True) * 3
    loss, gone = (hidden**2).sum(), weakref.ref(hidden)
    backlog.notes_from(7)({"loss": loss})
    del hidden, loss
    gc.collect()
    assert gone() is None
    (item,) = backlog.take()
    assert (item.step, item.values["loss"]) == (7, [27.0])


def test_losses_are_noted_at_their_own_steps_among_others():
    """A step whose loss is missing takes its place; what is added after a note stands after it."""
    backlog = Backlog()
    note = backlog.notes_from(3)
    for outputs in (torch.tensor(1.0), None, {"loss": 2.0}, {"loss": torch.ones(2)}, {}):
        note(outputs)
    assert len(backlog) == 5
    backlog.add("other", 8, {"x": torch.tensor(0.0)})
    note(torch.tensor(4.0))
    assert [(item.kind, item.step) for item in backlog.take()] == [
        ("loss", 3), ("loss", 5), ("other", 8), ("loss", 8)
    ]  # fmt: skip
    note = backlog.notes_from(20)
    note(torch.tensor(5.0))
    assert [(state["step"], state["values"]["loss"]) for state in backlog.state_dict()] == [(20, [5.0])]


@pytest.mark.parametrize("make", [Interp, Alerts, lambda: Interp(budget=0.02)])
def test_a_step_on_which_nothing_is_due_takes_few_calls(make, monkeypatch):
    """Of Python and C functions, in all that Lightning calls."""
    original, counts = Family._while_dozing, {}

    def counted(self, trainer, *args):
        counts[trainer.global_step - 1] = calls_in(original, self, trainer, *args)

    monkeypatch.setattr(Family, "_while_dozing", counted)
    fit(make())
    assert all(counts[step] <= 10 for step in IDLE)


class At(pl.Callback):
    """Does something as a step begins, after the callbacks before it in the list have seen that."""

    def __init__(self, **actions):
        self.actions = {int(name[1:]): action for name, action in actions.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.actions.get(trainer.global_step, lambda trainer: None)(trainer)


class Told(Net):
    """Notes each loss by the step that it belongs to."""

    def __init__(self, returns="loss"):
        super().__init__(returns)
        self.told = {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        value = loss["loss"] if isinstance(loss, dict) else loss
        self.told.setdefault(self.trainer.fit_loop.epoch_loop._batches_that_stepped, []).append(value.item())
        return loss

    def agrees(self, trainer):
        """Whether all losses that were recorded are their step's own, one for each."""
        points = Session.of(trainer).history.get("loss")
        own = {step: sum(values) / len(values) for step, values in self.told.items()}
        steps = [point.step for point in points]
        return steps == sorted(set(steps)) and all(point.value == pytest.approx(own[point.step]) for point in points)


def test_a_hook_that_is_wrapped_while_it_dozes_does_not_keep_it_asleep():
    interp, called = Interp(on_error="raise"), []

    def wrap(trainer):
        original = interp.on_train_batch_end
        interp.on_train_batch_end = lambda *args: (called.append(trainer.global_step), original(*args))

    module = Told()
    trainer = fit(interp, At(s125=wrap), module=module)
    assert called == list(range(126, 2 * STEPS + 1))
    assert IN_BATCH & vars(interp).keys() == {"on_train_batch_end"}
    assert module.agrees(trainer)
    probes = len(Session.of(trainer).history.get("step_ratio"))
    assert probes == len(Session.of(fit(Interp(on_error="raise"))).history.get("step_ratio"))
    assert len(Session.of(fit(interp)).history.get("step_ratio")) == probes


def test_another_hook_that_is_put_on_while_it_dozes_stays():
    interp, called = Interp(on_error="raise"), []
    fit(interp, At(s125=lambda trainer: setattr(interp, "on_before_backward", lambda *args: called.append(1))))
    assert len(called) == 2 * STEPS - 125


def test_a_patch_that_is_taken_off_later_does_not_put_it_to_sleep():
    interp = Interp(on_error="raise")
    patch = mock.patch.object(interp, "on_before_backward")
    fit(interp, At(s125=lambda trainer: patch.start(), s170=lambda trainer: patch.stop()))
    assert not IN_BATCH & vars(interp).keys()


def test_a_shallow_copy_of_one_that_dozes_works():
    interp, copies = Interp(on_error="raise"), []
    fit(interp, At(s125=lambda trainer: copies.append(copy.copy(interp))), max_epochs=1)
    trainer = fit(copies[0], max_epochs=1)
    assert [point.step for point in Session.of(trainer).history.get("loss")] == list(range(STEPS))


def test_accumulation_that_begins_while_it_dozes():
    module = Told()
    trainer = fit(Interp(on_error="raise"), At(s125=lambda t: setattr(t, "accumulate_grad_batches", 2)), module=module)
    assert len(module.told[130]) == 2
    assert module.agrees(trainer)


def test_one_that_is_taken_away_for_a_while_notes_nothing_at_the_wrong_step():
    interp, module = Interp(on_error="raise"), Told()
    away = At(s125=lambda t: t.callbacks.remove(interp), s150=lambda t: t.callbacks.append(interp))
    trainer = fit(interp, away, module=module)
    assert module.agrees(trainer)
    assert 126 not in {point.step for point in Session.of(trainer).history.get("loss")}


@pytest.mark.parametrize("dict_", [False, True])
def test_a_loss_that_stands_in_a_buffer_of_the_users_is_copied(dict_):
    """With manual optimization; otherwise Lightning copies it."""

    class Reuses(Told):
        def __init__(self):
            super().__init__("manual")
            self.kept = torch.zeros(())

        def training_step(self, batch, batch_idx):
            self.kept.copy_(super().training_step(batch, batch_idx)["loss"].detach())
            return {"loss": self.kept} if dict_ else self.kept

    module = Reuses()
    trainer = fit(Interp(on_error="raise"), module=module)
    assert module.agrees(trainer)
    assert len(Session.of(trainer).history.get("loss")) == 2 * STEPS
