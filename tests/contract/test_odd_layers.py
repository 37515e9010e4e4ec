"""Layers and networks off the beaten track: all is measured that can be, and training is what it is without us."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_interp import ClassImages, DeadFilters, FilterGrid, Interp, TopPatches
from lightning_interp.functional import receptive_field
from tests.callbacks.watched import Watched, check
from tests.callbacks.watched import loader as watched_loader
from tests.contract.battery import Recipe
from tests.contract.nets import CLASSES, Capture, Net, loader, quiet_trainer
from tests.contract.odd import LITTLE, MAKERS, survives

# Quantisation has moved to a package of its own, and torch says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is", "ignore:torch.quantize_per_tensor", "ignore:Please use quant_min and quant_max"
)
ONCE = {"max_epochs": 1}
NO_IMAGES = (r"expected images|Expected images \(N, C, H, W\)",)
NO_GRID = ("goes on without grad_cam",)
CAME_LATER = ("came later, or with another shape",)
LATE = ("waits for the first forward of the training: net.0, net.1 have no shape", *CAME_LATER)


def headed(*trunk, width=4, pool=nn.AdaptiveAvgPool2d):
    """Any trunk, then the mean over positions and a linear head."""
    return nn.Sequential(*trunk, pool(1), nn.Flatten(), nn.Linear(width, CLASSES))


def plain(channels=1):
    return headed(nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU())


def of(name, make_net, shape=(1, 8, 8), **options):
    """A recipe with little data."""
    return Recipe(name, lambda: Net(make_net()), trainer=ONCE, data={**LITTLE, "shape": shape}, **options)


def row_by_row():
    return nn.Sequential(
        nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )


def signal():
    return headed(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Conv1d(5, 4, 1), nn.ReLU(), pool=nn.AdaptiveAvgPool1d)


def volume():
    return headed(nn.Conv3d(2, 5, 3), nn.ReLU(), nn.Conv3d(5, 4, 1), nn.ReLU(), pool=nn.AdaptiveAvgPool3d)


def transposed():
    return headed(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.ReLU())


def grouped():
    """Grouped, depthwise and pointwise."""
    wide, deep, thin = nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    return headed(wide, nn.ReLU(), deep, nn.ReLU(), thin, nn.ReLU())


def pointwise():
    return headed(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())


class Gate(nn.Module):
    def forward(self, weight):
        return weight * torch.sigmoid(weight)


def parametrised():
    net = headed(
        parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.ReLU(),
    )
    parametrize.register_parametrization(net[-1], "weight", Gate())
    return net


def hooked_norms():
    """The norms of old, which make the weight in a hook before the forward."""
    return headed(
        nn.utils.weight_norm(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.ReLU()
    )


def pruned():
    net = plain()
    prune.ln_structured(net[0], "weight", amount=0.4, n=2, dim=0)
    return net


class Shared(nn.Module):
    """One module under two names, another that shares its weight, one ReLU for all."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.twin = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.again, self.twin.weight = self.twice, self.twice.weight
        self.act, self.head = nn.ReLU(), nn.Linear(4, CLASSES)

    def forward(self, x):
        for layer in (self.stem, self.twice, self.again, self.twin):
            x = self.act(layer(x))
        return self.head(x.mean((2, 3)))


def faked():
    """Quantisation-aware training: fake quantisation of weights and activations, convolution and ReLU fused."""
    quantization = torch.ao.quantization
    net = headed(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).train()
    quantization.fuse_modules_qat(net, [["0", "1", "2"]], inplace=True)
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(net)


class Unshaped(Net):
    """No layer has a shape before the first forward."""

    def __init__(self):
        super().__init__(headed(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()))


class Integers(nn.Module):
    """A frozen convolution in int8, as a compressed backbone has it; nothing is differentiable through it."""

    def __init__(self):
        super().__init__()
        floating = nn.Conv2d(1, 4, 3)
        weight = torch.quantize_per_tensor(floating.weight.detach(), 0.02, 0, torch.qint8)
        self.conv = torch.ao.nn.quantized.Conv2d(1, 4, 3)
        self.conv.set_weight_bias(weight, floating.bias.detach())
        self.conv.scale, self.conv.zero_point = 0.05, 64

    def forward(self, x):
        return self.conv(torch.quantize_per_tensor(x.detach(), 0.05, 64, torch.quint8)).dequantize()


class QuantisedTwin(Net):
    """Validates a dynamically quantised copy of itself too."""

    def validation_step(self, batch, batch_idx):
        twin = torch.ao.quantization.quantize_dynamic(copy.deepcopy(self.net), {nn.Linear}, dtype=torch.qint8)
        self.log("val/twin", twin(batch[0]).std())
        super().validation_step(batch, batch_idx)


