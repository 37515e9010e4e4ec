"""Saliency maps: closed forms, an independent library, every spelling of an activation, sanity, cost, no traces."""

import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_interp.errors import ArgumentError, InterpWarning
from lightning_interp.functional.gradients import CheckpointedError
from lightning_interp.functional.integrated_gradients import integrated_gradients, smooth_gradients
from lightning_interp.functional.rectifiers import Rectifiers
from lightning_interp.functional.saliency import METHODS, SaliencyOptions, explain, saliency_map, saliency_maps
from lightning_interp.functional.spatial import FeatureMaps, NoFeatureMapsError
from tests.functional.attribution_nets import (
    OTHERS,
    RELUS,
    Counting,
    Residual,
    Separate,
    linear_model,
    samples,
    spelled,
)

RULES = ("guided_backprop", "deconvnet")


def relative(found, expected):
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


# ---------------------------------------------------------------------- closed forms


def test_gradient_of_a_linear_model_is_its_weight_row():
    """Simonyan et al. 2013, equation 3: S(I) = w I + b."""
    model, weight = linear_model()
    targets = torch.tensor([2, 0, 3])
    assert torch.equal(saliency_map(model, torch.randn(3, 1, 2, 3), targets), weight[targets, 0].abs())


def test_gradient_takes_the_largest_channel():
    """A colour image gives one value a pixel."""
    model, weight = linear_model(channels=3)
    found = saliency_map(model, torch.randn(1, 3, 2, 3), torch.tensor([1]))
    assert torch.equal(found[0], weight[1].abs().amax(0))


@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients"])
def test_pixel_times_weight_for_a_linear_model(method):
    """Both give w_i x_i, with a black baseline."""
    model, weight = linear_model()
    images = torch.randn(2, 1, 2, 3)
    targets = torch.tensor([1, 3])
    expected = (images * weight[targets]).abs()[:, 0]
    torch.testing.assert_close(saliency_map(model, images, targets, method=method, baseline=0.0), expected)


def test_smooth_grad_of_a_linear_model_is_its_weight_row():
    """Noise does not change a constant gradient."""
    model, weight = linear_model()
    found = saliency_map(model, torch.randn(1, 1, 2, 3), torch.tensor([2]), method="smooth_grad", draws=7)
    torch.testing.assert_close(found[0], weight[2, 0].abs())


def test_integrated_gradients_of_a_square_has_a_closed_form():
    """The score sum of w x^2, from x' = b, has attributions w (x - b)(x + b)."""

    class Square(nn.Module):
        def forward(self, x):
            return (x.square() * torch.tensor([1.0, -3.0])).flatten(1).sum(1, keepdim=True)

    images = torch.tensor([[[[2.0, 0.5]]]])
    found = integrated_gradients(Square(), images, torch.tensor([0]), baseline=1.0, steps=2)
    torch.testing.assert_close(found.attributions, torch.tensor([[[[3.0, 2.25]]]]))
    assert found.gap.item() < 1e-6


