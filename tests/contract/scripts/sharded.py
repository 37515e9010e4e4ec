"""Scenarios for `two_processes.py` in which each process holds a part of each weight (`fully_shard`, on the CPU)."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_interp import ActivationSparsity, Alerts, DeadFilters, Interp, TrainingDynamics
from tests.contract.battery import differences
from tests.contract.nets import Capture, loader, quiet_trainer, seed_all


class Split(pl.LightningModule):
    """Two convolutions and a head; each is split over the processes by itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Dropout(0.2), nn.MaxPool2d(2), nn.Flatten()),
            nn.Linear(54, 3),
        )

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for part in (*self.net, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SplitMarked(pl.LightningModule):
    """Four filters 1x1 over three channels, which never change: 0 fires on rank 0 alone, 1 on rank 1, 3 always."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        with torch.no_grad():
            self.net[0].weight.zero_()
            self.net[0].weight[0, 0] = self.net[0].weight[1, 1] = 1.0
            self.net[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0, 1.0]))

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        images = torch.zeros(12, 3, 4, 4)
        images[-1, self.trainer.global_rank, 2, 3] = 1.0
        return torch.utils.data.DataLoader([(image, torch.tensor(0)) for image in images], batch_size=4)


def _trainer(patience, callbacks, **options):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=patience
    )
    return quiet_trainer(devices=2, strategy=strategy, callbacks=callbacks, **options)


def _own(state):
    """What this rank holds of a nested state."""
    if isinstance(state, dict):
        return {key: _own(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_own(value) for value in state]
    return state.to_local().detach().clone() if isinstance(state, DTensor) else state


def harmless(patience, make_callbacks):
    """Everything with the callbacks and without them."""
    outcomes = []
    for callbacks in ([], make_callbacks()):
        seed_all(11)
        model, logger = Split(), Capture()
        trainer = _trainer(patience, callbacks, logger=logger)
        trainer.fit(model, loader(noise=0.0), loader(12, seed=1, shuffle=False, noise=0.0))
        outcomes.append(
            {
                "weights": _own(model.state_dict()),
                "optimizer": _own(trainer.optimizers[0].state_dict()),
                "generator": torch.get_rng_state(),
                "logged": logger.of_the_user(),
                "modes": [module.training for module in model.modules()],
            }
        )
    split = isinstance(model.net[0][0].weight, DTensor)
    return {"differences": differences(*outcomes), "sharded": split}


def counts(patience):
    """What is called dead, and the share of zeros."""
    dead = DeadFilters(split="train", on_error="raise")
    sparse = ActivationSparsity(every_n_train_steps=1, maps=False, on_error="raise")
    trainer = _trainer(patience, [dead, sparse], use_distributed_sampler=False)
    trainer.fit(SplitMarked())
    return {"dead": dead.dead["net.0"], "sparsity": trainer.callback_metrics["interp/sparsity_mean"].item()}


def watching():
    """All that need only the running forward, as often as can be."""
    return [
        DeadFilters(split="train", window_steps=1, on_error="raise"),
        ActivationSparsity(every_n_train_steps=1, on_error="raise"),
        TrainingDynamics(dense_steps=1000, on_error="raise"),
        Alerts(on_error="raise"),
    ]


def scenarios(patience):
    """By name."""
    return {
        "sharded_watching": lambda: harmless(patience, watching),
        "sharded_Interp": lambda: harmless(patience, lambda: [Interp("full", on_error="raise")]),
        "sharded_counts": lambda: counts(patience),
    }
