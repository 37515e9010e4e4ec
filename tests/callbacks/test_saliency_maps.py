"""`SaliencyMaps` in a Trainer: what it logs, on what, when; it changes nothing, survives, says what is wrong."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_interp.callbacks import saliency_maps
from lightning_interp.callbacks.class_images import ClassImages
from lightning_interp.callbacks.saliency_maps import SaliencyMaps
from lightning_interp.errors import ArgumentError, InterpWarning
from lightning_interp.functional.faithfulness import concentration, faithfulness
from lightning_interp.functional.saliency import METHODS, saliency_map
from lightning_interp.render.sheets import WIDTH
from tests.callbacks.attribution_kit import Gallery, Lit, Masked, fit, images, loader
from tests.contract.battery import assert_undisturbed, fit_quietly
from tests.contract.conftest import _without_chatter  # noqa: F401 - a fixture for all tests here
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import Stream, pl, quiet_trainer
from tests.contract.recipes import RECIPES

SOME = [r for r in RECIPES if r.name in {"sgd", "accumulation", "frozen", "bf16_mixed", "attentive", "wrapped"}]


def maps(method="gradient", **options):
    """A callback that raises, with short averages."""
    return SaliencyMaps(method=method, on_error="raise", **{"steps": 4, "curve_steps": 2, **options})


# ---------------------------------------------------------------------- it changes nothing


@pytest.mark.parametrize("method", METHODS)
def test_each_method_leaves_the_run_bit_identical(method):
    """The battery of the contract."""
    assert_undisturbed(lambda: [maps(method, every_n_train_steps=2)], SOME[0])


@pytest.mark.parametrize("recipe", SOME, ids=str)
def test_all_methods_leave_the_run_bit_identical(recipe):
    """Ways to train with frozen parts, mixed precision, attention, parametrised weights."""
    assert_undisturbed(lambda: [maps(list(METHODS), every_n_train_steps=3)], recipe)


# ---------------------------------------------------------------------- what is logged, and when


def test_tags_and_steps_are_as_stated():
    """Before the first step, after each epoch; each picture fits a card."""
    callback = maps(["gradient", "integrated_gradients"])
    gallery, _, _ = fit([callback])
    steps = [0, 2, 5]
    expected = {f"interp.saliency/{m}{s}" for m in ("gradient", "integrated_gradients") for s in ("", "_strip")}
    assert {tag: [step for step, _ in found] for tag, found in gallery.pictures.items()} == dict.fromkeys(
        expected, steps
    )
    for tag, found in gallery.pictures.items():
        for _, picture in found:
            assert (picture.dtype, picture.shape[2]) == (np.uint8, 3), tag
            assert picture.shape[1] <= WIDTH
            assert 0.5 <= picture.shape[1] / picture.shape[0] <= 2
    numbers = gallery.of_interp()
    quantities = ("concentration", "deletion", "insertion", "above_chance")
    wanted = {f"interp.saliency_{q}/{m}" for q in quantities for m in callback.method}
    assert set(numbers) == wanted | {"interp.saliency_gap/integrated_gradients"}
    assert {tag: [step for step, _ in rows] for tag, rows in numbers.items()} == dict.fromkeys(numbers, steps)
    groups = {tag.split("/")[0].removeprefix("interp.") for tag in [*numbers, *gallery.pictures]}
    assert groups <= set(callback.provides)


def test_numbers_are_those_of_the_functions():
    """On the first images of the validation set, with their labels, by the final weights."""
    gallery, model, _ = fit([maps(num_samples=5)], max_epochs=1)
    pixels, labels = images(seed=1)
    pixels, labels = pixels[:5], labels[:5]
    expected = saliency_map(model, pixels, labels)
    curves = faithfulness(model, pixels, labels, expected, steps=2)
    found = {tag: rows[-1][1] for tag, rows in gallery.of_interp().items()}
    assert found["interp.saliency_concentration/gradient"] == pytest.approx(
        concentration(expected).mean().item(), rel=1e-5
    )
    assert found["interp.saliency_deletion/gradient"] == pytest.approx(curves.deletion.mean().item(), rel=1e-5)
    assert found["interp.saliency_insertion/gradient"] == pytest.approx(curves.insertion.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "trainer", "steps"),
    [
        ({"every_n_epochs": 2}, {"max_epochs": 4}, [0, 2, 5, 11]),
        ({"every_n_train_steps": 2}, {"max_epochs": 2}, [0, 1, 3, 5]),
        ({"every_n_epochs": 3}, {"max_epochs": 2}, [0, 2, 5]),
        ({}, {"fast_dev_run": True}, []),
        ({}, {"logger": False}, []),
        ({}, {"max_epochs": -1, "max_steps": 4}, [0, 2, 3]),
    ],
)  # fmt: skip
def test_schedule(options, trainer, steps):
    """Epochs, steps, a run that is cut short, no logger."""
    gallery, _, _ = fit([maps(**options)], **trainer)
    assert [step for step, _ in gallery.pictures.get("interp.saliency/gradient", [])] == steps


def test_targets_are_the_labels_or_the_predicted_classes():
    """With labels that are all wrong the two differ; each equals its function."""
    pixels, labels = images(seed=1)
    wrong = (labels + 1) % 3
    found, model = {}, None
    for target in ("label", "predicted"):
        callback = maps(target=target, samples=(pixels[:4], wrong[:4]))
        gallery, model, _ = fit([callback], max_epochs=3)
        found[target] = gallery.of_interp()["interp.saliency_concentration/gradient"][-1][1]
    predicted = model.eval()(pixels[:4]).argmax(1)
    for target, wanted in (("label", wrong[:4]), ("predicted", predicted)):
        expected = concentration(saliency_map(model, pixels[:4], wanted)).mean().item()
        assert found[target] == pytest.approx(expected, rel=1e-5)
    assert found["label"] != found["predicted"]


def test_name_tells_two_instances_apart():
    """In tags and in the checkpoint."""
    callbacks = [maps(), maps("deconvnet", name="b", classes=["x", "y", "z"], mean=[0.0], std=[1.0])]
    gallery, _, _ = fit(callbacks, max_epochs=1)
    assert set(gallery.pictures) == {
        "interp.saliency/gradient", "interp.saliency/gradient_strip",
        "interp.saliency.b/deconvnet", "interp.saliency.b/deconvnet_strip",
    }  # fmt: skip
    assert callbacks[0].state_key != callbacks[1].state_key


@pytest.mark.parametrize("key", ["mask", "box"])
def test_share_inside_the_object_is_logged_where_there_are_masks(key):
    """Dict batches; the object is a quarter of the image, and a network that has learned looks there."""
    data = torch.utils.data.DataLoader(Masked(key), batch_size=4)
    gallery, _, _ = fit([maps("gradient_x_input")], train=data, val=data, max_epochs=6)
    found = [value for _, value in gallery.of_interp()["interp.saliency_inside/gradient_x_input"]]
    assert found[-1] > 0.3
    assert all(0 <= value <= 1 for value in found)


# ---------------------------------------------------------------------- samples


def test_samples_are_the_same_for_the_whole_run():
    """The first cell of the strip shows them; also with an iterable data set, from its first training batch."""
    stream = torch.utils.data.DataLoader(Stream(), batch_size=6)
    model = Lit()
    model.net[-1] = nn.Linear(96, 3)
    gallery, _, _ = fit([maps()], model=model, train=stream, val=stream, max_epochs=2)
    strips = [picture for _, picture in gallery.pictures["interp.saliency/gradient_strip"]]
    assert len(strips) == 3
    first = strips[0][15:81, :78]  # four images of 8 x 8, each enlarged four times, under a line of text
    assert len(np.unique(first)) > 50
    assert all(np.array_equal(strip[15:81, :78], first) for strip in strips)
    assert len({strip.tobytes() for strip in strips}) == 3


def test_samples_of_a_stream_lie_in_the_checkpoint(tmp_path):
    """They can't be read again: after a resume with another stream the old ones go on."""
    stream = torch.utils.data.DataLoader(Stream(), batch_size=6)
    callback, model = maps(), Lit()
    model.net[-1] = nn.Linear(96, 3)
    _, _, trainer = fit([callback], model=model, train=stream, val=stream, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    resumed, other = maps(), torch.utils.data.DataLoader(Stream(18), batch_size=6)
    fit([resumed], model=model, train=other, val=other, max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    first, second = (each.state_dict()["samples"] for each in (callback, resumed))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert resumed.state_dict()["delivered"]


def test_samples_by_index_path_and_tensor_are_the_same(tmp_path):
    """Three ways to name the same images."""
    pixels, labels = images(seed=1)
    torch.save((pixels[[3, 1]], labels[[3, 1]]), tmp_path / "chosen.pt")
    ways = [[3, 1], str(tmp_path / "chosen.pt"), (pixels[[3, 1]], labels[[3, 1]])]
    found = [fit([maps(samples=way)], max_epochs=1)[0].of_interp() for way in ways]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("samples", "message"),
    [([0, 12], r"indices below 12, the size of the data set, but got \[12\]"), ("missing.pt", "FileNotFoundError")],
)
def test_samples_that_do_not_exist_are_refused_before_the_first_step(samples, message):
    """A wrong argument is no reason to rest: it is raised."""
    model = Lit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        fit([SaliencyMaps(samples=samples)], model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------- ways to train


def test_compiled_run_gives_the_pictures_of_the_eager_one():
    """Bit for bit: `trainer.fit(torch.compile(model))`."""
    methods = list(METHODS)
    eager, _, _ = fit([maps(methods)], max_epochs=1)
    compiled, _, _ = fit([maps(methods)], model=torch.compile(Lit(), backend="eager"), max_epochs=1)
    assert compiled.of_interp() == eager.of_interp()
    for tag, found in eager.pictures.items():
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, compiled.pictures[tag], strict=True)), tag


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision):
    """Maps are made in float32 or better: their numbers are finite and near those of float32."""
    gallery, _, _ = fit([maps(list(METHODS))], precision=precision, max_epochs=1)
    plain, _, _ = fit([maps(list(METHODS))], max_epochs=1)
    for tag, rows in plain.of_interp().items():
        if "gap" not in tag and "grad_cam" not in tag:
            assert gallery.of_interp()[tag][0][1] == pytest.approx(rows[0][1], abs=0.05), tag