def test_grad_cam_by_hand():
    """One feature map that is the image, and a head that reads its mean: the map is w/(hw) * ReLU(x)."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    model[0].weight.data.fill_(1.0)
    model[3].weight.data.copy_(torch.tensor([[3.0], [-3.0]]))
    image = torch.tensor([[[[1.0, -2.0], [4.0, 0.5]]]])
    up = saliency_map(model, image, torch.tensor([0]), method="grad_cam")
    torch.testing.assert_close(up, 0.75 * image[:, 0].relu())
    down = saliency_map(model, image, torch.tensor([1]), method="grad_cam")
    torch.testing.assert_close(down, 0.75 * (-image[:, 0]).relu())


# ---------------------------------------------------------------------- an independent library


@pytest.fixture
def captum_attr():
    """The library; it warns on every call."""
    attr = pytest.importorskip("captum.attr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield attr


NETS = {
    "plain": lambda: Separate(spelled(nn.ReLU())),
    "resnet": lambda: torchvision.models.resnet18(weights=None, num_classes=5),
}
SIZES = {"plain": (9, 12), "resnet": (48, 64)}


def oracles(attr, net, images, targets):
    """The maps of the methods that have an exact counterpart."""
    return {
        "gradient": attr.Saliency(net).attribute(images.clone(), targets).amax(1),
        "gradient_x_input": attr.InputXGradient(net).attribute(images.clone(), targets).abs().amax(1),
        "guided_backprop": attr.GuidedBackprop(net).attribute(images.clone(), targets).abs().amax(1),
        "deconvnet": attr.Deconvolution(net).attribute(images.clone(), targets).abs().amax(1),
    }


@pytest.mark.parametrize("name", NETS)
def test_maps_equal_captum(captum_attr, name):
    """Where captum is right: on nn.ReLU modules."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    images, targets = samples(2, SIZES[name])
    expected = oracles(captum_attr, net, images, targets)
    found = saliency_maps(net, images, targets, methods=list(expected))
    assert {method: relative(found[method], expected[method]) <= 1e-6 for method in expected} == dict.fromkeys(
        expected, True
    )


@pytest.mark.parametrize(("name", "layer"), [("plain", "relu2"), ("resnet", "layer4"), ("resnet", "layer2.0.conv1")])
def test_grad_cam_equals_captum(captum_attr, name, layer):
    """Named layers, among them one that an in-place ReLU follows; and the one that is found by itself."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    images, targets = samples(2, SIZES[name])
    cam = captum_attr.LayerGradCam(net, net.get_submodule(layer))
    expected = cam.attribute(images.clone(), targets, relu_attributions=True)
    expected = F.interpolate(expected, size=SIZES[name], mode="bilinear")[:, 0]
    found = {"named": saliency_map(net, images, targets, method="grad_cam", layer=layer)}
    if layer in {"relu2", "layer4"}:
        found["by itself"] = saliency_map(net, images, targets, method="grad_cam")
    assert expected.max() > 0
    assert {key: relative(value, expected) <= 1e-6 for key, value in found.items()} == dict.fromkeys(found, True)


def test_integrated_gradients_equal_captum(captum_attr):
    """Signed, with the same nodes."""
    net = Separate(spelled(nn.ReLU())).eval()
    images, targets = samples(3)
    oracle = captum_attr.IntegratedGradients(net)
    expected = oracle.attribute(images.clone(), torch.zeros_like(images), targets, n_steps=20, method="gausslegendre")
    found = integrated_gradients(net, images, targets, baseline=0.0, steps=20)
    assert relative(found.attributions, expected) <= 1e-6


# ---------------------------------------------------------------------- every spelling of an activation


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("spelling", RELUS)
def test_every_spelling_of_relu_gives_the_same_map(method, spelling):
    """The same weights; the plain gradient is far away."""
    images, targets = samples()
    expected = saliency_map(spelled(nn.ReLU()), images, targets, method=method)
    found = saliency_map(spelled(RELUS[spelling]), images, targets, method=method)
    assert relative(found, expected) <= 1e-6
    assert relative(saliency_map(spelled(RELUS[spelling]), images, targets), expected) > 0.1


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("spelling", OTHERS)
def test_other_activations_follow_the_rule(method, spelling):
    """Against the rule written out by hand, layer by layer."""
    images, targets = samples(2)
    model = spelled(OTHERS[spelling])
    found = saliency_map(model, images, targets, method=method)
    assert relative(found, by_hand(model, images, targets, method)) <= 1e-5
    assert relative(found, saliency_map(model, images, targets)) > 0.01


def by_hand(model, images, targets, method):
    """The rules for `Spelled`, with the layers' own backward but no machinery for activations."""

    def behind(layer, x):
        x = x.detach().requires_grad_()
        return x, layer(x)

    x0 = images
    a0, z1 = behind(model.first, x0)
    a1, z2 = behind(model.second, model.activate(z1.detach().clone()))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), model.hidden)
    a2, z3 = behind(pooled, model.activate(z2.detach().clone()))
    a3, scores = behind(model.head, model.activate(z3.detach().clone()))
    (gradient,) = torch.autograd.grad(scores.gather(1, targets[:, None]).sum(), a3)
    for z, (leaf, out) in ((z3, (a2, z3)), (z2, (a1, z2)), (z1, (a0, z1))):
        gradient = gradient.clamp(min=0)
        if method == "guided_backprop":
            point = z.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model.activate(point.clone()), point, gradient)
        (gradient,) = torch.autograd.grad(out, leaf, gradient)
    return gradient.abs().amax(1)


