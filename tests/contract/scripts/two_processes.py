"""One of two processes that train together on the CPU: `two_processes.py FOLDER SCENARIO...`.

Each scenario is a fit; what this process saw of it is written to `FOLDER/<scenario>.<rank>.json`. All scenarios run in
the same pair of processes, since starting one takes seconds. A collective that one rank misses ends in an error after
`PATIENCE`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_interp import ActivationSparsity, Alerts, DeadFilters, Interp, InterpWarning, NonFiniteRule, TopPatches
from tests.contract.battery import differences
from tests.contract.factories import often
from tests.contract.hooks import hooks_on, modes_on_stack
from tests.contract.nets import Capture, Net, loader, seed_all

PATIENCE = timedelta(seconds=40)


class Marked(pl.LightningModule):
    """Four filters 1x1 over three channels; the weights never change, so which filters fire is known from the data.

    Filter 0 fires where channel 0 is set, filter 1 where channel 1 is set, filter 2 never, filter 3 always. The samples
    of rank 0 have channel 0 set in one pixel of the last batch, those of rank 1 channel 1.
    """

    def __init__(self, val_batches=(2, 2)):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.val_batches = val_batches
        self.fired = {}
        with torch.no_grad():
            self.net[0].weight.zero_()
            self.net[0].weight[0, 0] = self.net[0].weight[1, 1] = 1.0
            self.net[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0, 1.0]))
        self.net[1].register_forward_hook(self._count)

    def _count(self, module, args, output):
        if not self.trainer.sanity_checking:
            window = "train" if self.trainer.training else "val"
            seen = (output.detach() > 0).amax((0, 2, 3))
            self.fired[window] = self.fired.get(window, torch.zeros(4, dtype=torch.bool)) | seen

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def _loader(self, batches):
        images = torch.zeros(4 * batches, 3, 4, 4)
        images[-1, self.trainer.global_rank, 2, 3] = 1.0
        samples = [(image, torch.tensor(0)) for image in images]
        return DataLoader(samples, batch_size=4)

    def train_dataloader(self):
        return self._loader(3)

    def val_dataloader(self):
        return self._loader(self.val_batches[self.trainer.global_rank])  # Lightning refuses a rank without any


def trainer(callbacks, **options):
    """A quiet Trainer over two processes."""
    quiet = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": DDPStrategy(timeout=PATIENCE, process_group_backend="gloo"),
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(callbacks=callbacks, **{**quiet, **options})


class Batches(pl.Callback):
    """Counts the batches of this process."""

    def __init__(self):
        self.train = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train += 1


def everyone(value):
    """The values of all ranks."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


# ---------------------------------------------------------------------- scenarios


def union(split, val_batches=(2, 2)):
    """What the callback calls dead, and what a brute-force count over all ranks does."""
    callback = DeadFilters(split=split, on_error="raise")
    model = Marked(val_batches)
    trainer([callback]).fit(model)
    fired = [state[split] for state in everyone(model.fired)]
    seen = torch.stack(fired).any(dim=0)
    alone = [(~mask).nonzero().flatten().tolist() for mask in fired]
    return {"dead": callback.dead["net.0"], "union": (~seen).nonzero().flatten().tolist(), "alone": alone}


class Uneven(Marked):
    """The samples of rank 1 have four pixels set where those of rank 0 have one; counts the zeros of the last batch."""

    def _count(self, module, args, output):
        self.zeros = (output.detach() == 0).float().mean(dim=(0, 2, 3)).mean().item()

    def _loader(self, batches):
        images = torch.zeros(4 * batches, 3, 4, 4)
        images[-1, 0, 2, : 1 + 3 * self.trainer.global_rank] = 1.0
        return DataLoader([(image, torch.tensor(0)) for image in images], batch_size=4)


def sparsity():
    """The metric on this rank, and the share of zeros that each rank saw in its last batch."""
    callback = ActivationSparsity(every_n_train_steps=1, maps=False, on_error="raise")
    model = Uneven()
    run = trainer([callback], limit_val_batches=0)
    run.fit(model)
    return {"metric": run.callback_metrics["interp/sparsity_mean"].item(), "zeros": everyone(model.zeros)}


def pictures(folder):
    """One event file and one alert file for both processes."""
    board = pl.loggers.TensorBoardLogger(folder / "board", version=0)
    callback = Interp("full", on_error="raise")
    model = Marked()
    trainer([callback], logger=board).fit(model)
    return {"directory": everyone(str(board.log_dir)), "hooks": len(hooks_on(model)), "modes": modes_on_stack()}


def harmless(make_callbacks):
    """The weights with the callbacks and without them."""
    outcomes = []
    for callbacks in ([], make_callbacks()):
        seed_all(11)
        model, logger = Net(), Capture()
        options = {"logger": logger, "use_distributed_sampler": True, "accumulate_grad_batches": 2}
        fitted = trainer(callbacks, **options)
        fitted.fit(model, loader(), loader(12, seed=1, shuffle=False))
        states = [optimizer.state_dict() for optimizer in fitted.optimizers]
        outcomes.append((model.state_dict(), states, torch.get_rng_state(), model.diary, logger.of_the_user()))
    return {"differences": differences(*outcomes)}


