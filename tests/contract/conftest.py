"""What holds for all tests of the contract: quiet Trainers, and warnings of Lightning's own that say nothing here."""

import logging
import warnings

import pytest

CHATTER = (
    r".*does not have many workers",
    r".*lower value for log_every_n_steps",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Checkpoint directory .* exists and is not empty",
    r"`training_step` returned `None`",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"Your `IterableDataset` has `__len__` defined",
)


@pytest.fixture(autouse=True)
def _without_chatter():
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)
    names = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