@pytest.mark.parametrize("method", RULES)
def test_rule_does_not_touch_a_shortcut_around_the_activation(method):
    """Central differences of the network with the rule's own linear pieces: f'(x) there is 0 or 1."""
    model = Residual().eval()
    images, targets = samples(2)
    with torch.no_grad():
        x = model.norm(model.first(images))
        y = model.second(x.relu()) + x
    size = y.shape[2] * y.shape[3]
    gradient = (model.head.weight[targets][:, :, None, None] / size).expand_as(y).clamp(min=0)
    gradient = gradient * (y > 0) if method == "guided_backprop" else gradient
    inner = F.conv_transpose2d(gradient, model.second.weight, padding=1).clamp(min=0)
    gradient = gradient + (inner * (x > 0) if method == "guided_backprop" else inner)
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    gradient = F.conv_transpose2d(gradient * factor[:, None, None], model.first.weight, padding=1)
    assert relative(saliency_map(model, images, targets, method=method), gradient.abs().amax(1)) <= 1e-5


COUNTS = {"resnet18": 17, "densenet121": 121, "googlenet": 57, "mobilenet_v3_small": None}


@pytest.mark.parametrize("name", COUNTS)
def test_activations_of_real_networks_are_all_seen(name):
    """Modules, in-place and functional; gates (hard sigmoid) are none."""
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **options).eval()
    expected = COUNTS[name] or sum(isinstance(module, nn.ReLU | nn.Hardswish) for module in model.modules())
    listener = Rectifiers("guided_backprop")
    with torch.no_grad(), listener:
        model(torch.zeros(1, 3, 64, 64))
    assert listener.count == expected


@pytest.mark.parametrize("method", RULES)
def test_model_without_activations_is_warned_of(method):
    """The map is the plain gradient's, and says so."""
    model, _ = linear_model()
    images, targets = torch.randn(2, 1, 2, 3), torch.tensor([0, 1])
    with pytest.warns(InterpWarning, match=f"{method} saw no activation .* in Sequential"):
        found = saliency_map(model, images, targets, method=method)
    assert torch.equal(found, saliency_map(model, images, targets))


class Repeated(nn.Module):
    """A model whose forward is repeated in the backward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("spelling", [*RELUS, *OTHERS])
@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_changes_no_map(method, spelling):
    """The repetition saves what the forward has saved, though only one of them follows the rule."""
    images, targets = samples(2)
    model, options = spelled((RELUS | OTHERS)[spelling]), {"method": method, "draws": 4, "steps": 4}
    expected = saliency_map(model, images, targets, **options)
    assert relative(saliency_map(Repeated(model), images, targets, **options), expected) <= 1e-6


class Reentrant(Repeated):
    """The older way, in which autograd is called within autograd."""

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=True)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "grad_cam"])
def test_reentrant_checkpointing_is_refused_with_a_way_out(method):
    """Torch says it, in words about `.grad()` and `.backward()`."""
    images, targets = samples(2)
    with pytest.raises(
        CheckpointedError, match=r"but it has activation checkpointing with `use_reentrant=True`\. Call"
    ):
        saliency_map(Reentrant(spelled(nn.ReLU())), images, targets, method=method, draws=4, steps=4)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_model_gives_the_map_of_the_eager_one(method):
    """Bit for bit, although it has been compiled and called before."""
    model = spelled(nn.ReLU())
    images, targets = samples(2)
    expected = saliency_map(model, images, targets, method=method, draws=4, steps=4)
    compiled = torch.compile(model, backend="eager")
    compiled(images)
    assert torch.equal(saliency_map(compiled, images, targets, method=method, draws=4, steps=4), expected)


# ---------------------------------------------------------------------- feature maps


FOUND = {"resnet18": 512, "vgg11": 512, "densenet121": 1024, "mobilenet_v2": 1280, "efficientnet_b0": 1280}


def small_vgg():
    """Without the hidden layers of its head, whose weights take seconds to draw."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(512 * 49, 5))


