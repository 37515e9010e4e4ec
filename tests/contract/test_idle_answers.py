"""What a family keeps of the answers of its children is what they would answer if they were asked again."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_interp import (
    ActivationSparsity,
    Alerts,
    DeadFilters,
    EmbeddingProjection,
    FilterGrid,
    Interp,
    SaliencyMaps,
    TrainingDynamics,
)
from lightning_interp.callbacks import _family
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks._lightning import accumulates, axis_step
from tests.contract.nets import pl, quiet_trainer

COUNT = 170  # batches in an epoch


class Net(pl.LightningModule):
    """One convolution; in manual mode it steps on every third batch only, in turns with a second optimizer."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers()[batch_idx % 2].step()
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        first = torch.optim.SGD(self.parameters(), 1e-3)
        return first if self.automatic_optimization else [first, torch.optim.SGD(self.parameters(), 1e-3)]


class Stream(IterableDataset):
    """Without a length."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for index in range(2 * COUNT):
            yield torch.randn(1, 6, 6, generator=generator), index % 3


class Every(Family):
    """Callbacks that are due after steps, at periods that have little in common."""

    def __init__(self):
        super().__init__(on_error="raise")
        self.children = [
            ActivationSparsity(every_n_train_steps=7, on_error="raise"),
            FilterGrid(every_n_train_steps=13, on_error="raise"),
            SaliencyMaps(every_n_train_steps=31, num_samples=1, curve_steps=0, on_error="raise"),
            EmbeddingProjection(every_n_train_steps=29, max_points=6, on_error="raise"),
            TrainingDynamics(every_n_train_steps=11, dense_steps=10, on_error="raise"),
            DeadFilters(split="train", window_steps=37, on_error="raise"),
            Alerts(on_error="raise"),
        ]


def _answers(family):
    """What the family goes by, those of families inside of it included."""
    asked = {name: [id(child) for child in children] for name, children in (family._asked or {}).items()}
    own = {name: set(family._due) for name in ("due",)}
    return asked, own, [_answers(child) for child in family.children if isinstance(child, Family)]


def _check(family, trainer, batch_idx):
    before, same = _answers(family), family._same
    family.batch_hooks(trainer, batch_idx, axis_step(trainer), stepping=not accumulates(trainer))
    assert _answers(family) == before, (batch_idx, axis_step(trainer))
    family._same = same


@pytest.fixture
def kept(monkeypatch):
    """Asks again at each batch; counts how often an answer was taken from before, and in how many it dozed."""
    ask, doze, counts = Family._ask, Family._while_dozing, {"kept": 0, "batches": 0, "dozed": 0}

    def asking(family, trainer, batch_idx):
        was_kept = batch_idx in family._same
        ask(family, trainer, batch_idx)
        _check(family, trainer, batch_idx)
        counts["batches"] += 1
        counts["kept"] += was_kept

    def dozing(family, trainer, pl_module, outputs, batch, batch_idx):  # noqa: PLR0917 - Lightning's signature
        first = batch_idx not in family._same  # the one in whose beginning it was asked
        _check(family, trainer, batch_idx)
        doze(family, trainer, pl_module, outputs, batch, batch_idx)
        counts["batches"] += not first
        counts["kept"] += not first
        counts["dozed"] += 1

    monkeypatch.setattr(_family.Family, "_ask", asking)
    monkeypatch.setattr(_family.Family, "_while_dozing", dozing)
    return counts


def _loader(stream=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * COUNT, 1, 6, 6, generator=generator)
    return DataLoader(Stream() if stream else TensorDataset(images, torch.arange(2 * COUNT) % 3), batch_size=2)


@pytest.mark.parametrize(
    ("make", "options", "least", "dozed"),
    [
        (lambda: Interp("light", on_error="raise"), {}, 0.6, 0.6),
        (lambda: Interp(on_error="raise"), {}, 0.6, 0.6),
        (lambda: Interp("full", on_error="raise"), {}, 0.6, 0.0),
        (Every, {}, 0.0, 0.0),
        (lambda: Interp(on_error="raise"), {"val_check_interval": 40}, 0.6, 0.6),
        (lambda: Interp(on_error="raise"), {"accumulate_grad_batches": 3}, 0.0, 0.0),
        (lambda: Interp(on_error="raise", budget=0.02), {}, 0.6, 0.6),
        (lambda: Interp(on_error="raise"), {"stream": True}, 0.3, 0.2),
        (lambda: Interp(on_error="raise"), {"manual": True}, 0.3, 0.3),
    ],
    ids=["light", "standard", "full", "steps", "validation", "accumulation", "budget", "stream", "manual"],
)
def test_kept_answers_are_those_of_asking_again(kept, make, options, least, dozed):
    """At each batch of two epochs; and most of them are kept, and dozed away, where little is due."""
    options = dict(options)
    stream, manual = options.pop("stream", False), options.pop("manual", False)
    torch.manual_seed(0)
    trainer = quiet_trainer(callbacks=[make()], max_epochs=2, num_sanity_val_steps=0, **options)
    trainer.fit(Net(manual), _loader(stream), DataLoader(_loader().dataset, batch_size=64))
    assert kept["batches"] >= 2 * COUNT
    assert kept["kept"] >= least * kept["batches"]
    assert kept["dozed"] >= dozed * kept["batches"]
    assert bool(kept["dozed"]) is bool(dozed)