def test_validate_and_test_loops_are_left_alone():
    """Under inference mode, with the callback there."""
    gallery, model, trainer = fit([maps()], max_epochs=1)
    rows = len(gallery.rows)
    pictures = {tag: len(found) for tag, found in gallery.pictures.items()}
    trainer.validate(model, loader(), verbose=False)
    assert {tag: len(found) for tag, found in gallery.pictures.items()} == pictures
    assert all(not key.startswith("interp") for _, row in gallery.rows[rows:] for key in row)
    assert_nothing_left(model)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Numbers, pictures and film strips, at an epoch boundary; the state is plain data and tensors."""
    whole, _, _ = fit([maps()], max_epochs=4)
    first, _, trainer = fit([maps()], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"]["SaliencyMaps"]
    second, _, _ = fit([maps()], max_epochs=4, ckpt_path=tmp_path / "middle.ckpt")
    for tag, rows in whole.of_interp().items():
        assert first.of_interp()[tag] + second.of_interp()[tag] == rows, tag
    for tag, found in whole.pictures.items():
        both = first.pictures[tag] + second.pictures[tag]
        assert [step for step, _ in both] == [step for step, _ in found]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, both, strict=True)), tag


def test_callback_can_fit_twice():
    """The second run begins anew."""
    callback = maps()
    first, _, _ = fit([callback])
    second, _, _ = fit([callback])
    assert first.of_interp() == second.of_interp()
    tag = "interp.saliency/gradient_strip"
    assert np.array_equal(first.pictures[tag][-1][1], second.pictures[tag][-1][1])


def test_cost_is_as_stated():
    """Images in eval mode, for the measurement before the first step: the scores, the rule, the curves and chance."""
    model, counts = Lit(), []
    model.net.register_forward_hook(lambda module, args, out: counts.append(0 if module.training else len(args[0])))
    quiet_trainer(callbacks=[maps("guided_backprop", curve_steps=3)], logger=Gallery(), max_steps=1).fit(
        model, loader()
    )
    assert sum(counts) == 4 * (1 + 1 + 2 * 3 + 3 * 2 * 3)


# ---------------------------------------------------------------------- models that are hard to read


def test_binary_model_and_dict_output():
    """(N, 1) scores in a dict, float labels."""

    class Binary(Lit):
        def forward(self, x):
            return {"logits": self.net(x)[:, :1]}

        def training_step(self, batch, batch_idx):
            target = (batch[1] > 0).float()
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0])["logits"][:, 0], target)

        def validation_step(self, batch, batch_idx):
            pass

    gallery, _, _ = fit([maps(list(METHODS))], model=Binary(), max_epochs=1)
    assert set(gallery.pictures) == {f"interp.saliency/{m}{s}" for m in METHODS for s in ("", "_strip")}


def test_network_without_convolutions_goes_on_without_grad_cam():
    """Said once; the others go on. Without any activation that is said too."""
    model = Lit()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(80, 3))
    logger = Gallery()
    trainer = quiet_trainer(callbacks=[maps(["grad_cam", "gradient", "deconvnet"])], logger=logger)
    said = fit_quietly(trainer, model, loader(), loader(seed=1))
    assert len(said) == 2
    assert "goes on without grad_cam" in said[0]
    assert "deconvnet saw no activation that it has a rule for in Lit" in said[1]
    assert set(logger.pictures) == {
        f"interp.saliency/{m}{s}" for m in ("gradient", "deconvnet") for s in ("", "_strip")
    }


def test_empty_map_has_a_picture_that_says_so_and_no_number():
    """A head that weighs each filter's positions by +1 and -1: their mean, and Grad-CAM with it, is zero."""
    model = Lit()
    with torch.no_grad():
        model.net[-1].weight[:] = torch.tensor([1.0, -1.0]).repeat(60)
    chosen = maps(["grad_cam", "gradient"], every_n_epochs=100)
    gallery, _, _ = fit([chosen], model=model, max_epochs=1)
    first = {tag: rows[0] for tag, rows in gallery.of_interp().items()}
    assert first["interp.saliency_concentration/gradient"][0] == 0
    assert first["interp.saliency_concentration/grad_cam"][0] > 0  # the one of step 0 is left out
    assert first["interp.saliency_above_chance/grad_cam"][0] > 0
    headings = [gallery.pictures[f"interp.saliency/{method}"][0][1][:13] for method in chosen.method]
    assert [(heading[:, 107:213] > 200).any(axis=(0, 2))[70:].any() for heading in headings] == [True, False]


