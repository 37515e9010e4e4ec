"""`OcclusionMaps` in a Trainer: what it logs; that it changes nothing, survives, and says what is wrong."""

import io
import logging
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_interp.callbacks.occlusion_maps import OcclusionMaps
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.faithfulness import concentration
from lightning_interp.functional.occlusion import occlusion_map
from lightning_interp.render.sheets import WIDTH
from tests.callbacks.attribution_kit import Gallery, Lit, Masked, fit, images, loader
from tests.contract.battery import assert_undisturbed, fit_quietly
from tests.contract.conftest import _without_chatter  # noqa: F401 - a fixture for all tests here
from tests.contract.nets import quiet_trainer
from tests.contract.recipes import RECIPES

SOME = [r for r in RECIPES if r.name in {"sgd", "accumulation", "frozen", "bf16_mixed", "attentive", "wrapped"}]
PICTURES = {"interp.occlusion/drop", "interp.occlusion/covered", "interp.occlusion/strip"}


def occlusions(**options):
    """A callback that raises."""
    return OcclusionMaps(on_error="raise", **options)


@pytest.mark.parametrize("recipe", SOME, ids=str)
def test_run_is_left_bit_identical(recipe):
    """The battery of the contract."""
    assert_undisturbed(lambda: [occlusions(every_n_train_steps=2, window=4)], recipe)


def test_tags_and_steps_are_as_stated():
    """Before the first step, after each epoch; each picture fits a card."""
    callback = occlusions(classes=["a", "b", "c"])
    gallery, _, _ = fit([callback])
    steps = [0, 2, 5]
    assert {tag: [step for step, _ in found] for tag, found in gallery.pictures.items()} == dict.fromkeys(
        PICTURES, steps
    )
    for found in gallery.pictures.values():
        for _, picture in found:
            assert picture.shape[1] <= WIDTH
            assert 0.5 <= picture.shape[1] / picture.shape[0] <= 2
    numbers = gallery.of_interp()
    assert {tag: [step for step, _ in rows] for tag, rows in numbers.items()} == {
        "interp/occlusion_concentration": steps
    }
    assert {"occlusion", "occlusion_concentration"} <= set(callback.provides)


def test_numbers_are_those_of_the_functions():
    """A quarter of the shorter side is the window; the first images of the validation set, by the final weights."""
    gallery, model, _ = fit([occlusions(num_samples=5)], max_epochs=1)
    pixels, labels = images(seed=1)
    expected = concentration(occlusion_map(model, pixels[:5], labels[:5], window=2)).nanmean().item()
    assert gallery.of_interp()["interp/occlusion_concentration"][-1][1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("key", ["mask", "box"])
def test_share_inside_the_object_grows_as_the_network_learns(key):
    """The object is a quarter of the image, and a network that has learned loses most there."""
    data = torch.utils.data.DataLoader(Masked(key), batch_size=4)
    gallery, _, _ = fit([occlusions(name="m", target="predicted")], train=data, val=data, max_epochs=8)
    found = [value for _, value in gallery.of_interp()["interp.m/occlusion_inside"]]
    assert found[-1] > 0.4
    assert set(gallery.pictures) == {tag.replace("occlusion", "occlusion.m") for tag in PICTURES}


def test_network_without_feature_maps_has_three_columns():
    """The filter's column is left out."""
    model = Lit()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(80, 3))
    flat, _, _ = fit([occlusions()], model=model, max_epochs=1)
    full, _, _ = fit([occlusions()], max_epochs=1)
    tag = "interp.occlusion/covered"
    assert flat.pictures[tag][0][1].shape != full.pictures[tag][0][1].shape


