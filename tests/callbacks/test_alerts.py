"""The callback that raises alerts, in real Trainers of both namespaces."""

import importlib
import json
import logging
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_interp.callbacks._measuring as measuring
from lightning_interp.alert_log import read_alerts
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import AlertRaised, ArgumentError, InterpWarning
from lightning_interp.rules import Alert, DeadFiltersRule, Rule, UndertrainedRule
from tests.reading import read

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
LIGHTNINGS_OWN = (
    "does not have many workers",
    "LeafSpec",
    "but have no `val_dataloader`",
    "exists and is not empty",
    "ended before the epoch ended",
    "callbacks used to create the checkpoint",
)


@pytest.fixture(params=NAMESPACES)
def lightning(request):
    return importlib.import_module(request.param)


def module(namespace=pl):
    """A linear classifier; the class belongs to one namespace."""

    class Net(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            """Nothing."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    return Net()


def loader(batches):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(2 * batches) % 3), batch_size=2)


def fit(alerts, *, namespace=pl, batches=30, model=None, folder=None, ckpt_path=None, val=False, **options):
    """Fits a tiny model; returns the Trainer."""
    callbacks = [alerts] if isinstance(alerts, InterpCallback) else alerts
    loggers = importlib.import_module(f"{namespace.__name__}.loggers")
    logger = loggers.TensorBoardLogger(folder, name="", version="run") if folder else False
    settings = {
        "max_epochs": 1,
        "logger": logger,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        **options,
    }
    with warnings.catch_warnings():
        for message in LIGHTNINGS_OWN:
            warnings.filterwarnings("ignore", f".*{message}")
        trainer = namespace.Trainer(callbacks=callbacks, **settings)
        trainer.fit(
            model or module(namespace),
            loader(batches) if isinstance(batches, int) else batches,
            loader(2) if val else None,
            ckpt_path=ckpt_path,
        )
    return trainer


@dataclass(frozen=True)
class LossSeen(Rule):
    """Fires from a step on, until another."""

    name: ClassVar[str] = "loss_seen"
    needs: ClassVar[tuple[str, ...]] = ("fake",)

    severity: str = "critical"
    start: int = 0
    end: int = 10**9
    layers: tuple[str, ...] = ("conv1", "conv2")

    def check(self, history, active):
        last = history.get("fake").last
        if last is not None and self.start <= last.step < self.end:
            for layer in self.layers:
                yield Alert(rule=self.name, severity=self.severity, layer=layer, value=last.value, message="Seen.")


@dataclass(frozen=True)
class Breaks(Rule):
    name: ClassVar[str] = "breaks"
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, history, active):
        raise ZeroDivisionError(f"at {history.step}")


class Measuring(InterpCallback):
    """Records the step at each batch end, and publishes a state."""

    measures: ClassVar[tuple[str, ...]] = ("fake", "other")

    def __init__(self, *, name=None, on_error="warn"):
        super().__init__(name=name, on_error=on_error)
        self.count = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        Session.of(trainer).history.record("fake", self.count, step=self.step_of(trainer))
        self.log_number(trainer, "fake", 1.0, step=self.step_of(trainer))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Failing(Measuring):
    """Measures something else, and fails."""

    measures: ClassVar[tuple[str, ...]] = ("broken",)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("no")


class Unneeded(Measuring):
    measures: ClassVar[tuple[str, ...]] = ("nobody_needs_this",)


@pytest.fixture(autouse=True)
def fake_classes(monkeypatch):
    """The measuring callbacks that can be brought: small ones."""
    monkeypatch.setattr(measuring, "measuring_classes", lambda: [Measuring, Failing, Unneeded])


def lines_of(folder):
    return [json.loads(line) for line in (Path(folder) / "run" / "alerts.jsonl").read_text().splitlines()]


def seen_in(folder):
    """What TensorBoard shows."""
    return read(Path(folder) / "run", "slow")


class TestEachOutlet:
    def test_raised_once_and_cleared_once_everywhere(self, lightning, tmp_path, caplog):
        alerts = Alerts(rules=[LossSeen(severity="warning", start=25, end=80)])
        with caplog.at_level(logging.INFO, logger="lightning_interp"):
            trainer = fit(alerts, namespace=lightning, batches=120, folder=tmp_path, val=True)
        told = [(alert.status, alert.layer, alert.step) for alert in alerts.history]
        assert told == [
            (status, layer, step) for status, step in (("raised", 60), ("cleared", 100)) for layer in ("conv1", "conv2")
        ]
        assert alerts.active == []
        assert [(line["status"], line["layer"], line["step"]) for line in lines_of(tmp_path)] == told
        messages = [record.getMessage() for record in caplog.records if record.name == "lightning_interp"]
        assert len(messages) == 4
        assert messages[0].startswith("Alert loss_seen (warning, conv1, step 60): Seen.")
        assert trainer.callback_metrics["interp/alerts_active"] == 0

    def test_tensorboard_has_the_numbers_and_the_tables(self, tmp_path):
        alerts = Alerts(rules=[LossSeen(severity="warning", start=25, end=80, layers=("a|b",))])
        fit(alerts, batches=120, folder=tmp_path)
        run = seen_in(tmp_path)
        assert run.scalars["interp/alerts_active"] == [(0, 0.0), (60, 1.0), (100, 0.0), (119, 0.0)]
        assert run.values("interp/alerts_warning") == [0.0, 1.0, 0.0, 0.0]
        (first, raised), (second, _) = run.text["interp.alerts/log/text_summary"]
        assert (first, second) == (60, 100)
        assert raised.startswith("\n| alert |")
        assert "of a\\|b, step 60, raised" in raised
        (_, before), (_, after) = run.text["interp.alerts/digest/text_summary"]
        assert ", active |" in before
        assert ", cleared |" in after
        assert "interp.cost/Alerts" in run.scalars

    def test_several_looks_at_one_step_lose_nothing(self, tmp_path):
        """The end of the validation, of the epoch and of the training all fall on the last step."""

        @dataclass(frozen=True)
        class Counts(LossSeen):
            calls = []  # noqa: RUF012 - shared on purpose

            def check(self, history, active):
                self.calls.append(history.step)
                history.note("call", len(self.calls))
                names = [f"layer{i}" for i in range(len(self.calls))]
                return [Alert(rule=self.name, severity="info", layer=name) for name in names]

        alerts = Alerts(rules=[Counts()])
        fit(alerts, batches=5, folder=tmp_path, val=True)
        assert Counts.calls == [4, 4, 4]
        texts = seen_in(tmp_path).text["interp.alerts/log/text_summary"]
        assert [(step, text.count("step 4, raised")) for step, text in texts] == [(4, 1), (5, 1), (6, 1)]

    def test_the_file_is_there_and_empty_without_alerts(self, tmp_path):
        fit(Alerts(rules=[LossSeen(start=1000)]), folder=tmp_path)
        assert lines_of(tmp_path) == []
        assert read_alerts(tmp_path)[0].active == []

    def test_numbers_are_in_callback_metrics_from_the_start_and_stay(self, lightning):
        seen = []

        class Reader(lightning.Callback):
            def on_train_start(self, trainer, pl_module):
                seen.append(float(trainer.callback_metrics["interp/alerts_active"]))

            def on_validation_end(self, trainer, pl_module):
                if not trainer.sanity_checking:
                    seen.append(float(trainer.callback_metrics["interp/alerts_active"]))

            on_train_batch_start = lambda self, trainer, *rest: seen.append(  # noqa: E731
                float(trainer.callback_metrics["interp/alerts_critical"])
            )

        fit([Alerts(rules=[LossSeen(start=20)]), Reader()], namespace=lightning, batches=23, val=True)
        assert seen == [0.0] + [0.0] * 21 + [2.0] * 2 + [2.0]

    def test_early_stopping_and_checkpoints_can_monitor_it(self, lightning, tmp_path):
        callbacks = importlib.import_module(f"{lightning.__name__}.callbacks")
        stop = callbacks.EarlyStopping("interp/alerts_active", mode="min", patience=1, stopping_threshold=-1)
        save = callbacks.ModelCheckpoint(tmp_path, monitor="interp/alerts_active", save_top_k=1)
        alerts = Alerts(rules=[LossSeen(start=40)])
        trainer = fit(
            [stop, save, alerts],
            namespace=lightning,
            val=True,
            max_epochs=9,
            val_check_interval=0.5,
            enable_checkpointing=True,
        )
        assert trainer.current_epoch < 9

    def test_names_tell_two_instances_apart(self, tmp_path):
        one, two = Alerts(rules=[LossSeen()], name="one"), Alerts(rules=[LossSeen(start=10**6)], name="two")
        trainer = fit([one, two], folder=tmp_path)
        assert (len(one.active), len(two.active)) == (2, 0)
        assert trainer.callback_metrics["interp.one/alerts_active"] == 2
        assert trainer.callback_metrics["interp.two/alerts_active"] == 0
        assert one.state_key != two.state_key


class TestActing:
    def test_stop_ends_the_training(self, lightning):
        trainer = fit(Alerts(rules=[LossSeen(start=15)], on_alert="stop"), namespace=lightning, batches=100)
        assert trainer.global_step == 21

    def test_raise_raises_after_everything_was_written(self, lightning, tmp_path):
        alerts = Alerts(rules=[LossSeen(start=15)], on_alert="raise")
        with pytest.raises(AlertRaised, match="loss_seen"):
            fit(alerts, namespace=lightning, batches=100, folder=tmp_path)
        assert len(lines_of(tmp_path)) == 2
        run = seen_in(tmp_path)
        assert run.values("interp/alerts_active") == [0.0, 2.0]
        assert "interp.alerts/log/text_summary" in run.text

    @pytest.mark.parametrize("on_alert", ["stop", "raise"])
    def test_only_from_the_least_severity_on(self, on_alert):
        rules = [LossSeen(severity="warning")]
        assert fit(Alerts(rules=rules, on_alert=on_alert), batches=40).global_step == 40
        if on_alert == "stop":
            assert fit(Alerts(rules=rules, on_alert=on_alert, min_severity="warning"), batches=40).global_step == 21

    def test_mute_silences(self):
        alerts = Alerts(rules=[LossSeen()], mute=["loss_seen:conv1"])
        fit(alerts)
        assert {alert.layer for alert in alerts.history} == {"conv2"}

    def test_patience_counts_looks_with_something_new(self):
        alerts = Alerts(rules=[LossSeen()], patience=3)
        fit(alerts, batches=300, max_epochs=1)
        assert [alert.step for alert in alerts.history] == [100, 100]


class TestTheEnd:
    @staticmethod
    def finished(**options):
        seen = []

        @dataclass(frozen=True)
        class End(LossSeen):
            def check(self, history, active):
                seen.append(history.finished)
                return ()

        trainer = fit(Alerts(rules=[End()]), **options)
        return seen, trainer

    def test_a_run_that_took_all_its_epochs_is_finished(self, lightning):
        assert self.finished(namespace=lightning)[0] == [False, False, True]

    def test_a_run_that_took_all_its_steps_is_finished(self):
        class Endless(IterableDataset):
            def __iter__(self):
                while True:
                    yield torch.zeros(4), 0

        seen, trainer = self.finished(batches=DataLoader(Endless(), 2), max_epochs=-1, max_steps=70)
        assert trainer.global_step == 70
        assert seen == [False, False, False, True]

    @pytest.mark.parametrize("epochs", [1, 5])
    def test_a_run_that_was_stopped_is_not(self, epochs):
        class Stop(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                trainer.should_stop = batch_idx == 5

        seen = []

        @dataclass(frozen=True)
        class End(LossSeen):
            def check(self, history, active):
                seen.append(history.finished)
                return ()

        fit([Alerts(rules=[End()]), Stop()], max_epochs=epochs)
        assert seen[-1] is False

    def test_the_real_rule_speaks_at_the_end_of_a_short_run(self):
        """A loss that falls along a straight line, written by hand into the history."""

        class Falling(Measuring):
            measures = ("loss", "planned_steps")

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                Session.of(trainer).history.record("loss", 2.3 - 0.01 * batch_idx, step=batch_idx)

        alerts = Alerts(rules=[UndertrainedRule()])
        fit([alerts, Falling()], batches=100)
        assert [(alert.severity, alert.step) for alert in alerts.history] == [("info", 99), ("warning", 99)]


class TestBringing:
    def test_what_the_rules_need_is_brought_quietly(self, tmp_path):
        alerts = Alerts(rules=[LossSeen()])
        fit(alerts, folder=tmp_path)
        assert [(type(child), child.quiet) for child in alerts.children] == [(Measuring, True)]
        assert alerts.children[0].count == 30
        assert "interp/fake" not in seen_in(tmp_path).scalars

    def test_what_is_there_is_used(self):
        alerts, present = Alerts(rules=[LossSeen()]), Measuring()
        fit([alerts, present])
        assert (alerts.children, len(alerts.active)) == ([], 2)

    def test_what_is_inside_a_family_is_used(self):
        parent, alerts = Family(), Alerts(rules=[LossSeen()])
        parent.children = [Measuring(), alerts]
        fit(parent)
        assert (alerts.children, len(alerts.active)) == ([], 2)

    def test_a_second_one_uses_what_the_first_has_brought(self):
        one, two = Alerts(rules=[LossSeen()], name="one"), Alerts(rules=[LossSeen()], name="two")
        fit([one, two])
        assert [len(alerts.children) for alerts in (one, two)] == [1, 0]
        assert (len(one.active), len(two.active)) == (2, 2)

    def test_a_measurement_that_fails_takes_nothing_with_it(self):
        @dataclass(frozen=True)
        class Wants(LossSeen):
            needs: ClassVar[tuple[str, ...]] = ("fake", "broken")

        alerts = Alerts(rules=[Wants()])
        with pytest.warns(InterpWarning, match="Failing failed"):
            fit(alerts)
        assert len(alerts.active) == 2

    def test_the_real_ones_cover_what_the_default_rules_need(self, monkeypatch):
        monkeypatch.undo()
        needs = {quantity for rule in Alerts().rules for quantity in rule.needs}
        measured = frozenset().union(*(measuring.measures(kind) for kind in measuring.measuring_classes()))
        # Class images are dear, and so is reading images anew: these rules are silent where `ClassImages` and
        # `Influence` are not asked for.
        labels = {"suspect_label_share", "label_recognition", "label_anchors", "train_samples"}
        # What `Alerts` records itself.
        own = {"planned_steps", "validation_metric", "validation_samples", "statistics_lag", "weights_lag"}
        assert needs - measured - own == {"class_image_augmented", *labels}


class TestResume:
    class Save(pl.Callback):
        """Writes a checkpoint after a step."""

        def __init__(self, path, step):
            self.path, self.step = path, step

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == self.step:
                trainer.save_checkpoint(self.path)

    @pytest.mark.parametrize("same_folder", [True, False])
    def test_nothing_fires_twice_and_nothing_is_lost(self, tmp_path, same_folder):
        path = tmp_path / "half.ckpt"
        rules = [LossSeen(start=10, end=130, severity="warning")]
        first = Alerts(rules=rules)
        fit([first, self.Save(path, 70)], batches=200, folder=tmp_path / "a", max_epochs=1)
        whole = [(alert.status, alert.layer, alert.step) for alert in first.history]
        assert len(whole) == 4
        second = Alerts(rules=rules)
        folder = tmp_path / ("a" if same_folder else "b")
        trainer = fit(second, batches=200, folder=folder, ckpt_path=path)
        assert trainer.global_step == 200
        told = [(alert.status, alert.layer) for alert in second.history]
        assert told == [(status, layer) for status, layer, _ in whole]
        assert [(line["status"], line["layer"]) for line in lines_of(folder)] == told
        assert second.children[0].count > 130

    def test_what_was_raised_before_or_is_cleared_stops_nothing(self, tmp_path):
        path = tmp_path / "half.ckpt"
        rules = [LossSeen(start=10, end=130)]
        fit([Alerts(rules=rules), self.Save(path, 70)], batches=200)
        alerts = Alerts(rules=rules, on_alert="stop")
        assert fit(alerts, batches=200, ckpt_path=path).global_step == 200
        assert [alert.status for alert in alerts.history] == ["raised", "raised", "cleared", "cleared"]

    def test_the_history_goes_on(self, tmp_path):
        path = tmp_path / "half.ckpt"
        fit([Alerts(rules=[LossSeen()]), self.Save(path, 19)], batches=40)
        steps = []

        @dataclass(frozen=True)
        class Looks(LossSeen):
            def check(self, history, active):
                steps[:] = history.get("fake").steps
                return ()

        fit(Alerts(rules=[Looks()]), batches=40, ckpt_path=path)
        assert steps[:20] == list(range(20))
        assert steps == sorted(steps)

    def test_the_checkpoint_is_plain(self, tmp_path):
        path = tmp_path / "half.ckpt"
        fit([Alerts(rules=[LossSeen()]), self.Save(path, 25)])
        state = torch.load(path, weights_only=True)["callbacks"]["Alerts"]
        assert len(state["book"]["active"]) == 2

    def test_a_state_that_cannot_be_read_is_reported_and_training_goes_on(self):
        alerts = Alerts(rules=[LossSeen()])
        with pytest.warns(InterpWarning, match="load_state_dict"):
            alerts.load_state_dict({"nonsense": 1})

    def test_a_second_fit_begins_anew(self):
        alerts = Alerts(rules=[LossSeen()])
        fit(alerts)
        fit(alerts)
        assert len(alerts.history) == 2


class TestTrouble:
    def test_a_broken_rule_is_reported_once_and_the_others_go_on(self):
        alerts = Alerts(rules=[Breaks(), LossSeen()])
        with pytest.warns(InterpWarning, match="Rule 'breaks' failed with ZeroDivisionError") as caught:
            fit(alerts, batches=120)
        assert len([w for w in caught if "breaks" in str(w.message)]) == 1
        assert len(alerts.active) == 2

    def test_a_broken_rule_raises_if_asked_to(self):
        with pytest.raises(ZeroDivisionError):
            fit(Alerts(rules=[Breaks()], on_error="raise"))

    def test_no_logger_no_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        alerts = Alerts(rules=[LossSeen()])
        fit(alerts)
        assert len(alerts.active) == 2
        assert list(tmp_path.rglob("alerts.jsonl")) == []

    def test_fast_dev_run(self, lightning, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        alerts = Alerts(rules=[LossSeen()])
        fit(alerts, namespace=lightning, fast_dev_run=True, val=True)
        assert len(alerts.active) == 2
        assert list(tmp_path.rglob("alerts.jsonl")) == []

    def test_the_sanity_check_is_not_looked_at(self):
        seen = []

        @dataclass(frozen=True)
        class Looks(LossSeen):
            def check(self, history, active):
                seen.append(history.step)
                return ()

        fit(Alerts(rules=[Looks()]), batches=5, val=True)
        assert seen == [4, 4]  # the validation, and the end; at the end of the epoch there was nothing new

    def test_validate_and_test_do_nothing(self):
        alerts = Alerts(rules=[LossSeen()])
        trainer = fit(alerts, batches=5)
        before = alerts.history
        with warnings.catch_warnings():
            for message in LIGHTNINGS_OWN:
                warnings.filterwarnings("ignore", f".*{message}")
            trainer.validate(module(), loader(2), verbose=False)
        assert alerts.history == before

    def test_accumulated_gradients(self):
        alerts = Alerts(rules=[LossSeen(start=15)])
        fit(alerts, batches=120, accumulate_grad_batches=4)
        assert [alert.step for alert in alerts.history] == [20, 20]

    def test_it_can_be_pickled(self):
        alerts = pickle.loads(pickle.dumps(Alerts(mute=["dead_filters:conv*"])))
        assert alerts.mute == ["dead_filters:conv*"]


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"rules": "all"},
            {"rules": [DeadFiltersRule]},
            {"on_alert": "explode"},
            {"min_severity": "fatal"},
            {"mute": "dead_filters"},
            {"mute": ["dead_filter"]},
            {"notify": "json://x"},
            {"patience": 0},
            {"name": "a/b"},
            {"on_error": "ignore"},
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, options):
        (argument,) = options
        with pytest.raises(ArgumentError, match=f"`{argument}`"):
            Alerts(**options)

    def test_the_default_rules_can_be_muted_by_name(self):
        assert Alerts(mute=["noisy_filters", "dead_filters:head"]).on_alert == "log"

    def test_jsonargparse_builds_it_from_yaml(self):
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Alerts, "callback")
        config = parser.parse_object(
            {
                "callback": {
                    "class_path": "lightning_interp.callbacks.alerts.Alerts",
                    "init_args": {
                        "on_alert": "stop",
                        "mute": ["dead_filters:head"],
                        "rules": [{"class_path": "lightning_interp.rules.DeadFiltersRule", "init_args": {"info": 0.1}}],
                    },
                }
            }
        )
        alerts = parser.instantiate(config).callback
        assert (alerts.on_alert, alerts.rules) == ("stop", [DeadFiltersRule(info=0.1)])
