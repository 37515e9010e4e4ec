"""The direction of a perturbation is that in which really refitted heads change."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.influence import HeadInfluence, perturbation_direction
from lightning_interp.functional.softmax_head import fit_softmax_head


@pytest.fixture(scope="module")
def digits():
    """Training points and test points."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = torch.tensor(pixels) / 16, torch.tensor(labels)
    return pixels[:150], labels[:150], pixels[1000:1006], labels[1000:1006]


def network():
    """Smooth, fixed and random."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(216, 12), torch.nn.Tanh()
    )  # fmt: skip
    return net.double().requires_grad_(False)


def test_perturbation_is_the_difference_of_refitted_heads(digits):
    """Along the direction itself and a random one, to 1e-4."""
    net, (pixels, labels, test_pixels, test_labels) = network(), digits
    images, labels = pixels[:150].view(-1, 1, 8, 8), labels[:150]
    embeddings, test = net(images), net(test_pixels[:1].view(1, 1, 8, 8))
    influence = HeadInfluence(embeddings, labels)
    found = perturbation_direction(net, images[9], int(labels[9]), influence, test[0], int(test_labels[0]))
    assert found.shape == (1, 8, 8)
    for step in (found / found.norm(), torch.randn(1, 8, 8, dtype=torch.float64)):
        losses = []
        for sign in (1, -1):
            moved = embeddings.clone()
            moved[9] = net((images[9] + sign * 1e-3 * step)[None])[0]
            head = fit_softmax_head(moved, labels, tolerance=1e-12, start=influence.head.weight)
            losses.append(float(head.losses(test, test_labels[:1])))
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float((found * step).sum()), rel=1e-4)


def test_perturbation_leaves_the_network_as_it_is(digits):
    """Nothing is written to `.grad`, and inference mode around it does no harm."""
    net, (pixels, labels, test_pixels, _) = network().requires_grad_(True), digits
    images = pixels[:20].view(-1, 1, 8, 8)
    influence = HeadInfluence(net(images), labels[:20], num_classes=10)
    test = net(test_pixels[:1].view(1, 1, 8, 8))[0]
    plain = perturbation_direction(net, images[0], int(labels[0]), influence, test, 1)
    with torch.inference_mode():
        inside = perturbation_direction(net, images[0] + 0, int(labels[0]), influence, test + 0, 1)
    torch.testing.assert_close(inside.clone(), plain)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(8, 8)}, r"`image` to be a floating tensor \(C, H, W\)"),
        ({"image": None}, r"`image` to be a floating tensor \(C, H, W\), but got 'NoneType'"),
        ({"label": 10}, r"`label` to be a class in \[0, 10\)"),
        ({"test_label": -1}, r"`test_label` to be a class in \[0, 10\)"),
        ({"test_embedding": torch.zeros(3)}, r"`test_embeddings` to be a floating tensor \(points, 64\)"),
        ({"embed": lambda x: x.flatten(1).detach()}, "no gradient reaches them"),
        (
            {"embed": lambda x: torch.ones(1, 64, requires_grad=True) * x.detach().flatten(1)},
            "no gradient reaches them",
        ),
        ({"embed": lambda x: x.flatten(1)[:, :3]}, r"`embed` to be a function to \(1, 64\)"),
    ],
)
def test_wrong_arguments_are_refused(digits, change, message):
    arguments = {
        "embed": lambda x: x.flatten(1), "image": torch.zeros(1, 8, 8), "label": 0,
        "influence": HeadInfluence(digits[0], digits[1]), "test_embedding": torch.zeros(64), "test_label": 0,
    } | change  # fmt: skip
    with pytest.raises(ArgumentError, match=message):
        perturbation_direction(**arguments)
