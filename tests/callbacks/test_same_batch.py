"""The loss of a batch before and after its update, and the step ratio, against closed forms and brute force."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.callbacks.session import Session
from tests.callbacks.dynamics_kit import (
    CHATTER,
    Binary,
    Checkpointed,
    Manual,
    MixUp,
    Net,
    Noisy,
    Plain,
    Watcher,
    fit,
    loader,
    strict,
    tame,
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


EXACT = [Plain, Split, Binary, MixUp, Criterion, Inside, InPlace, Checkpointed, Manual]


def _brute_force(make_model, watcher, batch_idx):
    """Loss before and after, step ratio and predicted fall, from saved weights."""
    model = make_model().double()
    batch = watcher.batches[batch_idx]
    model.load_state_dict(watcher.before[batch_idx])
    before = model.loss(batch)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(before, list(named.values()))
    model.load_state_dict(watcher.after[batch_idx])
    after = model.loss(batch)
    moved = [named[n].detach() - watcher.before[batch_idx][n] for n in named]
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
        before, after, ratio, fall = _brute_force(Plain, watcher, micro)
        assert history.get("loss_before").values[step] == pytest.approx(before, rel=1e-9)
        assert history.get("loss_after").values[step] == pytest.approx(after, rel=1e-9)
        if fall > 0:
            assert ratios[step] == pytest.approx(ratio, rel=1e-5)
    losses = [2 * loss for loss in watcher.losses]
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert history.get("loss").values == pytest.approx(expected)
    assert history.get("loss").steps == [0, 1, 2]


# ---------------------------------------------------------------------- mixed precision, several processes


def _scaled(scale):
    """A plugin that scales the loss as float16 does, on the CPU."""
    plugin = pl.plugins.MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return plugin


def test_gradient_scaler_changes_no_number():
    """Losses, gradients and step ratios are those of the unscaled loss, with accumulation too."""
    histories = []
    for options in ({"precision": "bf16-mixed"}, {"plugins": [_scaled(1024.0)]}):
        torch.manual_seed(0)
        model = Plain(lambda p: torch.optim.SGD(p, lr=0.3))
        histories.append(fit(model, strict(), accumulate_grad_batches=2, **options).history)
    plain, scaled = histories
    for quantity in ("loss", "loss_before", "loss_after", "step_ratio", "gradient_norm"):
        assert len(scaled.get(quantity)) == 3, quantity
        assert scaled.get(quantity).values == pytest.approx(plain.get(quantity).values, rel=2e-2), quantity


class Steep(Plain):
    """Gradients that overflow under a large scale, until the scaler has halved it a few times."""

    def loss(self, batch):
        return 30 * super().loss(batch)


def test_steps_that_the_gradient_scaler_skips_are_left_out():
    """The first ones of a run often are; they say nothing about any layer."""
    watcher = fit(Steep(), strict(), loader(12), plugins=[_scaled(3e38)])
    moved = [
        step
        for step, (before, after) in enumerate(zip(watcher.before, watcher.after, strict=True))
        if not torch.equal(before["net.4.weight"], after["net.4.weight"])
    ]
    assert 0 not in moved
    assert 11 in moved
    assert watcher.history.get("update_norm", "net.4").steps == moved
    assert watcher.history.layers("non_finite_step") == []


class Tell(pl.Callback):
    """Compares with brute force in each process."""

    def __init__(self, watcher, folder):
        self.watcher, self.folder = watcher, folder

    def on_train_end(self, trainer, pl_module):
        history, per_step = Session.of(trainer).history, trainer.accumulate_grad_batches
        ratios = history.get("step_ratio")
        expected = [_brute_force(Plain, self.watcher, (step + 1) * per_step - 1)[2] for step in ratios.steps]
        weights = pl_module.net[4].weight.detach().flatten().tolist()
        rows = {"ratios": ratios.values, "expected": expected, "weights": weights, "losses": history.get("loss").values}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.parametrize("per_step", [1, 2])
def test_each_process_measures_its_own_batch(per_step, tmp_path):
    """The loss of a process with the gradient of that loss, and the update of all."""
    torch.manual_seed(0)
    watcher = Watcher()
    trainer = pl.Trainer(
        max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, precision="64-true", devices=2, strategy="ddp_spawn",
        accumulate_grad_batches=per_step, callbacks=[strict(), watcher, Tell(watcher, tmp_path)],
    )  # fmt: skip
    trainer.fit(Plain(tame), loader(8, dtype=torch.float64))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rows in ranks:
        assert len(rows["ratios"]) > 0
        assert rows["ratios"] == pytest.approx(rows["expected"], rel=1e-6)
        assert len(rows["losses"]) == 4 / per_step
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["losses"] != ranks[1]["losses"]