class Reconstructs(Lit):
    """Returns images."""

    def forward(self, x):
        return x * self.net(x).mean()

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


class TakesDicts(Lit):
    """Its forward can't be called with images."""

    def forward(self, batch):
        return super().forward(batch["image"])

    def training_step(self, batch, batch_idx):
        return super().training_step(({"image": batch[0]}, batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(("model", "what"), [(Reconstructs, "Expected scores of 4 images"), (TakesDicts, "raised")])
def test_model_without_scores_is_said_once_and_training_goes_on(model, what):
    """With the way out."""
    trainer = quiet_trainer(callbacks=[SaliencyMaps()], logger=Gallery())
    said = fit_quietly(trainer, model(), loader(), loader(seed=1))
    assert len(said) == 1
    assert what in said[0]
    assert "interp_scores(images)" in said[0]
    assert trainer.global_step == 6


def test_way_out_works():
    """`interp_scores(images)`."""

    class WithScores(TakesDicts):
        def interp_scores(self, images):
            return self({"image": images})

    gallery, _, _ = fit([maps()], model=WithScores(), max_epochs=1)
    assert "interp.saliency/gradient" in gallery.pictures


def test_data_that_are_no_images_are_said_once():
    """Vectors."""
    model = Lit()
    model.net = nn.Linear(5, 3)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 5), torch.arange(8) % 3))
    said = fit_quietly(quiet_trainer(callbacks=[SaliencyMaps()], logger=Gallery()), model, data)
    assert len(said) == 1
    assert "Expected images (N, C, H, W), but got a tensor of shape (4, 5)" in said[0]


