"""Losses, updates, facts, logs and options of real runs."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from lightning_interp.callbacks import training_dynamics
from lightning_interp.callbacks._readings import movement, same_batch
from lightning_interp.callbacks.session import Session
from lightning_interp.callbacks.training_dynamics import TrainingDynamics
from lightning_interp.errors import ArgumentError
from tests.callbacks.dynamics_kit import (
    CHATTER,
    CLASSES,
    Binary,
    Manual,
    Memory,
    MixUp,
    Plain,
    TwoOptimizers,
    fit,
    loader,
    strict,
)

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]

# ---------------------------------------------------------------------- layers, facts


def test_layer_outside_all_optimizers_has_update_zero_and_frozen_one_has_none():
    """`untrained` must be told from `frozen`."""
    model = Plain()
    model.net[0].requires_grad_(False)
    model.configure_optimizers = lambda: torch.optim.SGD(model.net[1].parameters(), lr=0.1)
    history = fit(model, strict()).history
    assert history.get("update_norm", "net.4").values == [0.0] * 6
    assert history.get("update_ratio", "net.4").values == [0.0] * 6
    assert all(norm > 0 for norm in history.get("update_norm", "net.1").values)
    assert len(history.get("update_norm", "net.0")) == len(history.get("gradient_norm", "net.4")) == 0
    facts = {
        layer: (history.fact("trainable", -1, layer), history.fact("in_optimizer", -1, layer))
        for layer in history.layers("trainable")
    }
    assert facts == {"net.0": (0, 0), "net.1": (1, 1), "net.4": (1, 0)}


def test_facts_of_the_run():
    """Classes, planned steps, and the first batch as the network received it."""

    class Normalised(Plain):
        def training_step(self, batch, batch_idx):
            return self.loss((batch[0] / 2 + 3, batch[1]))

    watcher = fit(Normalised(), strict(dense_steps=2), max_epochs=3)
    history, first = watcher.history, watcher.batches[0][0] / 2 + 3
    assert history.fact("num_classes", math.nan) == CLASSES
    assert history.fact("planned_steps", math.nan) == 18
    assert history.fact("input_mean", math.nan) == pytest.approx(first.mean().item(), rel=1e-5)
    assert history.fact("input_std", math.nan) == pytest.approx(first.std(correction=0).item(), rel=1e-5)


def test_norms_of_the_weights_and_the_decay_are_noted():
    """Of weights before the step, without biases; the largest decay of all parameter groups."""
    model, norms = Plain(), []
    head, rest = list(model.net[4].parameters()), list(model.net[:4].parameters())
    groups = [{"params": rest, "weight_decay": 0.25}, {"params": head}]
    model.configure_optimizers = lambda: torch.optim.SGD(groups, lr=0.1, weight_decay=0.125)

    class Norms(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            norms.append(pl_module.net[4].weight.norm().item())

    history = fit(model, strict(), others=[Norms()]).history
    assert history.get("weight_norm", "net.4").values == pytest.approx(norms, rel=1e-6)
    assert len(set(norms)) == len(norms)
    assert history.fact("weight_decay", math.nan) == 0.25


def test_without_weight_decay_it_is_zero():
    """Also where the optimizer has no such option."""
    model = Plain()
    model.configure_optimizers = lambda: torch.optim.Rprop(model.parameters())
    assert fit(model, strict()).history.fact("weight_decay", math.nan) == 0


def test_number_of_classes_is_unknown_if_the_loss_is_only_like_a_cross_entropy():
    """Mixed or scaled losses have another floor."""
    torch.manual_seed(0)  # in one run of a hundred one of the two losses is the mixture to four digits
    assert ("num_classes", None) not in fit(MixUp(), strict()).history.facts
    assert ("num_classes", None) not in fit(Binary(), strict()).history.facts


class Softened(Plain):
    """Targets that are shared between two classes."""

    def loss(self, batch):
        targets = 0.7 * F.one_hot(batch[1], CLASSES) + 0.3 * F.one_hot(batch[1].flip(0), CLASSES)
        return F.cross_entropy(self.net(batch[0]), targets)


class Twice(Plain):
    """A softmax before the cross-entropy."""

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]).softmax(dim=1), batch[1])


class Close(Plain):
    """Scores that add up to one, but some are negative."""

    def loss(self, batch):
        scores = self.net(batch[0])
        return F.cross_entropy(scores - scores.mean(dim=1, keepdim=True) + 1 / CLASSES, batch[1])


@pytest.mark.parametrize(
    ("model", "soft", "normalised"),
    [(Plain, 0, 0), (Softened, 1, None), (Twice, 0, 1), (Close, 0, 0), (MixUp, None, None)],
)
def test_what_goes_into_the_cross_entropy_is_noted(model, soft, normalised):
    """Targets that are no indices leave a floor that nobody knows; probabilities are no scores."""
    torch.manual_seed(0)
    facts = fit(model(), strict()).history.facts
    assert facts.get(("soft_targets", None)) == soft
    assert facts.get(("scores_normalised", None)) == normalised


def test_first_bad_step_is_named_for_the_loss_and_for_the_layer():
    """An infinite weight in one layer from step 2 on."""

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    pl_module.net[4].weight[0, 0] = math.nan

    history = fit(Plain(), strict(), others=[Break()]).history
    facts = {layer: history.fact("non_finite_step", math.nan, layer) for layer in history.layers("non_finite_step")}
    assert history.fact("non_finite_step", math.nan) == 2
    assert facts["net.4"] == 2
    assert math.isnan(history.get("loss").values[2])


def test_skipped_step_of_the_gradient_scaler_says_nothing():
    """Nothing moved and a gradient is infinite: that is its work, not a fault."""
    notes = {"layers": {"a": [0]}, "weights": {"a": [0]}, "graded": [0], "held": [0]}
    assert movement({"before": [1.0], "update": [0.0], "gradient": [math.inf]}, notes) is None
    moved = movement({"before": [2.0], "update": [math.nan], "gradient": [math.inf]}, notes)
    assert moved is not None
    assert moved.broken == ["a"]
    still = movement({"before": [0.0], "update": [0.0], "gradient": [3.0]}, notes)
    assert still is not None
    assert (still.update_ratio, still.gradient_norm) == ({"a": 0.0}, {"a": 3.0})
    fresh = movement({"before": [0.0], "update": [1.0], "gradient": [3.0]}, notes)
    assert fresh is not None
    assert fresh.update_ratio == {}


def test_same_batch_readings_are_in_the_unit_of_the_returned_loss():
    """A factor between backward and the returned loss (scaler, accumulation) cancels."""
    values = {"returned": [2.0], "value": [512.0], "again": [384.0], "backward": [512.0], "fall": [256.0]}
    exact = same_batch(values, exact=True, resolution=0.0)
    assert exact is not None
    assert (exact.before, exact.after, exact.ratio) == (2.0, 1.5, 0.5)
    assert same_batch(values, exact=False, resolution=0.0) is None
    near = same_batch(values | {"value": [2.0], "again": [1.5]}, exact=False, resolution=0.0)
    assert near is not None
    assert (near.after, near.ratio) == (1.5, 0.5)
    assert same_batch({"returned": [2.0]}, exact=True, resolution=0.0) is None


# ---------------------------------------------------------------------- what training steps return


@pytest.mark.parametrize(
    ("kind", "steps"), [("tensor", [0, 1, 2, 3, 4, 5]), ("dict", [0, 1, 2, 3, 4, 5]), ("some", [1, 3, 5])]
)
def test_loss_of_every_step_is_kept_whatever_training_step_returns(kind, steps):
    """A step that returned None has none, and its update of nothing is not taken for an untrained layer."""

    class Returns(Plain):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if kind == "some" and batch_idx % 2 == 0:
                return None
            return {"loss": loss} if kind == "dict" else loss

    watcher = fit(Returns(), strict(dense_steps=1))
    assert watcher.history.get("loss").steps == steps
    assert watcher.history.get("loss").values == [watcher.losses[step] for step in steps]
    # The first step is due; where it returned nothing the next one takes its place.
    assert watcher.history.get("update_norm", "net.0").steps == steps[:1]
    assert watcher.history.get("update_norm", "net.0").values[0] > 0


def test_manual_optimisation_that_returns_nothing_still_has_updates():
    """There is no loss to keep."""

    class Silent(Manual):
        returns = False

    history = fit(Silent(), strict()).history
    assert len(history.get("loss")) == len(history.get("loss_before")) == 0
    assert history.get("update_norm", "net.0").steps == list(range(6))


def test_several_optimizers_in_a_batch_are_all_measured():
    """Each with its own weights and gradients; what is toggled off in between is trainable all the same."""
    watcher = fit(TwoOptimizers(), strict())
    history = watcher.history
    for step, (before, after) in enumerate(zip(watcher.before, watcher.after, strict=True)):
        for layer in ("net.a.0", "net.b.5"):
            key = f"{layer}.weight"
            expected = (after[key] - before[key]).norm() / before[key].norm()
            assert history.get("update_ratio", layer).values[step] == pytest.approx(expected.item(), rel=1e-4)
    assert {history.fact("trainable", 0, layer) for layer in history.layers("trainable")} == {1.0}
    assert history.get("learning_rate").values == [0.3] * 6


def test_optimizers_that_take_turns_are_all_measured_when_a_step_is_due():
    """A due step waits for the one that pauses."""

    class Turns(TwoOptimizers):
        turns = True

    history = fit(Turns(), strict(dense_steps=1, every_n_train_steps=4)).history
    assert history.get("update_norm", "net.a.0").steps == [0, 4]
    assert history.get("update_norm", "net.b.0").steps == [1, 3]


# ---------------------------------------------------------------------- schedule, logs, options


def test_probed_steps_are_the_first_ones_and_then_every_nth():
    """Steps count from 0; each tag has its own points at its own steps, once, in order."""
    memory = Memory()
    watcher = fit(Plain(), strict(dense_steps=3, every_n_train_steps=5), loader(17), logger=memory)
    steps = [0, 1, 2, 4, 9, 14]
    history = watcher.history
    assert history.get("gradient_norm").steps == history.get("update_ratio", "net.0").steps == steps
    assert history.get("loss").steps == list(range(17))
    assert history.get("loss").values == watcher.losses
    tags = {
        "interp/gradient_norm": history.get("gradient_norm"),
        "interp/learning_rate": history.get("learning_rate"),
        "interp/step_ratio": history.get("step_ratio"),
        "interp.update_ratio/00_net.0": history.get("update_ratio", "net.0"),
        "interp.update_ratio/01_net.4": history.get("update_ratio", "net.4"),
        "interp.gradient_norm/00_net.0": history.get("gradient_norm", "net.0"),
        "interp.gradient_norm/01_net.4": history.get("gradient_norm", "net.4"),
    }
    for tag, series in tags.items():
        assert memory.points(tag) == list(zip(series.steps, series.values, strict=True))
    ratios = [history.get("update_ratio", layer).values for layer in ("net.0", "net.4")]
    assert [value for _, value in memory.points("interp/update_ratio_median")] == [
        sum(r) / 2 for r in zip(*ratios, strict=True)
    ]
    assert [value for _, value in memory.points("interp/update_ratio_max")] == [
        max(r) for r in zip(*ratios, strict=True)
    ]
    logged = {tag for tag, _, _ in memory.rows if tag.startswith("interp")}
    assert logged == {*tags, "interp/update_ratio_median", "interp/update_ratio_max", "interp.cost/TrainingDynamics"}
    assert all(
        tag.split("/")[0].removeprefix("interp.") in TrainingDynamics.provides
        or tag.split("/")[1].startswith(TrainingDynamics.provides)
        for tag in logged
    )


def test_measures_lists_what_is_written_to_the_history():
    """`Alerts` looks there for who measures what."""

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                pl_module.net[4].weight.data.fill_(math.nan)

    history = fit(Plain(), strict(), others=[Break()]).history
    assert {name for name, _ in (*history.series, *history.facts)} == set(TrainingDynamics.measures)


def test_values_reach_the_history_every_ten_steps_early_and_every_fifty_later():
    """Rules must be quick in the first 50 steps, however few of them are probed; nothing waits in each step."""
    reached = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            reached.append(len(Session.of(trainer).history.get("loss")))

    fit(Plain(), strict(dense_steps=20), loader(130), others=[Look()])
    assert [i for i in range(1, 130) if reached[i] != reached[i - 1]] == [9, 19, 29, 39, 49, 99]
    assert all(value == i + 1 for i, value in enumerate(reached) if i in (9, 19, 29, 39, 49, 99))


@pytest.mark.parametrize("dense", [0, 9, 20, 48])
def test_on_a_gpu_values_are_sent_one_step_before_they_are_read(monkeypatch, dense):
    """All that elsewhere is read one step earlier, when `Alerts` looks; none is lost, doubled or out of order."""

    def losses(later):
        reached = []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                reached.append(len(Session.of(trainer).history.get("loss")))

        monkeypatch.setattr(training_dynamics, "_reads_later", lambda trainer: later)
        torch.manual_seed(0)
        history = fit(Plain(), strict(dense_steps=dense), loader(130), others=[Look()]).history
        return reached, repr(history.state_dict())

    (now, at_once), (later, sent) = losses(False), losses(True)
    steps = [i for i in range(1, 130) if now[i] != now[i - 1]]
    assert [i for i in range(1, 130) if later[i] != later[i - 1]] == [step + 1 for step in steps]
    assert [later[step + 1] for step in steps] == [now[step] for step in steps] == [step + 1 for step in steps]
    assert sent == at_once


def test_values_reach_the_history_before_each_validation():
    """Rules look at its end."""
    reached = []

    class WithValidation(Plain):
        def validation_step(self, batch, batch_idx):
            reached.append(len(Session.of(self.trainer).history.get("loss")))

    model = WithValidation()
    trainer_options = {"val_check_interval": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    fit(model, strict(dense_steps=0), None, fit_options={"val_dataloaders": loader(1)}, **trainer_options)
    assert reached == [4]


def test_metric_is_there_from_the_start_and_again_at_each_validation():
    """NaN before the first, so that monitoring it never ends a run."""
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["interp/update_ratio_median"].item())

    watcher = fit(Plain(), strict(), others=[Look()])
    assert math.isnan(seen[0])
    values = [watcher.history.get("update_ratio", layer).values[-1] for layer in ("net.0", "net.4")]
    assert sum(values) / 2 > 0


def test_chosen_layers_and_names_are_respected():
    """`layers` picks, `max_layers` limits what is drawn, `name` tells two instances apart."""
    memory = Memory()
    history = fit(Plain(), strict(layers=["net.4"], name="head"), logger=memory).history
    assert history.layers("update_norm") == history.layers("trainable") == ["net.4"]
    assert {tag for tag, _, _ in memory.rows if "update_ratio" in tag} == {
        "interp.update_ratio.head/01_net.4",
        "interp.head/update_ratio_median",
        "interp.head/update_ratio_max",
    }
    memory = Memory()
    history = fit(Plain(), strict(max_layers=1), logger=memory).history
    assert {tag for tag, _, _ in memory.rows if tag.startswith("interp.update")} == {"interp.update_ratio/00_net.0"}
    assert history.layers("update_ratio") == ["net.0", "net.4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_steps": -1}, "`dense_steps` to be an integer of at least 0, but got -1"),
        ({"dense_steps": 2.5}, "`dense_steps` to be an integer of at least 0, but got 2.5"),
        ({"every_n_train_steps": 0}, "`every_n_train_steps` to be a positive integer or None, but got 0"),
        ({"layers": "net.0"}, "`layers` to be a list of strings or None, but got 'net.0'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, message):
    """What was expected, and what came."""
    with pytest.raises(ArgumentError, match=message):
        TrainingDynamics(**options)


def test_unknown_layer_is_refused_before_training():
    """With the names that there are."""
    with pytest.raises(ArgumentError, match=r"No layer matches 'nett\*' in argument `layers`. There are: 'net.0'"):
        fit(Plain(), TrainingDynamics(layers=["nett*"]))
