"""Images that maximise a class, and the numbers that judge them."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.class_images import ascend, class_evidence, maximize_class
from lightning_interp.functional.image_prior import FourierPrior
from lightning_interp.functional.jitter import jittered


def small(channels=1, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(6 * 8 * 7, classes),
    )  # fmt: skip


def data(channels=1):
    return torch.randn(16, channels, 8, 7, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.mark.parametrize("method", ["fourier", "simonyan"])
@pytest.mark.parametrize("channels", [1, 3])
def test_score_rises_far_above_that_of_the_data(method, channels):
    """Whatever the method, that is what it maximises."""
    model = small(channels).eval()
    images = maximize_class(model, [0, 2], data=data(channels), steps=60, method=method)
    with torch.no_grad():
        best = model(data(channels)).amax(dim=0)[[0, 2]]
    assert images.shape == (2, channels, 8, 7)
    assert bool((class_evidence(model, images, [0, 2]).score > best).all())


@pytest.mark.parametrize("method", ["fourier", "simonyan"])
def test_same_seed_same_images_and_classes_do_not_influence_one_another(method):
    """So the strip over epochs shows learning, not noise; and nothing of the model or the generators moves."""
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    together = maximize_class(model, [1, 0], data=data(), steps=8, method=method, seed=3)
    again = maximize_class(model, [1, 0], data=data(), steps=8, method=method, seed=3)
    alone = maximize_class(model, [0], data=data(), steps=8, method=method, seed=3)
    assert torch.equal(together, again)
    assert torch.allclose(together[1:], alone, atol=1e-5)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_fourier_images_depend_on_the_seed_and_simonyan_images_do_not():
    """The latter start from the mean image and nothing is drawn."""
    model = small()
    for method, same in (("fourier", False), ("simonyan", True)):
        first, second = (maximize_class(model, [0], data=data(), steps=4, method=method, seed=s) for s in (0, 1))
        assert torch.equal(first, second) == same


def test_fourier_images_stay_within_the_range_of_the_data():
    """Per channel; so they can be shown, and mean what the data mean."""
    batch = data(3) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    images = maximize_class(small(3), [0], data=batch, steps=40)
    assert bool((images.amin(dim=(0, 2, 3)) >= batch.amin(dim=(0, 2, 3)) - 1e-5).all())
    assert bool((images.amax(dim=(0, 2, 3)) <= batch.amax(dim=(0, 2, 3)) + 1e-5).all())


def test_simonyan_of_a_linear_model_follows_its_weights():
    """Closed form: the gradient is the weight row, so every pixel moves the way of its weight's sign."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(56, 2))
    images = maximize_class(model, [1], data=data(), steps=5, method="simonyan")
    moved = (images[0] - data().mean()).flatten()
    assert torch.equal(moved.sign(), model[1].weight[1].detach().sign())


def test_objective_is_the_score_before_the_softmax():
    """Adding the same to all scores, or lowering the other classes, changes nothing."""
    model = small().eval()
    shifted = nn.Sequential(model, Lower())
    assert torch.equal(
        maximize_class(model, [0], data=data(), steps=6), maximize_class(shifted, [0], data=data(), steps=6)
    )


class Lower(nn.Module):
    def forward(self, scores):
        return torch.stack((scores[:, 0], scores[:, 1] - 5, scores[:, 2] * 0), dim=1)


def test_evidence_of_a_model_that_looks_at_one_pixel():
    """Score and probability by hand; moved by a pixel the evidence is gone."""

    class OnePixel(nn.Module):
        def forward(self, images):
            pixel = images[:, 0, 4, 4]
            return torch.stack((pixel, torch.zeros_like(pixel)), dim=1)

    images = torch.zeros(1, 1, 32, 32)
    images[0, 0, 4, 4] = 5.0
    evidence = class_evidence(OnePixel(), images, [0], draws=32)
    assert evidence.score.tolist() == [5.0]
    assert evidence.probability.item() == pytest.approx(1 / (1 + math.exp(-5)))
    assert 0.5 <= evidence.augmented.item() < 0.75
    flat = class_evidence(OnePixel(), torch.full((1, 1, 32, 32), 5.0), [0])
    assert flat.augmented.item() == pytest.approx(flat.probability.item(), abs=1e-5)


