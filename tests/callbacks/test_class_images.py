"""The callback that makes an image for each class."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.callbacks.class_images import _ALL, ClassImages
from lightning_interp.callbacks.scores import ScoreModel
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.class_images import class_evidence, maximize_class
from tests.contract.battery import assert_undisturbed, fit_quietly
from tests.contract.conftest import _without_chatter  # noqa: F401 - a fixture
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import Net, loader, pl, quiet_trainer
from tests.contract.recipes import Recipe, TwoOptimizers
from tests.reading import read, summaries

NUMBERS = ("class_image_probability", "class_image_augmented", "class_image_score")
STEPS = [0, 3, 7]


def make(**options):
    return ClassImages(**{"steps": 4, "num_samples": 8, "on_error": "raise", **options})


def fit(callbacks, folder, model=None, *, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = model or Net()
    board = pl.loggers.TensorBoardLogger(folder)
    trainer = quiet_trainer(callbacks=callbacks, logger=board, **options)
    said = fit_quietly(
        trainer, model, loader(noise=0.0), loader(12, seed=1, shuffle=False, noise=0.0), ckpt_path=ckpt_path
    )
    board.finalize("success")
    return trainer, model, said


def test_logs_what_it_says_and_nothing_else(tmp_path):
    """A picture a class, one of all, a strip, three numbers a class; before the first step and after each epoch."""
    trainer, model, said = fit([make(classes=["cat", "dog", "owl"])], tmp_path)
    log = read(tmp_path, "slow")
    assert said == []
    pictures = {f"interp.class_images/{name}" for name in ("cat", "dog", "owl", "all", "strip")}
    assert set(log.images) == pictures
    ours = {tag for tag in log.scalars if tag.startswith("interp") and "cost" not in tag}
    assert ours == {f"interp.{number}/{name}" for number in NUMBERS for name in ("cat", "dog", "owl")}
    for tag in ours:
        assert log.steps(tag) == STEPS
    for tag in pictures:
        assert [step for step, _ in log.images[tag]] == STEPS
        for _, pixels in log.images[tag]:
            assert 0.5 <= pixels.shape[0] / pixels.shape[1] <= 2
            assert pixels.shape[1] <= 320
    assert_nothing_left(model, trainer.optimizers)


def test_numbers_are_those_of_the_pure_functions(tmp_path):
    """The last ones, with the model as it stands after the run."""
    trainer, model, _ = fit([make(class_indices=[2, 0])], tmp_path)
    images = torch.stack([trainer.val_dataloaders.dataset.images[i] for i in range(8)])
    made = maximize_class(model, [2, 0], data=images, steps=4)
    evidence = class_evidence(ScoreModel(model), made, [2, 0])
    log = read(tmp_path, "slow")
    for number, values in zip(("score", "probability", "augmented"), evidence, strict=True):
        for name, value in zip("20", values.tolist(), strict=True):
            assert log.values(f"interp.class_image_{number}/{name}")[-1] == pytest.approx(value, abs=1e-4)
    assert "interp.class_images/1" not in log.images
    history = Session.of(trainer).history
    assert history.get("class_image_augmented", "2").steps == STEPS


RECIPES = [
    Recipe("sgd"),
    Recipe("two_optimizers", TwoOptimizers),
    Recipe("bf16_mixed", trainer={"precision": "bf16-mixed"}),
    Recipe("no_validation", validate=False),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("method", ["fourier", "simonyan"])
def test_training_is_the_same_bit_for_bit(method, recipe):
    """Dropout, batch normalisation, generators of all kinds, logs of the user's."""
    assert_undisturbed(lambda: [make(method=method, every_n_train_steps=2)], recipe)


def test_resume_goes_on_with_the_strip(tmp_path):
    """Two epochs in a run, or one and one: the same strip and the same images."""
    whole = make()
    fit([whole], tmp_path / "whole")
    first = make()
    trainer, _, _ = fit([first], tmp_path / "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    second = make()
    fit([second], tmp_path / "second", Net(), ckpt_path=tmp_path / "one.ckpt")
    assert second.strip(_ALL).steps == whole.strip(_ALL).steps == STEPS
    assert pickle.loads(pickle.dumps(second.state_dict()))["strips"].keys() == {"classes"}
    old, new = first.strip(_ALL).frames()[1][1], second.strip(_ALL).frames()[1][1]
    assert np.array_equal(old, new)


def test_without_logger_nothing_is_measured(tmp_path):
    """There is nobody to see it."""
    trainer = quiet_trainer(callbacks=[callback := make()])
    assert fit_quietly(trainer, Net(), loader()) == []
    assert callback.strip(_ALL).steps == []


def test_bf16_weights_and_binary_scores_are_fine(tmp_path):
    """In half precision on copies in float32; one score is two classes."""
    _, _, said = fit([make()], tmp_path / "half", trainer_precision(), precision="bf16-true")
    assert said == []

    class Binary(Net):
        def forward(self, x):
            return super().forward(x)[:, :1]

        def loss(self, batch):
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())

    fit([make()], tmp_path / "binary", Binary())
    log = read(tmp_path / "binary", "slow")
    assert {"interp.class_images/0", "interp.class_images/1"} < set(log.images)
    assert "interp.class_images/2" not in log.images


def trainer_precision():
    class Half(Net):
        def loss(self, batch):
            return nn.functional.cross_entropy(self(batch[0].bfloat16()).float(), batch[1])

    return Half()


def test_wrong_arguments_are_refused(tmp_path):
    """At once, or with the first measurement where the model must be known."""
    for wrong in ([], [-1], "12", [1.5], [True]):
        with pytest.raises(ArgumentError, match="class_indices"):
            ClassImages(class_indices=wrong)
    with pytest.raises(ArgumentError, match="method"):
        ClassImages(method="noise")
    with pytest.raises(ArgumentError, match="steps"):
        ClassImages(steps=0)
    with pytest.raises(ArgumentError, match="below 3"):
        fit([make(class_indices=[3])], tmp_path)


def test_rule_reads_what_the_callback_measures(tmp_path):
    """The alert book takes the rule, and the series is the one it needs."""
    from lightning_interp.rules.unlearned_class import UnlearnedClassRule

    trainer, _, _ = fit([make(), Alerts(rules=[UnlearnedClassRule(probability=0.9999)], on_error="raise")], tmp_path)
    history = Session.of(trainer).history
    alerts = list(UnlearnedClassRule(probability=0.9999).check(history, ()))
    assert alerts
    assert set(alerts[0].evidence) <= {f"probability_{index}" for index in range(3)}
    assert summaries(tmp_path)