@pytest.mark.parametrize("name", FOUND)
def test_last_feature_maps_are_found(name):
    """After the last activation, before the last pooling."""
    model = getattr(torchvision.models, name)(weights=None).eval() if name != "vgg11" else small_vgg().eval()
    with torch.no_grad(), FeatureMaps(model) as listener:
        model(torch.randn(1, 3, 64, 64))
    side = 4 if name == "vgg11" else 2
    assert listener.maps.shape == (1, FOUND[name], side, side)
    if name != "efficientnet_b0":
        assert listener.maps.min() >= 0


def test_grad_cam_without_feature_maps_says_so():
    """A linear model has none."""
    model, _ = linear_model()
    with pytest.raises(NoFeatureMapsError, match="no convolution of the model makes any"):
        saliency_map(model, torch.zeros(1, 1, 2, 3), torch.tensor([0]), method="grad_cam")


def test_grad_cam_layer_without_positions_says_so():
    """A linear layer."""
    images, targets = samples(1)
    with pytest.raises(ValueError, match=r"output is \(N, K, h, w\), but its output is \(1, 12\)"):
        saliency_map(spelled(), images, targets, method="grad_cam", layer="hidden")


# ---------------------------------------------------------------------- averages


def test_smooth_grad_is_the_mean_over_its_own_noise():
    """A loop over the draws; the same numbers each time, for each image, however they are batched."""
    model = spelled()
    images, targets = samples(3)
    found = smooth_gradients(model, images, targets, draws=5, noise=0.2, seed=3)
    expected = torch.zeros_like(images)
    for draw in range(5):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + draw)
        cloud = torch.randn(3, 9, 12, generator=generator)
        for index in range(3):
            sigma = 0.2 * (images[index].max() - images[index].min())
            leaf = (images[index : index + 1] + sigma * cloud).requires_grad_()
            (gradient,) = torch.autograd.grad(model(leaf)[0, targets[index]], leaf)
            expected[index] += gradient[0] / 5
    assert relative(found, expected) <= 1e-5
    assert torch.equal(found, smooth_gradients(model, images, targets, draws=5, noise=0.2, seed=3))


@pytest.mark.parametrize("method", METHODS)
def test_small_batches_give_the_same_map_and_bound_the_memory(method):
    """No forward sees more images than allowed."""
    images, targets = samples(5)
    options = {"draws": 5, "steps": 5}
    expected = saliency_map(spelled(), images, targets, method=method, **options)
    counting = Counting(spelled())
    found = saliency_map(counting, images, targets, method=method, batch_size=3, **options)
    assert counting.largest <= 3
    assert relative(found, expected) <= 1e-5


def test_completeness_gap_falls_with_the_steps():
    """At most 5 % at 50 steps and 1 % at 200, on a network with batch normalisation and shortcuts."""
    torch.manual_seed(1)
    model = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    images, _ = samples(2, (24, 32))
    with torch.no_grad():  # the class that rises most: a rise of about nothing makes any gap large
        targets = (model(images) - model(images.mean((0, 2, 3), keepdim=True).expand_as(images))).argmax(1)
    gaps = [integrated_gradients(model, images, targets, steps=steps).gap.max().item() for steps in (1, 50, 200)]
    assert gaps[0] > 0.05
    assert gaps[1] <= 0.05
    assert gaps[2] <= 0.01


# ---------------------------------------------------------------------- sanity (Adebayo et al. 2018)