def test_jitter_moves_within_its_bounds_and_keeps_plain_images():
    """The centre of mass of a blob moves by at most 7 % of the side, and what turning and scaling add."""
    image = torch.zeros(2, 1, 40, 60)
    image[:, :, 18:22, 28:32] = 1.0
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(50):
        moved = jittered(image, generator)
        assert torch.equal(moved[0], moved[1])
        mass = moved[0, 0] / moved[0, 0].sum()
        found.append((float((mass * rows).sum()) - 19.5, float((mass * columns).sum()) - 29.5))
    down, right = np.abs(np.array(found)).max(axis=0)
    assert 0.7 * 0.07 * 40 < down < 1.3 * 0.07 * 40
    assert 0.7 * 0.07 * 60 < right < 1.3 * 0.07 * 60
    assert torch.allclose(jittered(torch.full((1, 3, 9, 7), 2.0), generator), torch.tensor(2.0))


def test_rotation_does_not_shear_an_image_that_is_not_square():
    """A long thin bar in a wide image stays as long as it was, up to the scale."""
    image = torch.zeros(1, 1, 30, 90)
    image[..., 14:16, 30:60] = 1.0
    rows, columns = torch.meshgrid(torch.arange(30.0), torch.arange(90.0), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        mass = jittered(image, generator)[0, 0]
        mass = mass / mass.sum()
        y, x = rows - (mass * rows).sum(), columns - (mass * columns).sum()
        covariance = torch.tensor(
            [[(mass * y * y).sum(), (mass * x * y).sum()], [(mass * x * y).sum(), (mass * x * x).sum()]]
        )
        thin, long = torch.linalg.eigvalsh(covariance).sqrt().tolist()
        assert 0.85 < long / (30 / math.sqrt(12)) < 1.15
        assert thin < 1.0


def test_prior_knows_spectrum_colours_range_and_mean():
    """White noise through the prior has the data's spectrum; a plain spectrum gives the mean image."""
    waves = torch.randn(400, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(F.pad(waves, (2, 2, 2, 2), mode="circular"), 5, 1)
    batch = torch.stack((smooth[:, 0], 0.5 * smooth[:, 0] + 0.1 * smooth[:, 1]), dim=1) + 3
    prior = FourierPrior(batch, gain=1.0)
    assert torch.allclose(
        prior.images(torch.zeros(1, 2, 16, 9, 2)),
        batch.mean(dim=(0, 2, 3))[:, None, None].expand(1, 2, 16, 16),
        atol=1e-4,
    )
    noise = 0.05 * torch.randn(200, 2, 16, 9, 2, generator=torch.Generator().manual_seed(1))
    made = prior.images(noise)
    ours, theirs = (torch.fft.rfft2(b - b.mean(dim=0)).abs().mean(dim=0)[0, 1:, 1:8].flatten() for b in (made, batch))
    assert torch.corrcoef(torch.stack((ours, theirs)))[0, 1] > 0.95
    assert torch.corrcoef(made.movedim(1, 0).flatten(1))[0, 1] > 0.95


def test_constant_channels_and_one_image_are_no_problem():
    """Nothing is divided by zero."""
    batch = data(3)[:1].clone()
    batch[:, 1] = 4.0
    for method in ("fourier", "simonyan"):
        images = maximize_class(small(3), [0], data=batch, steps=3, method=method)
        assert bool(images.isfinite().all())
        assert torch.allclose(images[:, 1], torch.tensor(4.0))


def test_ascend_takes_any_objective():
    """Here: the mean, which ends at the top of the range."""
    with torch.enable_grad():
        images = ascend(
            lambda made: made.mean(dim=(1, 2, 3)), 2, data=data(), steps=200, method="fourier", seed=0, penalty=0.0
        )
    assert float(images.mean()) > float(data().mean() + 0.5 * data().std())


def test_bad_arguments_are_refused():
    """Each by its name."""
    for classes in ([], [-1], [True], [0.0]):
        with pytest.raises(ArgumentError, match="classes"):
            maximize_class(small(), classes, data=data(), steps=1)
    with pytest.raises(ArgumentError, match="indices of the model's scores"):
        maximize_class(small(), [3], data=data(), steps=1)
    with pytest.raises(ArgumentError, match="data"):
        maximize_class(small(), [0], data=data()[0], steps=1)
    with pytest.raises(ArgumentError, match="Did you mean 'fourier'"):
        maximize_class(small(), [0], data=data(), method="forier")
    with pytest.raises(ArgumentError, match="steps"):
        maximize_class(small(), [0], data=data(), steps=0)
    with pytest.raises(ArgumentError, match="one for each image"):
        class_evidence(small(), data(), [0])


# ---------------------------------------------------------------------- on digits


SIDE = 28


def digits():
    """The digits that scikit-learn ships, enlarged: at 8 pixels a side there is hardly room for noise."""
    from lightning_interp.demo import load_digits

    train, labels = load_digits()[0].tensors
    return F.interpolate(train, size=(SIDE, SIDE), mode="bicubic"), labels


def subject():
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1),
        nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 49, 10),
    )  # fmt: skip


