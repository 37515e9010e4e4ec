"""Regressions: told by their targets, spoken of as outputs, and left alone by what needs classes."""

import json
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import Interp, OcclusionMaps, SaliencyMaps
from lightning_interp.callbacks import occlusion_maps, saliency_maps
from lightning_interp.callbacks._regression import read_regression
from lightning_interp.callbacks._verdicts import captions, choose_targets, verdicts
from lightning_interp.callbacks.scores import read_scores, read_targets
from lightning_interp.errors import InterpWarning
from tests.callbacks.attribution_kit import Gallery
from tests.contract.conftest import _without_chatter  # noqa: F401 - a fixture for all tests here
from tests.contract.nets import pl, quiet_trainer

ABOUT_CLASSES = [
    torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    torch.tensor([[0, 1, 1], [1, 0, 0]]),
    torch.tensor([[False, True, True], [True, False, False]]),
    torch.tensor([[0.05, 0.95, 0.95], [0.95, 0.05, 0.05]]),  # smoothed
    torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]),  # soft
    torch.tensor([[0.0, -1.0, 1.0], [1.0, torch.nan, 0.0]]),  # uncertain, unknown
    torch.zeros(2, 3),
    torch.full((2, 3), -100),
    torch.tensor([2, 0]),
    torch.rand(2, 3, 3),
    None,
]


@pytest.mark.parametrize("labels", ABOUT_CLASSES)
def test_labels_of_classes_are_no_regression(labels):
    """One-hot, soft, multi-label, smoothed, in part unknown; other shapes."""
    assert read_regression(torch.randn(2, 3), labels) is None


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[0.13, 0.4, 0.7], [0.2, 0.9, 0.5]]),  # in [0, 1], as scaled coordinates are
        torch.tensor([[0.13, 0.4, 3.7]] * 2, dtype=torch.bfloat16),
        torch.tensor([[-1.5, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        torch.tensor([[12, 40, 33], [0, 1, 1]]),  # pixels
        torch.rand(2, 1, 3) + torch.tensor([0.0, 0.0, 1.0]),
    ],
)
def test_real_numbers_as_many_as_outputs_are_a_regression(labels):
    """In any type; also where the loss sees another shape than the model gives."""
    scores = torch.randn(2, 3)
    found = read_regression(scores, labels)
    assert torch.equal(found.outputs, scores)
    assert torch.equal(found.targets, labels.reshape(2, 3).double())
    assert read_targets(labels, scores) is None


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("labels", [torch.tensor([0.3, 0.9, 0.1]), torch.tensor([31.0, 0.0, 64.0])])
def test_a_single_output_is_given_back_as_it_was(shape, labels):
    """Though scores have two columns; labels of a binary task are no regression."""
    output = torch.randn(3)
    scores = read_scores(output.reshape(shape), 3)
    found = read_regression(scores, labels)
    assert torch.equal(found.outputs[:, 0], output)
    assert choose_targets(scores, labels, "label").tolist() == [1, 1, 1]
    assert read_regression(scores, torch.tensor([0.0, 1.0, 1.0])) is None
    assert read_regression(scores, torch.tensor([3, 0, 9])) is None
    assert read_regression(torch.randn(3, 2), labels) is None  # a head for two classes


def test_captions_say_output_and_target():
    """Each sample shows another output, by its name where there is one; so do parts of the samples."""
    scores = torch.tensor([[0.25, -3.0], [7.0, 1.5], [0.5, 0.0]])
    labels = torch.tensor([[0.75, 1.0], [2.0, 3.0], [torch.nan, 1.0]])
    targets = choose_targets(scores, labels, "predicted")
    assert targets.tolist() == [0, 1, 0]
    assert choose_targets(scores[1:], labels[1:], "label", first=1).tolist() == [1, 0]

    def said(name):
        return ["".join(text for line in each for text, _ in line) for each in captions(found, name)]

    found = verdicts(scores, labels, targets)
    assert said(str) == ["output 0: 0.25 target 0.75", "output 1: 1.5 target 3", "output 0: 0.5 "]
    assert said(["x", "y"].__getitem__)[1] == "y: 1.5 target 3"


class Measures(pl.LightningModule):
    """Tells numbers of digits, K at a time."""

    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32), nn.ReLU(), nn.Linear(32, outputs)
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).reshape(batch[1].shape), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def regression(outputs, *, flat=False, whole=False, count=160):
    """Digits, and the brightness of `outputs` columns in [0, 1]; of all eight for one output."""
    images = torch.tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 16
    targets = images.mean(dim=(1, 2))[:, 1 : 1 + outputs] if outputs > 1 else images.mean(dim=(1, 2, 3))[:, None]
    targets = (20 * targets).round() if whole else targets
    return TensorDataset(images, targets[:, 0] if flat else targets)


@pytest.fixture
def written(monkeypatch):
    """What stands below the samples in the pictures."""
    texts = []
    for module in (saliency_maps, occlusion_maps):

        def note(panels, names, captions, *, drawn=module.sheet):
            texts.extend("".join(text for line in each for text, _ in line) for each in captions)
            return drawn(panels, names, captions)

        monkeypatch.setattr(module, "sheet", note)
    return texts


@pytest.mark.parametrize(
    ("outputs", "options"), [(6, {}), (1, {}), (1, {"flat": True}), (1, {"flat": True, "whole": True})], ids=str
)
def test_a_regression_is_never_spoken_of_as_classes(tmp_path, written, outputs, options):
    """Pictures, messages, numbers and alerts of all callbacks together."""
    train, val = regression(outputs, **options), regression(outputs, **options, count=40)
    gallery = Gallery()
    trainer = quiet_trainer(
        callbacks=[Interp(level="full")], logger=[gallery, pl.loggers.TensorBoardLogger(tmp_path)], max_epochs=6
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Measures(outputs), DataLoader(train, batch_size=16), DataLoader(val, batch_size=20))
    messages = [str(each.message) for each in caught if each.category is InterpWarning]
    assert "a regression, it seems" in messages[0]
    # What is whole could be classes, until the model has been asked.
    assert [each for each in messages[1:] if "no image has a label that is a class" not in each] == []
    assert len(messages) == 1 + bool(options.get("whole"))
    assert written
    assert all(text.startswith("output") and " target " in text for text in written)
    assert {text.split(":")[0] for text in written} == (
        {f"output {k}" for k in range(4)} if outputs > 1 else {"output"}
    )
    tags = gallery.pictures.keys() | gallery.of_interp().keys()
    assert {"interp.saliency/gradient", "interp.occlusion/drop", "interp.embedding/net.5"} <= tags
    wrong = ("class", "influence", "suspect", "label", "knn", "deletion", "insertion", "chance")
    assert [tag for tag in tags if any(word in tag for word in wrong)] == []
    lines = [line for path in tmp_path.rglob("alerts.jsonl") for line in path.read_text("utf-8").splitlines()]
    assert not {json.loads(line)["rule"] for line in lines} & {"unlearned_class", "suspect_labels"}


@pytest.mark.parametrize("callback", [SaliencyMaps, OcclusionMaps])
def test_each_sample_shows_another_output_whatever_the_size_of_the_parts(written, callback):
    """Eight samples, three of them in a forward."""
    trainer = quiet_trainer(
        callbacks=[callback(num_samples=8, batch_size=3, on_error="raise")], logger=Gallery(), max_epochs=1
    )
    trainer.fit(Measures(3), DataLoader(regression(3, count=32), batch_size=16))
    assert [text.split(":")[0] for text in written[:8]] == [f"output {k % 3}" for k in range(8)]
