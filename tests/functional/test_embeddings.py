"""The embedding is what goes into the last layer, whatever the model does before it."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lightning_interp import ArgumentError
from lightning_interp.functional import embed
from lightning_interp.functional.embeddings import NoEmbeddingError, embedding_tap, find_embedding


class Functional(nn.Module):
    """Functional activations, a head that was made first, and an auxiliary head that is not the last to be called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.conv = nn.Conv2d(1, 6, 3)
        self.auxiliary = nn.Linear(6, 3)

    def features(self, images):
        return F.adaptive_avg_pool2d(F.relu(self.conv(images)), 1).flatten(1)

    def forward(self, images):
        features = self.features(images)
        self.auxiliary(features * 2)
        return self.head(features)


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_embedding_is_what_goes_into_the_last_linear_layer_that_is_called(images):
    """Not the last one that was made."""
    net = Functional()
    assert torch.equal(embed(net, images), net.features(images))
    place = find_embedding(net, images)
    assert (place.layer, place.before, place.gives_scores) == ("head", True, True)


def test_batches_make_no_difference(images):
    """The rows are those of one forward, up to rounding."""
    net = Functional()
    torch.testing.assert_close(embed(net, images, batch_size=2), embed(net, images))


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("resnet18", "fc", 512),
        ("mobilenet_v3_small", "classifier.3", 1024),
        ("efficientnet_b0", "classifier.1", 1280),
        ("convnext_tiny", "classifier.2", 768),
        ("vit_b_16", "heads.head", 768),
        ("vgg11_bn", "classifier.6", 4096),
    ],
)
def test_embedding_of_torchvision_networks_gives_their_scores_through_their_head(name, head, size):
    """Oracle: the head applied to the embedding gives the scores of the network."""
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 16} if name == "vit_b_16" else {}
    net = torchvision.models.VisionTransformer(
        num_layers=1, num_heads=4, hidden_dim=768, mlp_dim=64, num_classes=10, **options
    ) if options else torchvision.models.get_model(name, weights=None, num_classes=10)  # fmt: skip
    net.eval()
    images = torch.rand(2, 3, 32, 32)
    rows = embed(net, images)
    assert rows.shape == (2, size)
    with torch.no_grad():
        torch.testing.assert_close(dict(net.named_modules())[head](rows), net(images), rtol=1e-4, atol=1e-5)


def test_network_without_linear_layers_gives_the_mean_of_what_goes_into_its_last_convolution(images):
    """A head that is a convolution, as in SqueezeNet."""
    body, head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Conv2d(4, 3, 1)
    net = nn.Sequential(body, head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rows = embed(net, images)
    torch.testing.assert_close(rows, body(images).mean(dim=(2, 3)))
    torch.testing.assert_close(head(rows[:, :, None, None]).flatten(1), net(images))


def test_named_layer_gives_its_output_averaged_over_positions(images):
    """A name as in `named_modules()`."""
    net = Functional()
    torch.testing.assert_close(embed(net, images, layer="conv"), net.conv(images).mean(dim=(2, 3)))


def test_tokens_are_averaged_and_the_last_axis_is_the_features():
    """(N, T, D) of a Linear layer, (N, C, L) of a convolution."""
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(64, 7), nn.Flatten(1), nn.Linear(21, 2))
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(embed(tokens, images, layer="1"), tokens[:2](images).mean(dim=1))
    signal = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 3), nn.Flatten(1), nn.Linear(310, 2))
    torch.testing.assert_close(embed(signal, images, layer="1"), signal[:2](images).mean(dim=2))


def test_layer_that_writes_into_the_embedding_afterwards_does_not_change_it(images):
    """An in-place ReLU after the layer."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    rows = embed(net, images, layer="1")
    assert bool((rows < 0).any())
    torch.testing.assert_close(rows, net[:2](images))


def test_half_precision_gives_float32(images):
    """So that what is computed from it does not lose digits."""
    net = Functional().to(torch.bfloat16)
    assert embed(net, images.bfloat16()).dtype == torch.float32


def test_model_is_left_as_it_was(images):
    """Mode, batch statistics and hooks."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rows = embed(net, images)
    assert net.training
    assert all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(rows, embed(net, images))  # no dropout
    assert not rows.requires_grad


def test_tap_keeps_the_graph_where_gradients_are_recorded(images):
    """For the perturbation of an image."""
    net, inputs = Functional(), images.clone().requires_grad_()
    with embedding_tap(net, find_embedding(net, images)) as tap:
        net(inputs)
        tap.rows(5).sum().backward()
    expected = torch.autograd.grad(net.features(inputs).sum(), inputs)[0]
    torch.testing.assert_close(inputs.grad, expected)


def test_rows_that_are_not_one_an_image_are_refused(images):
    """And nothing is kept for the next time."""
    net = Functional()
    with embedding_tap(net, find_embedding(net, images)) as tap:
        net(images)
        with pytest.raises(NoEmbeddingError, match=r"layer 'head' to hold features of 7 images.*\(5, 6\)"):
            tap.rows(7)
        with pytest.raises(NoEmbeddingError):
            tap.rows(5)


def test_model_without_layers_with_weights_is_refused(images):
    """With the way out."""
    with pytest.raises(NoEmbeddingError, match="layer="):
        embed(nn.Flatten(), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "hed"}, "Did you mean 'head'"),
        ({"layer": ""}, "No layer is called ''"),
        ({"batch_size": 0}, "`batch_size` to be a positive integer"),
    ],
)
def test_wrong_arguments_are_refused(images, arguments, message):
    """With what was expected."""
    with pytest.raises(ArgumentError, match=message):
        embed(Functional(), images, **arguments)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(0, 1, 8, 8), torch.zeros(4), torch.zeros(2, 1, 8, 8, dtype=torch.int64), 3]
)
def test_wrong_images_are_refused(wrong):
    """Before the model runs."""
    with pytest.raises(ArgumentError, match="`images` to be a floating tensor"):
        embed(Functional(), wrong)