def judge(seed):
    """Two architectures in turn, both unlike the subject."""
    if seed % 2 == 0:
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, stride=2), nn.GELU(), nn.Conv2d(12, 24, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(24, 24, 3), nn.GELU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24 * 16, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 8, 7, stride=3), nn.LeakyReLU(), nn.Conv2d(8, 24, 3), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(24 * 36, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def trained(make, seed, images, labels, epochs=10):
    torch.manual_seed(seed)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[part]), labels[part]).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.slow
def test_class_images_of_digits_convince_networks_that_have_not_made_them():
    """Probability >= 0.99; moved >= 0.95; six other networks: mean >= 0.7, clearly above plain Simonyan's."""
    images, labels = digits()
    net = trained(subject, 0, images, labels)
    judges = [trained(lambda seed=seed: judge(seed), 100 + seed, images, labels) for seed in range(6)]
    found = {}
    for method in ("fourier", "simonyan"):
        made = maximize_class(net, range(10), data=images[:64], method=method)
        evidence = class_evidence(net, made, range(10))
        with torch.no_grad():
            judged = torch.stack([other(made).softmax(dim=1).diagonal() for other in judges])
        found[method] = (evidence, judged)
    evidence, judged = found["fourier"]
    assert float(evidence.probability.min()) >= 0.99
    assert float(evidence.augmented.min()) >= 0.95
    assert float(judged.mean()) >= 0.7
    plain, judged_plain = found["simonyan"]
    assert float(plain.probability.min()) >= 0.99  # by itself a probability tells nothing
    assert 1 - float(judged.mean()) <= 0.5 * (1 - float(judged_plain.mean()))
    assert 1 - float(evidence.augmented.mean()) <= 0.5 * (1 - float(plain.augmented.mean()))


@pytest.mark.parametrize("method", ["fourier", "simonyan"])
def test_pixels_that_no_gradient_reaches_are_refused(method):
    """A frozen backbone under `no_grad`: the image would only drift to the mean, and convince nobody."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

        def forward(self, images):
            with torch.no_grad():
                features = self.backbone(images).mean(dim=(2, 3))
            return self.head(features)

    with pytest.raises(RuntimeError, match="no gradient reaches the pixels"):
        maximize_class(Frozen(), [0], data=data(), steps=3, method=method)
