"""Where a second forward would not be exact, or not harmless, there is no step ratio, and all else is measured."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.callbacks.training_dynamics import TrainingDynamics
from lightning_interp.errors import InterpWarning
from tests.callbacks.dynamics_kit import (
    CHATTER,
    Plain,
    fit,
    nothing_left,
    strict,
)

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]


class OwnLoss(Plain):
    """A loss that is not one of torch's."""

    def loss(self, batch):
        return (self(batch[0]).sum(dim=1) - batch[1]).abs().mean()


class PartOnly(Plain):
    """A part of the network is used in a way that can't be followed: running the rest alone would be wrong."""

    def loss(self, batch):
        hidden = self.net[0](batch[0])  # not a part that the LightningModule owns itself
        return F.cross_entropy(self.net[3:](hidden), batch[1])


class Edited(Plain):
    """The step writes into its own batch after it was used."""

    def loss(self, batch):
        self.images = batch[0]
        return super().loss(batch)

    def on_after_backward(self):
        self.images.add_(1.0)


class TwoBackwards(Plain):
    """Manual optimisation with two losses: which of them moved the weights can't be told apart."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(0.5 * loss)
        optimizer.step()
        return loss


@pytest.mark.parametrize("make_model", [OwnLoss, PartOnly, Edited, TwoBackwards])
def test_step_ratio_that_would_not_be_exact_is_left_out_without_a_word(make_model):
    """Everything else is measured; warnings are errors in these tests."""
    history = fit(make_model(), strict()).history
    assert len(history.get("step_ratio")) == len(history.get("loss_after")) == 0
    assert len(history.get("loss")) == 6
    assert history.get("update_ratio", history.layers("update_ratio")[0]).steps == list(range(6))


def test_second_forward_that_fails_costs_the_step_ratio_only():
    """It is said once, and the run goes on with everything else."""

    class Once(Plain):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if self.calls == 4:
                raise RuntimeError("no second time")
            return self.net(x)

    with pytest.warns(InterpWarning, match=r"a second time \(RuntimeError: no second time\)") as said:
        history = fit(Once(), TrainingDynamics()).history
    assert len([warning for warning in said if warning.category is InterpWarning]) == 1
    assert history.get("loss_after").steps == [0]
    assert history.get("gradient_norm").steps == list(range(6))


@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
def test_compiled_models_get_no_hook_and_no_mode_but_updates(how):
    """A mode or a hook would make the compiler start again."""
    model = Plain()
    if how == "wrapped":
        model.net = torch.compile(model.net, backend="eager")
    elif how == "in place":
        model.net.compile(backend="eager")
    else:
        model.net.forward = torch.compile(model.net.forward, backend="eager")
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(nothing_left(pl_module))

    history = fit(model, strict(), others=[Look()]).history
    assert seen == [True] * 6
    assert len(history.get("step_ratio")) == 0
    assert history.get("gradient_norm").steps == list(range(6))
    assert history.fact("input_std", math.nan) > 0


class Teacher(Plain):
    """An attention layer in eval mode inside the training step takes a path that rounds differently if watched."""

    def __init__(self, switch=False):
        super().__init__()
        self.teacher = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.switch = switch
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.teacher.train(self.switch)

    def training_step(self, batch, batch_idx):
        self.teacher.eval()
        with torch.no_grad():
            self.seen.append(self.teacher(batch[0].flatten(2).reshape(len(batch[0]), -1, 6)))
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters())


@pytest.mark.parametrize("switch", [False, True])
def test_attention_in_eval_mode_keeps_its_fast_path(switch):
    """Its output is the same to the bit, whether it was in eval mode from the start or is put there in the step."""
    outputs = []
    for dynamics in (None, strict()):
        torch.manual_seed(1)
        model = Teacher(switch)
        fit(model, dynamics)
        outputs.append(model.seen)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
