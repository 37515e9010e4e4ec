"""The loss of a batch before and after its update, and the step ratio, against closed forms and brute force."""

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
    Binary,
    Checkpointed,
    MixUp,
    Net,
    Noisy,
    Plain,
    fit,
    loader,
    nothing_left,
    strict,
)

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]

# ---------------------------------------------------------------------- closed forms


class Regression(Net):
    """Linear regression without a bias: a quadratic loss."""

    def __init__(self, optimizer):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(60, 1, bias=False)), optimizer)

    def loss(self, batch):
        return F.mse_loss(self(batch[0]), batch[1][:, None].to(batch[0].dtype))


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 1e-2, 0.1])
def test_step_ratio_of_sgd_on_a_quadratic_has_its_closed_form(rate):
    """L = |Xw - y|^2 / N, H = 2 X'X / N: the update is -lr g, and rho = 1 - lr g'Hg / (2 g'g)."""
    watcher = fit(
        Regression(lambda p: torch.optim.SGD(p, lr=rate)),
        strict(),
        loader(4, dtype=torch.float64),
        precision="64-true",
    )
    history, name = watcher.history, "net.1.weight"
    for step, (x, y) in enumerate(watcher.batches):
        w, x = watcher.before[step][name][0], x.flatten(1)
        g = 2 * x.T @ (x @ w - y) / len(x)
        curvature = (2 * x.T @ (x @ g) / len(x)) @ g
        expected = 1 - rate * (curvature / (2 * g @ g)).item()
        assert history.get("step_ratio").values[step] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        norms = {"gradient_norm": g.norm(), "update_norm": rate * g.norm(), "update_ratio": rate * g.norm() / w.norm()}
        for quantity, value in norms.items():
            assert history.get(quantity, "net.1").values[step] == pytest.approx(value.item(), rel=1e-6)
    assert history.get("learning_rate").values == [rate] * 4
    assert history.get("gradient_norm").values == history.get("gradient_norm", "net.1").values


def test_second_forward_without_an_update_gives_the_same_loss_to_the_bit():
    """Rate 0: same inputs, same modes, same random numbers, so the loss after equals the loss before exactly."""
    model = Noisy(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    watcher = fit(model, strict())
    history = watcher.history
    assert history.get("loss_before").values == history.get("loss_after").values == watcher.losses
    assert len(set(watcher.losses)) == 6
    assert len(history.get("step_ratio")) == 0
    assert all(history.get("update_norm", layer).values == [0.0] * 6 for layer in history.layers("update_norm"))


# ---------------------------------------------------------------------- brute force


def _optimizers():
    return {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        "Adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    }


@pytest.mark.parametrize("name", _optimizers())
def test_updates_of_any_optimizer_equal_brute_force_from_saved_weights(name):
    """The real update, after minus before, with clipping and weight decay in it."""
    watcher = fit(Net(optimizer=_optimizers()[name]), strict(), gradient_clip_val=0.1)
    history = watcher.history
    assert history.layers("update_ratio") == ["net.0", "net.5"]
    assert history.layers("update_norm") == ["net.0", "net.1", "net.5"]
    for step, (before, after) in enumerate(zip(watcher.before, watcher.after, strict=True)):
        for layer in ("net.0", "net.5"):
            key = f"{layer}.weight"
            expected = (after[key] - before[key]).norm() / before[key].norm()
            assert history.get("update_ratio", layer).values[step] == pytest.approx(expected.item(), rel=1e-4)
        for layer in ("net.0", "net.1", "net.5"):
            moved = [after[f"{layer}.{part}"] - before[f"{layer}.{part}"] for part in ("weight", "bias")]
            expected = torch.cat([part.flatten() for part in moved]).norm().item()
            assert history.get("update_norm", layer).values[step] == pytest.approx(expected, rel=1e-4)


class Split(Plain):
    """Encoder and head are called by `training_step`, with functions between."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = self.net[:3], self.net[4]
        del self.net

    def loss(self, batch):
        hidden = torch.relu(self.encoder(batch[0]))
        return F.nll_loss(F.log_softmax(self.head(hidden.flatten(1)), dim=1), batch[1])


class Criterion(Plain):
    """The loss is a module, and so is a part of the network inside a list."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([self.net])
        del self.net
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))

    def loss(self, batch):
        return self.criterion(self.parts[0](batch[0]), batch[1])