# ---------------------------------------------------------------------- options


def test_options_come_from_yaml():
    """As LightningCLI reads them."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(SaliencyMaps, "maps")
    text = (
        "maps: {method: [gradient, grad_cam], samples: [3, 1], baseline: 0.5, mean: [0.5], classes: [a, b], layer: x}"
    )
    callback = parser.instantiate(parser.parse_string(text)).maps
    assert (callback.method, callback.samples, callback.baseline) == (["gradient", "grad_cam"], [3, 1], 0.5)
    assert parser.instantiate(parser.parse_string("maps: {method: deconvnet}")).maps.baseline == "mean"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "Did you mean 'grad_cam'"),
        ({"method": []}, "argument `method` to be the name of a method or a list"),
        ({"method": ["gradient", 3]}, "argument `method` to be a list of strings"),
        ({"target": "labels"}, "Did you mean 'label'"),
        ({"layer": 3}, "argument `layer` to be the name of a layer or None"),
        ({"baseline": "black"}, 'argument `baseline` to be "mean" or a number'),
        ({"steps": 0}, "argument `steps` to be a positive integer"),
        ({"curve_steps": -1}, "argument `curve_steps` to be an integer of at least 0"),
        ({"batch_size": 0}, "argument `batch_size` to be a positive integer"),
        ({"num_samples": 0}, "argument `num_samples` to be a positive integer"),
        ({"samples": "images.png"}, "argument `samples` to be a list of indices"),
        ({"samples": [-1]}, "argument `samples` to be a list of indices"),
        ({"samples": (torch.zeros(2, 1, 4, 4), torch.zeros(3))}, r"but got \(\(2, 1, 4, 4\), \(3,\)\)"),
        ({"mean": "0.5"}, "argument `mean` to be a list of numbers"),
        ({"std": [None]}, "argument `std` to be a list of positive numbers"),
        ({"mean": [0.5] * 3, "std": [0.2] * 2}, "`std` to be as long as `mean`, 3 numbers, one for each channel"),
        ({"samples": torch.zeros(2, 1, 4, 4)}, r"but got a Tensor of shape \(2, 1, 4, 4\) and type torch.float32\.$"),
        ({"samples": list(range(-1, 99))}, r"but got \[-1, 0, .*\.\.\.\.$"),
        ({"classes": {"a", "b"}}, "argument `classes` to be a list of strings in the order of the labels"),
        ({"classes": "ab"}, "argument `classes` to be a list of strings"),
        ({"every_n_epochs": 1, "every_n_train_steps": 1}, "exclude each other"),
        ({"name": "a/b"}, "argument `name` to be a non-empty string without a slash"),
    ],
)  # fmt: skip
def test_wrong_option_is_refused(options, message):
    """At once."""
    with pytest.raises(ArgumentError, match=message):
        SaliencyMaps(**options)


def test_unknown_layer_is_refused_in_setup():
    """Before anything runs."""
    with pytest.raises(ArgumentError, match=r"No layer matches 'net\.33'.*Did you mean 'net\.3'"):
        fit([SaliencyMaps(method="grad_cam", layer="net.33")])


def test_a_layer_without_feature_maps_costs_grad_cam_alone():
    """The option is at fault, not the model."""
    callback = maps(["gradient", "grad_cam"], layer="net.7")
    with pytest.warns(
        InterpWarning, match=r"goes on without grad_cam\. Expected `layer` to be one whose output is \(N"
    ):
        gallery, _, _ = fit([callback])
    assert {"interp.saliency/gradient", "interp.saliency/gradient_strip"} == gallery.pictures.keys()


def test_sharded_strategy_is_refused_in_setup_by_name():
    """One rank alone can't run a forward there."""

    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ArgumentError, match="SaliencyMaps runs forwards of its own on one rank, which FSDPStrategy"):
        fit([SaliencyMaps()], strategy=FSDPStrategy("cpu"))


