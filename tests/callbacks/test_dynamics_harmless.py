"""A run with `TrainingDynamics` is the one without it; nothing is left behind, nothing is lost."""

from __future__ import annotations

import copy
import math
import pickle
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_interp.callbacks.session import Session
from tests.callbacks.dynamics_kit import (
    BATCH,
    CHATTER,
    CLASSES,
    Checkpointed,
    Memory,
    Net,
    Noisy,
    Plain,
    TwoOptimizers,
    Watcher,
    fit,
    loader,
    nothing_left,
    strict,
)

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]

# ---------------------------------------------------------------------- it changes nothing


def _schedule(p):
    optimizer = torch.optim.AdamW(p, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Logging(Noisy):
    """With dropout, BatchNorm and random numbers everywhere, and metrics of its own."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("noise", torch.rand(()))
        return loss


class CopiesItself(Logging):
    """A deep copy and an eval-mode pass in the middle of the step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        twin = copy.deepcopy(self.net).eval()
        pickle.loads(pickle.dumps(self.net))
        with torch.no_grad():
            self.log("twin", twin(batch[0]).sum())
        self.net.eval()
        with torch.no_grad():
            self.net(batch[0])
        self.net.train()
        return loss


class TwoOptimizersLogging(TwoOptimizers):
    """The manual recipe, with a metric."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("noise", torch.rand(()))


RECIPES = {
    "SGD, shuffling": (Logging, {}),
    "AdamW, schedule": (lambda: Logging(optimizer=_schedule), {}),
    "clipping by norm": (Logging, {"gradient_clip_val": 0.1}),
    "clipping by value": (Logging, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulation": (Logging, {"accumulate_grad_batches": 3}),
    "bf16": (Logging, {"precision": "bf16-mixed"}),
    "LBFGS": (lambda: Logging(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)), {}),
    "two optimizers": (TwoOptimizersLogging, {}),
    "copies": (CopiesItself, {}),
    "checkpointing": (Checkpointed, {}),
}


def _train(recipe, dynamics):
    make_model, options = RECIPES[recipe]
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    model, memory = make_model(), Memory()
    watcher = Watcher()
    trainer = pl.Trainer(
        max_epochs=2, logger=memory, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[*dynamics, watcher], **options,
    )  # fmt: skip
    trainer.fit(model, loader(7, shuffle=True))
    return {
        "weights": model.state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "metrics": [row for row in memory.rows if not row[0].startswith("interp")],
        "generators": (torch.get_rng_state(), np.random.get_state(), random.getstate()),
        "every step": (watcher.after, watcher.losses),
        "modes": [module.training for module in model.modules()],
        "left": nothing_left(model),
    }


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_with_it_is_bit_for_bit_the_same(recipe):
    """Weights, buffers, gradients, optimizer state, generators, modes and the user's metrics."""
    without = _train(recipe, [])
    with_it = _train(recipe, [strict()])
    assert [key for key in without if not _same(without[key], with_it[key])] == []
    assert with_it["left"]


# ---------------------------------------------------------------------- it leaves nothing behind


class Stops(Plain):
    """Something goes wrong in the middle of a step."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if batch_idx == 3:
            raise RuntimeError("stop")
        return loss


def test_exception_in_training_leaves_nothing_on_the_model_and_writes_the_losses():
    """The last losses before a crash matter most."""
    memory, model = Memory(), Stops()
    kept = []

    class Keep(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            kept.append(Session.of(trainer).history)

    with pytest.raises(RuntimeError, match="stop"):
        fit(model, strict(), others=[Keep()], logger=memory)
    assert nothing_left(model)
    assert kept[0].get("loss").steps == [0, 1, 2]
    assert [step for step, _ in memory.points("interp/gradient_norm")] == [0, 1, 2]


def test_nothing_is_on_the_model_between_probed_steps():
    """Hooks and mode are there for the forward of probed batches alone."""
    on = {"forward": [], "backward": [], "end": []}

    class Look(Plain):
        def forward(self, x):
            on["forward"].append(not nothing_left(self))
            return super().forward(x)

        def on_after_backward(self):
            on["backward"].append(not nothing_left(self))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            on["end"].append(not nothing_left(self))

    fit(Look(), strict(dense_steps=2, every_n_train_steps=None))
    # Each of the two probed steps has a second forward, with nothing on.
    assert on["forward"] == [True, False, True, False, False, False, False, False]
    assert on["backward"] == [False] * 6
    assert on["end"] == [False] * 6


def test_skipped_batch_leaves_nothing_on_the_model():
    """A hook of the user's may end the epoch before the batch has begun."""

    class Skips(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    model = Skips()
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(nothing_left(pl_module))

    watcher = fit(model, strict(), others=[Look()])
    assert seen == [True]
    assert watcher.history.get("loss").steps == [0, 1]


def test_pickle_of_the_model_made_in_a_step_loads_without_this_package():
    """A checkpoint with the network in its hyper-parameters must open anywhere."""
    kept = []

    class Saves(Plain):
        def training_step(self, batch, batch_idx):
            kept.append((pickle.dumps(self.net), batch[0]))
            return self.loss(batch)

    model = Saves()
    fit(model, strict())
    data, images = kept[0]
    program = (
        "import sys, pickle; sys.modules['lightning_interp'] = None; import torch;"
        "data, x = pickle.load(sys.stdin.buffer);"
        "net = pickle.loads(data); print(tuple(net(x).shape)); net = pickle.loads(pickle.dumps(net)); net(x)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps((data, images)), capture_output=True, check=False
    )
    assert done.stdout.decode().strip() == f"({BATCH}, {CLASSES})", done.stderr.decode()
    assert model.net[0].weight.grad is not None


def test_callback_can_be_pickled_before_and_after():
    """Other processes get it."""
    dynamics, model = strict(), Net()
    assert pickle.loads(pickle.dumps(dynamics)).dense_steps == 25
    fit(model, dynamics)
    assert pickle.loads(pickle.dumps(dynamics)).state_dict() == dynamics.state_dict()


# ---------------------------------------------------------------------- it survives


def test_resumed_run_neither_repeats_nor_loses_a_value(tmp_path):
    """Saved in the middle, with values that nobody has fetched yet."""
    saved = tmp_path / "middle.ckpt"
    reached = []

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 13:
                reached.extend(copy.deepcopy(Session.of(trainer).history).get("loss").steps)
                trainer.save_checkpoint(saved)

    torch.manual_seed(0)
    whole = fit(Plain(), strict(), loader(24), others=[Save()]).history
    assert reached == list(range(10))
    state = torch.load(saved, weights_only=True)["callbacks"]["TrainingDynamics"]
    assert [item["step"] for item in state["backlog"] if item["kind"] == "loss"] == [10, 11, 12, 13]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch")
        resumed = fit(Plain(), strict(), loader(24), fit_options={"ckpt_path": saved}).history
    assert resumed.get("loss").steps[:4] == [10, 11, 12, 13]
    assert resumed.get("loss").values[:4] == whole.get("loss").values[10:14]
    assert resumed.get("update_ratio", "net.0").values[:4] == whole.get("update_ratio", "net.0").values[10:14]
    steps = resumed.get("loss").steps
    assert steps == list(range(10, steps[-1] + 1))
    assert steps[-1] > 13
    assert ("input_mean", None) not in resumed.facts


def test_state_goes_through_a_checkpoint_and_back():
    """Plain Python only, equal on both sides."""
    dynamics = strict()
    fit(Plain(), dynamics)
    twin = strict()
    twin.load_state_dict(pickle.loads(pickle.dumps(dynamics.state_dict())))
    assert twin.state_dict() == dynamics.state_dict()


def test_fitting_twice_with_one_callback_begins_anew():
    """Nothing of the first run gets into the second."""
    dynamics = strict()
    first = fit(Plain(), dynamics).history
    second = fit(Plain(), dynamics).history
    assert first.get("loss").steps == second.get("loss").steps == list(range(6))


@pytest.mark.parametrize("options", [{"fast_dev_run": 2}, {"max_steps": 3, "max_epochs": -1}, {"logger": True}])
def test_other_ways_to_run(options, tmp_path):
    """A dry run, a number of steps, a logger of Lightning's own."""
    history = fit(Plain(), strict(), **(options | {"default_root_dir": tmp_path})).history
    assert len(history.get("loss")) == {"fast_dev_run": 2, "max_steps": 3}.get(next(iter(options)), 6)