def failing(cls, hook, bad_rank, when="before"):
    """One callback fails on one rank only."""

    def broken(self, trainer, *args, **kwargs):
        if when == "after":
            getattr(super(made, self), hook)(trainer, *args, **kwargs)
        if trainer.global_rank == bad_rank:
            raise RuntimeError(f"in {hook} on rank {bad_rank}")
        if when == "before":
            getattr(super(made, self), hook)(trainer, *args, **kwargs)

    broken.__name__ = hook
    made = type("Broken", (cls,), {hook: broken})
    batches, model = Batches(), Marked()
    options = {
        DeadFilters: {"split": "train", "window_steps": 2},
        Alerts: {"on_alert": "stop", "rules": [NonFiniteRule()]},  # all ranks must decide together
    }
    trainer([made(**options.get(cls, {})), batches]).fit(model)
    return {"train": batches.train, "hooks": len(hooks_on(model)) - 1, "modes": modes_on_stack()}


class Dry(IterableDataset):
    """A stream of images that gives rank one none at all."""

    def __init__(self, rank, batches):
        self.count = 0 if rank else 4 * batches

    def __iter__(self):
        for _ in range(self.count):
            image = torch.zeros(3, 4, 4)
            image[0, 2, 3] = 1.0
            yield image, torch.tensor(0)


class Uneventful(Marked):
    """Rank one has nothing to validate on."""

    def val_dataloader(self):
        return DataLoader(Dry(self.trainer.global_rank, 2), batch_size=4)


def dry():
    """All callbacks, with a rank that sees no validation batch."""
    callbacks, model, batches = often(), Uneventful(), Batches()
    callbacks[0] = DeadFilters(split="val", on_error="raise")
    trainer([*callbacks, batches], logger=Capture()).fit(model)
    return {
        "dead": callbacks[0].dead["net.0"],
        "train": batches.train,
        "alone": [bool(fired) for fired in everyone("val" in model.fired)],
    }


def patches_fail():
    """Rank zero can't draw: that comes after the ranks have met, so nobody must wait for anybody."""

    class Undrawable(TopPatches):
        def _show(self, *args, **kwargs):
            raise RuntimeError("in _show on rank 0")

    batches, without, model = Batches(), Batches(), Marked()
    options = {"use_distributed_sampler": True}
    trainer([without], **options).fit(Marked())
    trainer([Undrawable(), batches], logger=Capture(), **options).fit(model)
    return {
        "train": batches.train,
        "train_without": without.train,
        "hooks": len(hooks_on(model)) - 1,
        "modes": modes_on_stack(),
    }


def stops():
    """An alert stops all ranks together."""

    class Diverges(Marked):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    batches = Batches()
    trainer([Alerts(on_alert="stop", on_error="raise"), batches], max_epochs=20).fit(Diverges())
    return {"train": batches.train}


def scenarios(folder):
    """All of them, by name."""
    found = {
        "train_union": lambda: union("train"),
        "val_union": lambda: union("val"),
        "fewer_batches_on_rank_1": lambda: union("val", (3, 1)),
        "fewer_batches_on_rank_0": lambda: union("val", (1, 3)),
        "sparsity": sparsity,
        "pictures": lambda: pictures(folder),
        "harmless_often": lambda: harmless(often),
        "harmless_Interp": lambda: harmless(lambda: [Interp(on_error="raise")]),
        "stops": stops,
        "dry": dry,
        "patches_fail": patches_fail,
    }
    hooks = (
        "setup",
        "on_train_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
    )
    for hook in hooks:
        for bad_rank in (0, 1):
            found[f"fails_{hook}_{bad_rank}"] = lambda hook=hook, rank=bad_rank: failing(DeadFilters, hook, rank)
    for hook in ("on_train_batch_start", "on_train_epoch_end"):
        for bad_rank in (0, 1):
            name = f"sparsity_fails_{hook}_{bad_rank}"
            found[name] = lambda hook=hook, rank=bad_rank: failing(ActivationSparsity, hook, rank)
    for hook in ("on_train_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"):
        found[f"alerts_{hook}"] = lambda hook=hook: failing(Alerts, hook, 0)
        found[f"interp_{hook}"] = lambda hook=hook: failing(Interp, hook, 1, "after")
    return found


def main(folder, names):
    """Runs the scenarios one after the other."""
    known = scenarios(folder)
    if any(name.startswith("sharded") for name in names):  # not every torch has what they need
        from tests.contract.scripts import sharded

        known |= sharded.scenarios(PATIENCE)
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = known[name]()
            except BaseException:
                result = {"error": traceback.format_exc()[-1500:]}
        result["said"] = [str(warning.message) for warning in caught if issubclass(warning.category, InterpWarning)]
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
        if "error" in result:  # the processes may be out of step: the others go on in new ones
            os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