class Reentrant(Lit):
    """Checkpointed in the older way, through which autograd gives no gradient of images."""

    def forward(self, x):
        return self.net[5:](checkpoint(self.net[:5], x, use_reentrant=True))


@pytest.mark.parametrize(
    ("callback", "said", "shown"),
    [
        (maps("gradient"), "SaliencyMaps, and whatever needs the same, has nothing to show: ", False),
        (maps(["gradient", "grad_cam"]), "SaliencyMaps goes on with grad_cam alone. ", True),
        (ClassImages(on_error="raise"), "ClassImages, and whatever needs the same, has nothing to show: ", False),
    ],
    ids=["gradient", "grad_cam", "class images"],
)
def test_reentrant_checkpointing_is_said_once_with_what_to_do(callback, said, shown):
    """What needs no gradient of images goes on; the training does in any case."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gallery, _, _ = fit([callback], model=Reentrant())
    (message,) = [str(each.message) for each in caught if each.category is InterpWarning]
    assert message.startswith(said)
    assert "Call torch.utils.checkpoint.checkpoint with `use_reentrant=False`" in message
    assert ("interp.saliency/grad_cam" in gallery.pictures) == shown


def test_a_map_of_zeros_says_so_where_its_name_may_be_cut_off(monkeypatch):
    """First, since small images leave room for some fifteen letters."""
    headings = []
    drawn = saliency_maps.sheet

    def note(panels, names, texts):
        headings.append(names[1])
        return drawn(panels, names, texts)

    monkeypatch.setattr(saliency_maps, "sheet", note)
    model = Lit()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    fit([maps(["gradient", "guided_backprop"])], model=model, max_epochs=1)
    assert headings[:2] == ["zero: gradient", "zero: guided backprop"]
    fit([maps("gradient")], max_epochs=1)
    assert headings[-1] == "gradient"