LAYERS = {
    "images of 1 channel": (of("1 channel", plain), ()),
    "images of 2 channels": (of("2 channels", lambda: plain(2), (2, 8, 8)), ()),
    "images of 4 channels": (of("4 channels", lambda: plain(4), (4, 8, 8)), ()),
    "images of 13 channels": (of("13 channels", lambda: plain(13), (13, 8, 8)), ()),
    "Conv1d over rows of images": (of("rows", row_by_row), NO_GRID),
    "Conv1d over signals": (of("signal", signal, (2, 16)), NO_IMAGES),
    "Conv3d over volumes": (of("volume", volume, (2, 6, 6, 6)), NO_IMAGES),
    "transposed": (of("transposed", transposed), ()),
    "grouped, depthwise, pointwise": (of("grouped", grouped, (4, 8, 8)), ()),
    "kernels 1x1 only": (of("pointwise", pointwise, (3, 8, 8)), ()),
    "parametrised weights": (of("parametrised", parametrised), ()),
    "norms by hooks": (of("hooked norms", hooked_norms), ()),
    "pruned": (of("pruned", pruned), ()),
    "shared modules and weights": (of("shared", Shared), ()),
    "fake-quantised": (of("faked", faked), ("TopPatches shows whole images, or no projections",)),
    "lazy until the sanity check": (Recipe("lazy", Unshaped, trainer=ONCE, data=LITTLE), ()),
    "lazy until the first step": (Recipe("lazier", Unshaped, trainer=ONCE, data=LITTLE, validate=False), LATE),
    "quantised in validation": (
        Recipe("quantised twin", lambda: QuantisedTwin(plain()), trainer=ONCE, data=LITTLE),
        (),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("kind", LAYERS)
def test_odd_layers_are_measured_and_trained_as_without_us(kind, make):
    """What can't be drawn is said once; all numbers are there, of each layer with filters."""
    recipe, says = LAYERS[kind]
    rows = survives(recipe, make, says=says)
    per_layer = [tag for tag in rows if tag.startswith("interp.dead_filters/")]
    assert per_layer
    assert {f"{tag.replace('dead_filters', 'dead_fraction')}" for tag in per_layer} <= set(rows)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_int8_convolution_is_left_alone_and_the_layers_behind_it_are_measured(make):
    """What needs the gradient of the pixels rests, and says why."""

    def lenient():
        callbacks = make()
        for callback in callbacks:
            if isinstance(callback, ClassImages):
                callback.on_error = "warn"
        return callbacks

    recipe = of("int8", lambda: headed(Integers(), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    says = (
        "ClassImages failed in on_train_start with RuntimeError: no gradient reaches the pixels",
        "Influence goes on without `interp.influence/perturbation`. .* no gradient reaches them",
        "TopPatches shows whole images, or no projections",
    )
    rows = survives(recipe, lenient, says=says)
    assert [tag for tag in rows if tag.startswith("interp.dead_filters/")] == ["interp.dead_filters/00_net.2"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("validate", [True, False])
def test_lazy_layers_are_shown_from_the_end_of_the_first_epoch_on(validate):
    """No callback gives them a shape before the training does, and none rests because they have none."""
    trainer = {"max_epochs": 2, "num_sanity_val_steps": 0}
    recipe = Recipe(f"lazy, {validate}", Unshaped, trainer=trainer, data=LITTLE, validate=validate)
    rows = survives(recipe, lambda: [Interp("full", on_error="raise")], says=LATE)
    shown = {
        "interp.filter_movement/00_net.0",
        "interp.saliency_concentration/gradient",
        "interp/occlusion_concentration",
        "interp.class_image_score/0",
        "interp/knn_accuracy",
        "interp/influence_agreement",
    }
    assert {tag: [step for step, _ in rows[tag]] for tag in shown} == {tag: [2, 5] for tag in shown}
    assert [step for step, _ in rows["interp.top_patches_turnover/00_net.0"]] == [5]
    assert [value > 0 for _, value in rows["interp.filter_movement/00_net.0"]] == [False, True]


def test_a_module_under_two_names_keeps_its_weights_when_patches_are_drawn():
    """To find what a position can see, the model is called with other weights: all of its own must come back."""
    torch.manual_seed(0)
    net = Shared()
    before = [(id(parameter), parameter.detach().clone()) for parameter in net.parameters()]
    assert receptive_field(net, "twin", (1, 16, 16)).size == (9, 9)
    assert [identity for identity, _ in before] == [id(parameter) for parameter in net.parameters()]
    assert all(torch.equal(kept, now) for (_, kept), now in zip(before, net.parameters(), strict=True))
    assert net.again.bias is net.twice.bias
    assert net.twin.weight is net.twice.weight


# ---------------------------------------------------------------------- surgery


class Surgery(Net):
    """The user operates on the network at the beginning of the second epoch, or in its middle."""

    def __init__(self, cut, *, step=None):
        super().__init__()
        self.cut, self.step = cut, step

    def _operate(self):
        known = set(self.parameters())
        self.cut(self.net)
        new = [parameter for parameter in self.parameters() if parameter not in known]
        if new:
            self.optimizers().add_param_group({"params": new})

    def on_train_epoch_start(self):
        if self.step is None and self.current_epoch == 1:
            self._operate()

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == self.step:
            self._operate()


def widen(net):
    """The first two layers with more filters, the ones behind fed by them."""
    net[0], net[1], net[3] = nn.Conv2d(1, 7, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(7, 6, 3)


def narrow(net):
    net[0], net[1], net[3] = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 6, 3)


def nest(net):
    net[3] = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))


def more_classes(net):
    net[10] = nn.Linear(8, CLASSES + 2)


def longer(net):
    net.add_module("extra", nn.Linear(CLASSES, CLASSES))


def shorter(net):
    net[1], net[3], net[8] = nn.Identity(), nn.Identity(), nn.Linear(64, 8)


CUTS = {
    "more filters": (widen, CAME_LATER),
    "fewer filters": (narrow, CAME_LATER),
    "a layer becomes a block": (nest, CAME_LATER),
    "more classes": (more_classes, ()),
    "a layer behind the head": (longer, ()),
    "a layer less": (shorter, ()),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize(
    ("kind", "step"), [*((kind, None) for kind in CUTS), ("more filters", 4), ("fewer filters", 4)]
)
def test_surgery_is_followed(kind, step, make):
    """No callback holds on to what is gone, or trips over another number of filters or classes."""
    cut, says = CUTS[kind]
    recipe = Recipe(f"{kind} {step}", lambda: Surgery(cut, step=step), data=LITTLE)
    rows = survives(recipe, make, says=says)
    assert max(step for step, _ in rows["interp/dead_filters"]) == 5


class Operated(Watched):
    """Three layers; after so many steps the one in the middle gets other filters, some of them dead."""

    def __init__(self, at, width):
        super().__init__(4)
        self.first, self.second, self.third = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.at, self.width = at, width

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.at:
            self.second, self.third = nn.Conv2d(4, self.width, 1), nn.Conv2d(self.width, 4, 1)
            self.rig()
            self.optimizers().add_param_group({"params": [*self.second.parameters(), *self.third.parameters()]})

    def features(self, x):
        for name in ("first", "second", "third"):
            x = self.note(name, torch.relu(getattr(self, name)(x)))
        return x.mean((2, 3))


@pytest.mark.parametrize("width", [2, 9])
def test_dead_filters_after_surgery_equal_brute_force(width):
    """Also of the layers behind the one that changed: the evidence of all stands in one row of numbers."""
    torch.manual_seed(0)
    _, windows = check(Operated(3, width).rig(), train=watched_loader(9), window_steps=1)
    assert windows[-1][2]["second"]
    callback = DeadFilters(split="train", window_steps=500, on_error="raise")
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2)
    torch.manual_seed(0)
    trainer.fit(Operated(4, width).rig(), watched_loader(9))  # in mid-window: the evidence before it is dropped
    assert set(callback.dead) == {"first", "second", "third"}
    assert max(callback.dead["second"]) < width


def test_filters_that_are_shown_are_those_that_the_model_has_now():
    """After a layer has been replaced, the old one is of no interest."""
    callback = FilterGrid(every_n_train_steps=1, on_error="raise")
    model = Surgery(widen)
    shown = []
    model.on_train_epoch_end = lambda: shown.append(dict(callback._convolutions))
    with pytest.warns(UserWarning, match="came later"):
        quiet_trainer(callbacks=[callback], max_epochs=2, limit_val_batches=0).fit(model, loader(**LITTLE))
    assert shown[-1] == {"net.0": model.net[0], "net.3": model.net[3]}


def test_patches_are_as_large_as_what_the_new_layer_sees():
    """The receptive field is found again when the architecture has changed."""

    def larger(net):
        net[0], net[3] = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 6, 3)

    callback, sizes = TopPatches(on_error="raise"), []
    model = Surgery(larger)
    model.on_validation_epoch_start = lambda: sizes.append(callback._pictures.fields.get("net.0"))
    trainer = quiet_trainer(callbacks=[callback], max_epochs=3, logger=Capture(), num_sanity_val_steps=0)
    trainer.fit(model, loader(**LITTLE), loader(**LITTLE, seed=1, shuffle=False))
    assert [field and field.size for field in sizes] == [None, (3, 3), (5, 5)]
