"""The run that is judged: a Lightning Trainer with `Alerts()`, and what the labels need besides."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.diagnosis import models
from benchmarks.diagnosis.census import census
from benchmarks.diagnosis.faults import change_batch, fault_of
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.train import Setting, loss_of, prepare
from benchmarks.diagnosis.treatment import treat_batch, treated
from lightning_interp import Alerts, Influence
from lightning_interp.callbacks.session import Session


class Module(pl.LightningModule):
    """Trains and keeps each loss, and counts the dead by brute force after the first, middle and last epoch."""

    def __init__(self, spec: Spec, setting: Setting) -> None:
        super().__init__()
        self.net, self.spec, self.setting = setting.net, spec, setting
        self.losses: list[float] = []
        self.val_losses: list[float] = []
        self.counts: list[list[float]] = []
        self.treated: tuple[Tensor, Tensor] | None = None  # the last batch

    def forward(self, images: Tensor) -> Tensor:
        """Scores, (N, outputs)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        step = len(self.losses)
        changed = change_batch(*batch, step, self.spec.fault)
        images, targets = self.treated = treat_batch(changed, step, self.spec, self.treated)
        loss = loss_of(self(images), targets)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """There is one validation batch."""
        scores = self(batch[0])
        loss = loss_of(scores, batch[1])
        self.val_losses.append(float(loss))
        self.log("val_loss", loss)
        if not batch[1].is_floating_point():
            self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    def on_train_epoch_end(self) -> None:
        """Counts."""
        epochs = self.setting.epochs
        if self.current_epoch in {0, epochs // 2, epochs - 1}:
            self.counts.append([round(share, 4) for share in census(self.net, self.setting.data.images)])

    def configure_optimizers(self) -> Any:
        """As prepared."""
        if self.setting.scheduler is None:
            return self.setting.optimizer
        return [self.setting.optimizer], [{"scheduler": self.setting.scheduler, "interval": "step"}]


def train_watched(spec: Spec) -> dict[str, Any]:
    """The losses, the alerts, the numbers for the labels, and the history for `replay`."""
    _be_quiet()
    setting = prepare(spec)
    module, before, alerts = Module(spec, setting), models.weights(setting.net), Alerts()
    watch = _label_watch(spec)
    trainer = pl.Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        precision="bf16-mixed" if spec.precision == "bf16" else "32-true",
        gradient_clip_val=treated(spec).clip or None,
        callbacks=[alerts, *watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = setting.data
    validation = DataLoader(TensorDataset(data.val_images, data.val_targets), len(data.val_images))
    trainer.fit(module, setting.batches, validation)
    after = models.weights(setting.net)
    return {
        "losses": module.losses,
        "val_losses": [loss if math.isfinite(loss) else None for loss in module.val_losses],
        "counts": module.counts,
        "still": [name for name, weight in after.items() if torch.equal(weight, before[name])],
        "watched_labels": bool(watch),
        "suspects": [index for callback in watch for index in callback._watch.rank(len(data.images)).indices.tolist()],
        "alerts": [brief(asdict(alert)) for alert in alerts.history],
        "history": Session.of(trainer).history.state_dict(),
    }


def brief(alert: dict[str, Any]) -> dict[str, Any]:
    """What the score needs of an alert."""
    names = ("rule", "severity", "status", "layer", "step", "cause", "message", "advice")
    kept = {name: alert[name] for name in names}
    evidence = {name: _finite(value) for name, value in alert["evidence"].items()}
    return kept | {"value": _finite(alert["value"]), "evidence": evidence}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _label_watch(spec: Spec) -> list[Influence]:
    """For runs with wrong labels, and for the healthy ones that they are compared with."""
    fault = fault_of(spec.fault)
    plain = spec.trait == "none" and spec.data == "digits" and spec.seed == 0 and not spec.long
    wanted = fault.watch_labels if fault else plain
    return [Influence(every_n_epochs=3, num_train=1200)] if wanted else []


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_interp"):
        logging.getLogger(name).setLevel(logging.ERROR)
