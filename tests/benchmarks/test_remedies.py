"""Remedies: they follow from alerts alone, undo what they are meant for, and leave the keys of other runs alone."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from benchmarks.diagnosis.cells import suite
from benchmarks.diagnosis.data import load
from benchmarks.diagnosis.faults import ONSET, change_batch
from benchmarks.diagnosis.models import convolutions, deep
from benchmarks.diagnosis.remedies import combine, factor, items, remedy_for
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.train import prepare, run, train_plain
from benchmarks.diagnosis.treatment import treat_batch, treat_network, treated, wrong_labels

SPEC = Spec("plain", "digits", "sgd", rate=0.03, epochs=4)


def alert(rule, cause=None, advice="", layer=None, severity="warning", **evidence):
    """An alert as a run writes it."""
    return {
        "rule": rule, "severity": severity, "status": "raised", "layer": layer, "step": 60, "value": 1.0,
        "cause": cause, "message": "", "advice": advice, "evidence": evidence,
    }  # fmt: skip


ADVISED = [
    (alert("learning_rate_too_high", "learning rate", advised_rate_factor=0.1), "rate:0.1"),
    (alert("dead_filters", "learning rate", advised_rate_factor=0.25, dead_fraction=0.5), "rate:0.25"),
    (alert("undertrained", "too few steps", advised_steps_factor=3.0), "steps:3"),
    (alert("undertrained", "too few steps", "Train about 3 times as long (900 steps), if it falls."), "steps:3"),
    (alert("learning_rate_too_low", "learning rate", "Raise the learning rate by about 8 times."), "rate:8"),
    (alert("learning_rate_too_high", "learning rate", "Go back, divide the learning rate by about 3."), "rate:0.3333"),
    (alert("dead_filters", None, "Try a rate 3 times lower, or LeakyReLU.", "net.1"), "rate:0.3333"),
    (alert("bad_start", "initialisation", "Use the default (Kaiming) initialisation."), "init+small_last"),
    (alert("dead_filters", "bias", "Use Kaiming initialisation with zero bias in net.1."), "init"),
    (alert("dormant_units", "initialisation", "Use the default initialisation with zero bias."), "init"),
    (alert("vanishing_gradient", "initialisation"), "init"),
    (alert("vanishing_gradient", "depth or saturating activations"), "normalise"),
    (alert("exploding_gradient", "initialisation", "It grows 2.4 times a layer: divide the weights"), "divide:2.4"),
    (alert("exploding_gradient", None, "Go back", earlier_gradient_norm=0.52), "clip:0.52"),
    (alert("bad_start", "inputs", "Normalise the images: subtract 120 and divide by 60.1."), "inputs:120,60.1"),
    (alert("bad_start", "inputs", "Remove NaN and infinite values from the images."), "finite"),
    (alert("dormant_units", "inputs", "Normalise the images to zero mean."), "inputs"),
    (alert("untrained_layer", "requires_grad=False", layer="net.3", severity="info"), "train:net.3"),
    (alert("untrained_layer", "in no optimizer"), "train"),
    (alert("untrained_layer", "no gradient reaches it", "Look for detach().", "net.3"), None),
    (alert("suspect_labels", "wrong labels", share=0.1), "labels:0.15"),
    (alert("suspect_labels", None), "pairs"),
    (alert("gradient_spike", "bad batch", "Look at the batch of step 150", spike_step=150.0), "skip:150"),
    (alert("gradient_spike", "learning rate", "Divide the learning rate by about 3, or"), "rate:0.3333"),
    (alert("non_finite", None, first_step=150.0), "skip:150"),
    (alert("non_finite", "learning rate", "Divide the learning rate by about 10, or", first_step=9.0), "rate:0.1"),
    (alert("overfitting", "learned by heart", "Stop near step 107, or use", best_step=107.0), "stop:107"),
    (alert("overfitting", "learned by heart", "Use more images; training longer", best_step=107.0), "images"),
    (alert("unlearned_class", None, "Look at the examples of these classes."), None),
    (None, None),
]  # fmt: skip


@pytest.mark.parametrize(("said", "remedy"), ADVISED)
def test_the_remedy_is_what_the_alert_says(said, remedy):
    """The factors of the evidence first, then the first proposal for the cause, then the words."""
    assert remedy_for(said) == remedy


def test_a_number_that_is_none_advises_nothing():
    """Evidence in a record may be None or NaN."""
    for value in (None, math.nan, 0.0):
        assert remedy_for(alert("learning_rate_too_high", "learning rate", advised_rate_factor=value)) is None


def test_wrong_labels_that_were_learned_by_heart_take_the_share_of_the_other_alert():
    """The advice refers to it."""
    words = "Look at the labels first; then stop near step 90 ("
    said = alert("overfitting", "wrong labels learned by heart", words, best_step=90.0)
    assert remedy_for(said, [said, alert("suspect_labels", "wrong labels", share=0.2)]) == "labels:0.3"
    assert remedy_for(said) == "stop:90"


def test_a_second_round_multiplies_factors_and_takes_the_next_proposal_when_the_first_is_done():
    """What is done already is no remedy any more."""
    assert combine("rate:0.1+steps:3", "rate:0.5+init") == "rate:0.05+steps:3+init"
    assert combine("rate:10", "rate:0.1") == "none"
    depth = alert("vanishing_gradient", "depth or saturating activations")
    assert remedy_for(depth, done="normalise") == "normalise+relu"
    assert remedy_for(depth, done="normalise+relu") is None
    assert factor("rate:0.1+init+rate:0.5", "rate") == pytest.approx(0.05)
    assert items("none") == []


def test_remedies_leave_all_keys_as_they_were_but_their_own():
    """The key is one from before there were remedies; cells and twins are those of the run without one."""
    spec = suite()[0]
    assert Spec("plain", "digits", "sgd").key == "0ab966244e8f2012"
    cured = replace(spec, remedy="rate:0.1", fault="init_large")
    assert cured.key != replace(cured, remedy="none").key
    assert cured.cell == spec.cell
    assert cured.twin == spec.key
    assert "rate:0.1" in cured.name
    assert Spec.from_dict({k: v for k, v in asdict(spec).items() if k != "remedy"}) == spec


def test_rate_steps_and_clipping_change_the_plan():
    """A third of an epoch more is a whole one more; a run that is stopped keeps its schedule."""
    plan = treated(replace(SPEC, remedy="rate:0.5+steps:1.3+clip:0.7", schedule="cosine"))
    assert (plan.rate, plan.epochs, plan.clip) == (0.015, 6, 0.7)
    assert treated(replace(SPEC, epochs=9, remedy="steps:3")).epochs == 27
    stopped = prepare(replace(SPEC, schedule="cosine", remedy="stop:73"))
    assert (stopped.epochs, stopped.scheduler.T_max) == (2, 4 * 37)
    assert prepare(replace(SPEC, remedy="stop:3")).epochs == 1


@pytest.mark.parametrize(
    ("fault", "remedy"), [("inputs_raw", "inputs:120,60"), ("few_images", "images"), ("labels_all", "pairs")]
)
def test_data_are_as_they_were_without_the_fault(fault, remedy):
    """The remedy gives back the data of the twin."""
    ill, cured = (prepare(replace(SPEC, fault=fault, remedy=text)).data for text in ("none", remedy))
    clean = load("digits")
    for name in ("images", "targets", "val_images"):
        assert getattr(cured, name).shape == getattr(clean, name).shape
        assert torch.allclose(getattr(cured, name).float(), getattr(clean, name).float(), atol=1e-5)
    same = ill.images.shape == clean.images.shape and torch.equal(ill.images, clean.images)
    assert not (same and torch.equal(ill.targets, clean.targets))


def test_inputs_without_numbers_get_zero_mean_and_unit_deviation():
    """Those of the training set."""
    images = prepare(replace(SPEC, fault="inputs_raw", remedy="inputs")).data.images
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-5)


def test_labels_are_corrected_as_far_as_the_list_names_them(monkeypatch):
    """The first ones of the list of the run without that remedy, and no others."""
    ill = prepare(replace(SPEC, fault="labels_10")).data
    wrong = torch.nonzero(ill.targets != load("digits").targets).flatten().tolist()
    asked = []

    def ranked(spec):
        asked.append(spec.remedy)
        return [*wrong[:50], *range(100), *wrong[50:]]

    monkeypatch.setattr("benchmarks.diagnosis.treatment._suspects", ranked)
    cured = prepare(replace(SPEC, fault="labels_10", remedy="rate:0.5+labels:0.05")).data
    left = set(wrong[50:]) - set(range(10))
    assert wrong_labels(cured, load("digits")) == pytest.approx(len(left) / 1200)
    assert asked == ["rate:0.5"]


@pytest.mark.parametrize("fault", ["frozen_layer", "missing_layer"])
def test_a_layer_is_trained_again(fault):
    """It needs a gradient, and its weights are held once by the optimizer."""
    setting = prepare(replace(SPEC, fault=fault, remedy="train:net.2"))
    held = [id(p) for group in setting.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in setting.net.parameters()})
    assert all(p.requires_grad for p in setting.net.parameters())
    assert len([p for g in prepare(replace(SPEC, fault=fault)).optimizer.param_groups for p in g["params"]]) < len(held)


@pytest.mark.parametrize("fault", ["init_large", "init_small", "init_constant", "dead_bias"])
@pytest.mark.parametrize("architecture", ["plain", "norm", "smooth"])
def test_a_new_initialisation_is_that_of_pytorch(architecture, fault):
    """Weights as large as in the twin, no two filters alike, no bias."""
    spec = replace(SPEC, architecture=architecture)
    cured = prepare(replace(spec, fault=fault, remedy="init")).net
    for ill, healthy in zip(convolutions(cured), convolutions(prepare(spec).net), strict=True):
        assert float(ill.weight.detach().std()) == pytest.approx(float(healthy.weight.detach().std()), rel=0.3)
    biases = [p for name, p in cured.named_parameters() if name.endswith("bias")]
    assert all(not p.any() for p in biases)


def test_the_last_layer_is_made_small_and_weights_are_divided():
    """`small_last` for its bias too; `divide` for weights alone."""
    before, small, divided = (prepare(replace(SPEC, remedy=text)).net for text in ("none", "small_last", "divide:4"))
    assert torch.allclose(small[-1].weight, before[-1].weight / 10)
    assert torch.allclose(small[-1].bias, before[-1].bias / 10)
    assert torch.equal(small[0].weight, before[0].weight)
    assert torch.allclose(divided[0].weight, before[0].weight / 4)
    assert torch.equal(divided[0].bias, before[0].bias)


def test_a_normalisation_is_put_where_none_is():
    """Behind each convolution, but none twice, and not behind the scores."""
    net = deep(1, 10, nn.Sigmoid, depth=3)
    treat_network(net, replace(SPEC, remedy="normalise+relu"))
    kinds = [type(module) for module in net.modules() if not list(module.children())]
    assert kinds[:6] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    for architecture, added in (("norm", 0), ("residual", 0), ("smooth", 0), ("plain", 3), ("squeeze", 7)):
        setting = prepare(replace(SPEC, architecture=architecture, remedy="normalise"))
        before = prepare(replace(SPEC, architecture=architecture))
        norms = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (before.net, setting.net)]
        assert norms[1] - norms[0] == added
        assert setting.net(setting.data.images[:2]).shape == (2, 10)


def test_a_batch_is_left_out_and_the_others_keep_their_step():
    """The one before takes its place; images that hold a NaN can be left out instead."""
    images, targets = torch.rand(4, 1, 8, 8), torch.arange(4)
    broken = change_batch(images, targets, ONSET, "nan_batch")
    before = (torch.zeros(4, 1, 8, 8), targets)
    skip, finite = replace(SPEC, remedy=f"skip:{ONSET}"), replace(SPEC, remedy="finite")
    assert treat_batch(broken, ONSET, skip, before) is before
    assert treat_batch(broken, ONSET + 1, skip, before)[0].isnan().any()
    kept = treat_batch(broken, ONSET, finite, before)
    assert kept[1].tolist() == [1, 2, 3]
    assert torch.equal(kept[0], images[1:])


def test_a_run_with_all_images_gets_augmentation_instead():
    """Each image is moved by at most a pixel, the same way each time."""
    images, targets = torch.zeros(64, 1, 8, 8), torch.arange(64)
    images[:, :, 4, 4] = 1
    spec = replace(SPEC, remedy="images")
    moved = treat_batch((images, targets), 5, spec, None)[0]
    assert torch.equal(moved, treat_batch((images, targets), 5, spec, None)[0])
    assert bool((moved[:, 0, 3:6, 3:6].flatten(1).sum(1) == 1).all())
    assert len(moved.flatten(1).argmax(1).unique()) == 9
    few = replace(spec, fault="few_images")
    assert treat_batch((images, targets), 5, few, None)[0] is images


def test_a_run_that_lost_a_bad_batch_is_finite_and_kept_as_json():
    """From the alert to the cured run, in both ways of training."""
    spec = replace(SPEC, epochs=5, fault="nan_batch")
    cured = replace(spec, remedy=remedy_for(alert("non_finite", None, first_step=float(ONSET))))
    kept = run(cured)
    kept.pop("history")
    json.dumps(kept, allow_nan=False)
    assert kept["finite"]
    assert kept["wrong_labels"] == 0
    assert kept["spec"]["remedy"] == "skip:150"
    assert kept["early"] == [float(f"{loss:.4g}") for loss in train_plain(cured)[:60]]
    assert not all(map(math.isfinite, train_plain(spec)))