class Inside(Plain):
    """The forward computes the loss itself, from keyword arguments."""

    def forward(self, *, images, labels):
        return {"loss": F.cross_entropy(self.net(images), labels)}

    def loss(self, batch):
        return self(images=batch[0], labels=batch[1])["loss"]


class InPlace(Plain):
    """Sums losses in place, and asks for a metric of its own before and after."""

    def loss(self, batch):
        with torch.no_grad():
            F.cross_entropy(self(batch[0]), batch[1])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        loss += 0.1 * F.mse_loss(self(batch[0]).sum(dim=1), batch[1].to(batch[0].dtype))
        F.cross_entropy(self(batch[0]), batch[1])
        return loss


EXACT = [Plain, Split, Binary, MixUp, Criterion, Inside, InPlace, Checkpointed]


def _brute_force(make_model, watcher, step, *, micro=None):
    """Loss before and after, and step ratio, from saved weights."""
    model = make_model().double()
    batch = watcher.batches[step if micro is None else micro]
    model.load_state_dict(watcher.before[step if micro is None else micro])
    before = model.loss(batch)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(before, list(named.values()))
    model.load_state_dict(watcher.after[step if micro is None else micro])
    after = model.loss(batch)
    moved = [named[n].detach() - watcher.before[step if micro is None else micro][n] for n in named]
    fall = -sum((g * m).sum().item() for g, m in zip(gradients, moved, strict=True))
    return before.item(), after.item(), (before.item() - after.item()) / fall, fall


@pytest.mark.parametrize("make_model", EXACT)
def test_same_batch_losses_equal_brute_force(make_model):
    """Whatever stands between the network and its loss."""
    torch.manual_seed(0)
    watcher = fit(make_model(), strict(), loader(dtype=torch.float64), precision="64-true")
    history = watcher.history
    assert len(history.get("loss_before")) == 6
    ratios = dict(zip(history.get("step_ratio").steps, history.get("step_ratio").values, strict=True))
    for step in range(6):
        before, after, ratio, fall = _brute_force(make_model, watcher, step)
        assert history.get("loss_before").values[step] == pytest.approx(before, rel=1e-9)
        assert history.get("loss_after").values[step] == pytest.approx(after, rel=1e-9)
        assert (step in ratios) == (fall > 0)
        if fall > 0:
            assert ratios[step] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}]
)
def test_same_batch_losses_with_accumulation_are_those_of_the_last_micro_batch(clip):
    """The gradient of this micro-batch alone, the update of the whole step; five batches, so the last step has one."""
    torch.manual_seed(0)
    watcher = fit(
        Plain(), strict(), loader(5, dtype=torch.float64), precision="64-true", accumulate_grad_batches=2, **clip
    )
    history = watcher.history
    assert history.get("loss_before").steps == [0, 1, 2]
    ratios = dict(zip(history.get("step_ratio").steps, history.get("step_ratio").values, strict=True))
    for step, micro in enumerate([1, 3, 4]):
        before, after, ratio, fall = _brute_force(Plain, watcher, step, micro=micro)
        assert history.get("loss_before").values[step] == pytest.approx(before, rel=1e-9)
        assert history.get("loss_after").values[step] == pytest.approx(after, rel=1e-9)
        if fall > 0:
            assert ratios[step] == pytest.approx(ratio, rel=1e-5)
    losses = [2 * loss for loss in watcher.losses]
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert history.get("loss").values == pytest.approx(expected)
    assert history.get("loss").steps == [0, 1, 2]


# ---------------------------------------------------------------------- where there is no step ratio


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