def test_compiled_run_gives_the_pictures_of_the_eager_one():
    """Bit for bit."""
    eager, _, _ = fit([occlusions()], max_epochs=1)
    compiled, _, _ = fit([occlusions()], model=torch.compile(Lit(), backend="eager"), max_epochs=1)
    assert compiled.of_interp() == eager.of_interp()
    for tag, found in eager.pictures.items():
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, compiled.pictures[tag], strict=True)), tag


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision):
    """Near float32."""
    gallery, _, _ = fit([occlusions()], precision=precision, max_epochs=1)
    plain, _, _ = fit([occlusions()], max_epochs=1)
    tag = "interp/occlusion_concentration"
    assert gallery.of_interp()[tag][0][1] == pytest.approx(plain.of_interp()[tag][0][1], abs=0.02)
    assert set(gallery.pictures) == PICTURES


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Numbers, pictures and the film strip."""
    whole, _, _ = fit([occlusions()], max_epochs=4)
    first, _, trainer = fit([occlusions()], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    second, _, _ = fit([occlusions()], max_epochs=4, ckpt_path=tmp_path / "middle.ckpt")
    for tag, rows in whole.of_interp().items():
        assert first.of_interp()[tag] + second.of_interp()[tag] == rows, tag
    for tag, found in whole.pictures.items():
        both = first.pictures[tag] + second.pictures[tag]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, both, strict=True)), tag


def test_long_measurement_is_announced_once(caplog, capsys, monkeypatch):
    """One line that says how long, and how to make it faster; on the console too where there is a progress bar."""
    from lightning_interp.callbacks import occlusion_maps

    class Slow(Lit):
        def forward(self, x):
            time.sleep(0.0 if self.training else 0.05)
            return super().forward(x)

    monkeypatch.setattr(occlusion_maps, "_PATIENCE", 0.3)
    caplog.set_level(logging.INFO, logger="lightning_interp")
    fit([occlusions(batch_size=16)], model=Slow(), max_epochs=1, enable_progress_bar=True, limit_val_batches=0)
    lines = [record.message for record in caplog.records if record.name == "lightning_interp"]
    assert len(lines) == 1
    assert lines[0].startswith("OcclusionMaps: 252 forwards of single images, about ")
    if tuple(map(int, pl.__version__.split(".")[:2])) >= (2, 6):  # older bars print only while they run
        assert lines[0] in capsys.readouterr().out


def test_long_measurement_has_a_progress_bar_in_a_terminal(monkeypatch):
    """Where Lightning shows none of its own; it is taken away at the end."""
    from rich.console import Console

    from lightning_interp.callbacks import occlusion_maps

    class Slow(Lit):
        def forward(self, x):
            time.sleep(0.0 if self.training else 0.05)
            return super().forward(x)

    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(occlusion_maps, "_PATIENCE", 0.3)
    monkeypatch.setattr(occlusion_maps, "_console", lambda: terminal)
    fit([occlusions(batch_size=16)], model=Slow(), max_epochs=1, enable_progress_bar=False, limit_val_batches=0)
    shown = terminal.file.getvalue()
    assert "OcclusionMaps" in shown
    assert "100%" in shown
    assert shown.endswith("\x1b[2K")  # the line is cleared


def test_short_measurement_is_not_announced(caplog):
    """Nobody waits for it."""
    caplog.set_level(logging.INFO, logger="lightning_interp")
    fit([occlusions()], max_epochs=1)
    assert [record for record in caplog.records if record.name == "lightning_interp"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "argument `window` to be a positive integer, a pair of them"),
        ({"window": (2, 2, 2)}, "argument `window` to be a positive integer, a pair of them"),
        ({"window": 2.5}, "argument `window` to be a positive integer, a pair of them"),
        ({"stride": True}, "argument `stride` to be a positive integer, a pair of them"),
        ({"window": 2, "stride": 3}, "argument `stride` to be at most the window"),
        ({"baseline": float("nan")}, 'argument `baseline` to be "mean" or a number'),
        ({"batch_size": 0}, "argument `batch_size` to be a positive integer"),
        ({"target": "predict"}, "Did you mean 'predicted'"),
    ],
)  # fmt: skip
def test_wrong_option_is_refused(options, message):
    """At once."""
    with pytest.raises(ArgumentError, match=message):
        OcclusionMaps(**options)


def test_window_larger_than_the_images_is_refused_before_the_first_step():
    """Their size is known only then."""
    with pytest.raises(ArgumentError, match=r"argument `window` to be at most the image, \(8, 10\), but got \(9, 9\)"):
        fit([OcclusionMaps(window=9)])


def test_model_without_scores_is_said_once_and_training_goes_on():
    """With the way out."""

    class Reconstructs(Lit):
        def forward(self, x):
            return x * self.net(x).mean()

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

    trainer = quiet_trainer(callbacks=[OcclusionMaps()], logger=Gallery())
    said = fit_quietly(trainer, Reconstructs(), loader(), loader(seed=1))
    assert len(said) == 1
    assert "interp_scores(images)" in said[0]
    assert trainer.global_step == 6


def test_options_come_from_yaml():
    """As LightningCLI reads them."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(OcclusionMaps, "maps")
    callback = parser.instantiate(parser.parse_string("maps: {window: [4, 6], stride: 2, baseline: mean}")).maps
    assert (callback.window, callback.stride, callback.baseline) == ((4, 6), (2, 2), "mean")
