"""What `Alerts` keeps of the user's own validation."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_interp.callbacks._validation import MOST, validation_metrics, validation_samples
from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.callbacks.session import Session
from lightning_interp.rules import DeadFiltersRule, OverfittingRule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]


class Net(pl.LightningModule):
    """Logs a validation loss of 1, 2, 3, ..., and counts them itself."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.validations = 0

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val_loss", float(self.validations + 1 + batch_idx))

    def on_validation_end(self):
        self.validations += not self.trainer.sanity_checking

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data(count):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self):
        yield from data(6)


def fit(val, *, rule=None, **options):
    """Three epochs of four steps; the Trainer."""
    settings = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        callbacks=[Alerts(rules=[rule or OverfittingRule()], on_error="raise")], **settings | quiet | options
    )
    trainer.fit(Net(), DataLoader(data(8), 2), None if val is None else DataLoader(val, 2))
    return trainer


def test_metrics_are_kept_at_the_end_of_each_validation_and_not_of_the_sanity_check():
    """Means over the batches, at the step on the axis of `self.log`."""
    history = Session.of(fit(data(6))).history
    series = history.get("validation_metric", "val_loss")
    assert series.values == [2.0, 3.0, 4.0]
    assert series.steps == [3, 7, 11]
    assert history.layers("validation_metric") == ["train_loss", "val_loss"]
    assert history.fact("validation_samples", 0) == 6


def test_validation_within_an_epoch_is_kept_too():
    """Twice an epoch."""
    history = Session.of(fit(data(6), val_check_interval=2, max_epochs=1)).history
    assert history.get("validation_metric", "val_loss").values == [2.0, 3.0]
    assert history.get("validation_metric", "val_loss").steps == [1, 3]


@pytest.mark.parametrize(
    ("val", "options", "samples"),
    [
        (data(7), {}, 7),
        (data(7), {"limit_val_batches": 2}, 4),
        (Stream(), {}, None),
        (None, {}, None),
    ],
    ids=["all", "limited", "no length", "none"],
)
def test_samples_are_counted_where_they_can_be(val, options, samples):
    """The last batch may be smaller, and not all batches may be looked at."""
    history = Session.of(fit(val, **options)).history
    assert history.facts.get(("validation_samples", None)) == samples


def test_only_single_numbers_of_the_user_are_kept():
    """Not our own ones, no vectors, and not more than a bound."""

    class Finished:
        callback_metrics = {"val_loss": torch.tensor([0.5]), "interp/dead_filters": torch.tensor(0.0)}  # noqa: RUF012
        num_val_batches, val_dataloaders = (), None

    Finished.callback_metrics |= {"vector": torch.ones(2), "text": "no", "count": torch.tensor(3)}
    assert validation_metrics(Finished) == {"val_loss": 0.5, "count": 3.0}
    assert validation_samples(Finished) is None
    Finished.callback_metrics = {str(number): torch.tensor(1.0) for number in range(MOST + 5)}
    assert len(validation_metrics(Finished)) == MOST
    Finished.callback_metrics = {}
    assert validation_metrics(Finished) == {}


def test_they_are_kept_for_rules_of_ones_own():
    """Whatever the rules are."""
    history = Session.of(fit(data(6), rule=DeadFiltersRule())).history
    assert len(history.get("validation_metric", "val_loss")) == 3