def rank_correlation(a, b):
    """Spearman's, over all pixels of all images."""
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def edges(images):
    """A map that ignores the weights: what the sanity check must catch."""
    padded = F.pad(images.mean(1), (1, 0, 1, 0), mode="replicate")
    return (padded[:, 1:, 1:] - padded[:, :-1, 1:]).abs() + (padded[:, 1:, 1:] - padded[:, 1:, :-1]).abs()


def mean_correlation(make_map):
    """Between maps of networks that differ in their weights alone."""
    images, targets = samples(6, (16, 16))
    maps = [make_map(spelled(seed=seed), images, targets) for seed in range(6)]
    pairs = [(i, j) for i in range(6) for j in range(i)]
    return sum(rank_correlation(maps[i], maps[j]) for i, j in pairs) / len(pairs)


def test_gradient_depends_on_the_weights():
    """Random weights instead of other random weights change the order of the pixels."""
    assert mean_correlation(lambda model, images, targets: saliency_map(model, images, targets)) < 0.2


def test_sanity_check_catches_a_map_that_ignores_the_weights():
    """The negative control."""
    assert mean_correlation(lambda model, images, targets: edges(images)) > 0.99


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("methods", "forwards", "backwards"),
    [
        (["gradient"], 1, 1),
        (["gradient_x_input"], 1, 1),
        (["grad_cam"], 1, 0),  # its backward ends at the feature maps
        (["gradient", "gradient_x_input", "grad_cam"], 1, 1),
        (["guided_backprop"], 1, 1),
        (["deconvnet"], 1, 1),
        (["smooth_grad"], 7, 7),
        (["integrated_gradients"], 5 + 2, 5),
        (list(METHODS), 1 + 2 + 7 + 7, 1 + 2 + 7 + 5),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_cost_is_as_stated(methods, forwards, backwards):
    """Images that go forward and gradients that come back, for each image."""
    counting = Counting(spelled())
    images, targets = samples(3)
    saliency_maps(counting, images, targets, methods=methods, draws=7, steps=5)
    assert (counting.forwards, counting.backwards) == (3 * forwards, 3 * backwards)


def test_list_gives_the_same_maps_as_one_at_a_time():
    """What is shared is exact."""
    images, targets = samples()
    together = saliency_maps(spelled(), images, targets, methods=METHODS, draws=4, steps=4)
    assert list(together) == list(METHODS)
    for method, found in together.items():
        assert torch.equal(found, saliency_map(spelled(), images, targets, method=method, draws=4, steps=4))


def test_targets_may_be_chosen_by_the_scores():
    """With the scores of their own part of the images, in small batches too."""
    images, _ = samples(5)
    model = spelled()
    predicted = model(images).argmax(1)
    for size in (2, 64):
        found = explain(
            model, images, lambda scores, part: scores.argmax(1), ["guided_backprop"], SaliencyOptions(batch_size=size)
        )
        assert torch.equal(found.targets, predicted)
        expected = saliency_map(model, images, predicted, method="guided_backprop")
        assert relative(found.maps["guided_backprop"], expected) <= 1e-6


# ---------------------------------------------------------------------- nothing is changed


class Rude(nn.Module):
    """Writes over its input and its buffer, draws numbers, drops out."""

    def __init__(self):
        super().__init__()
        self.net = spelled(nn.ReLU(inplace=True)).train()
        self.register_buffer("calls", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        torch.rand(1)
        return self.net(self.drop(x.mul_(0.5)))


@pytest.mark.parametrize("method", METHODS)
def test_model_and_images_are_left_as_they_were(method):
    """Buffers, modes, gradients, flags, generators, hooks, the images themselves."""
    model = Rude()
    model.net.first.eval()
    model.net.first.weight.requires_grad_(False)
    model.net.head.weight.grad = torch.ones_like(model.net.head.weight)
    images, targets = samples(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator, copy = torch.get_rng_state(), images.clone()
    found = saliency_map(model, images, targets, method=method, draws=3, steps=3)
    assert torch.equal(images, copy)
    assert not images.requires_grad
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["net.head.weight"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["net.first.weight"]
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert (torch._C._len_torch_function_stack(), torch.is_grad_enabled()) == (0, True)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_after_an_exception(method):
    """A model that raises on its second call or, if there is only one, on its first."""

    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = spelled()

        def forward(self, x):
            self.net(x)
            raise RuntimeError("odd")

    model = Raises()
    images, targets = samples(2)
    options = {"layer": "net.second"} if method == "grad_cam" else {}
    with pytest.raises(RuntimeError, match="odd"):
        saliency_map(model, images, targets, method=method, **options)
    assert not any(module._forward_hooks for module in model.modules())
    assert (torch._C._len_torch_function_stack(), images.requires_grad, model.training) == (0, False, True)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_is_no_obstacle(method):
    """Images and labels made under it, as in `trainer.validate()`."""
    model = spelled()
    images, targets = samples(2)
    expected = saliency_map(model, images, targets, method=method, draws=3, steps=3)
    with torch.inference_mode():
        found = saliency_map(model, images.clone(), targets.clone(), method=method, draws=3, steps=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_maps_have_the_shape_and_type_of_the_images(method):
    """Non-square, one channel of batch, float64."""
    images, targets = samples(1, (7, 5))
    found = saliency_map(spelled().double(), images.double(), targets, method=method, draws=2, steps=2)
    assert (found.shape, found.dtype) == ((1, 7, 5), torch.float64)
    assert found.min() >= 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.sampled_from(METHODS), st.integers(0, 100))
def test_one_image_has_the_same_map_alone_and_in_company(count, height, width, method, seed):
    """In eval mode images don't see each other."""
    images, targets = samples(count, (height, width), seed=seed)
    options = {"draws": 2, "steps": 2, "baseline": 0.0}
    together = saliency_map(spelled(), images, targets, method=method, **options)
    alone = saliency_map(spelled(), images[-1:], targets[-1:], method=method, **options)
    torch.testing.assert_close(together[-1:], alone, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 9, 12)}, "argument `images` to be a floating tensor"),
        ({"images": torch.zeros(2, 3, 9, 12, dtype=torch.int64)}, "argument `images` to be a floating tensor"),
        ({"targets": torch.zeros(2)}, "argument `targets` to be a tensor of 2 class indices"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "argument `targets` to be a tensor of 2 class indices"),
        ({"targets": torch.tensor([0, 5])}, r"argument `targets` to be class indices in \[0, 5\)"),
        ({"targets": torch.tensor([0, -1])}, r"argument `targets` to be class indices in \[0, 5\)"),
        ({"method": "gradients"}, "Did you mean 'gradient'"),
        ({"method": "grad_cam", "layer": "secnd"}, "Did you mean 'second'"),
        ({"method": "integrated_gradients", "baseline": "black"}, 'argument `baseline` to be "mean"'),
        ({"method": "integrated_gradients", "baseline": torch.zeros(7)}, "broadcasts to"),
        ({"steps": 0}, "argument `steps` to be a positive integer"),
        ({"draws": 0}, "argument `draws` to be a positive integer"),
        ({"noise": -1.0}, "argument `noise` to be a number"),
        ({"batch_size": 0}, "argument `batch_size` to be a positive integer"),
    ],
)  # fmt: skip
def test_wrong_argument_is_refused(change, message):
    """What was expected, and what came."""
    images, targets = samples(2)
    arguments = {"images": images, "targets": targets, **change}
    with pytest.raises(ArgumentError, match=message):
        saliency_map(spelled(), **arguments)


def test_model_without_scores_is_refused():
    """One value an image is not (N, classes)."""
    images, targets = samples(2)
    with pytest.raises(ValueError, match=r"to be \(N, classes\) with N = 2, but got shape \(2,\)"):
        saliency_map(nn.Sequential(nn.Flatten(), nn.Linear(324, 1), nn.Flatten(0)), images, targets)
