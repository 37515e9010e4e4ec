"""Numbers about maps: concentration, deletion and insertion curves."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.faithfulness import concentration, faithfulness, importance_ranks, inside
from tests.functional.attribution_nets import Counting, samples, spelled


class FirstPixel(nn.Module):
    """Two classes; the score of the second is ten times the first pixel."""

    def forward(self, x):
        score = 10 * x[:, 0, 0, 0]
        return torch.stack((torch.zeros_like(score), score), dim=1)


def test_concentration_by_hand():
    """The largest of four pixels holds three quarters of what is positive."""
    maps = torch.tensor([[[6.0, 2.0], [0.0, -5.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert torch.equal(concentration(maps, fraction=0.25), torch.tensor([0.75, 0.25]))
    assert torch.equal(concentration(maps, fraction=0.26), torch.tensor([1.0, 0.5]))
    assert concentration(-torch.ones(1, 2, 2)).isnan().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(0.01, 1.0))
def test_concentration_lies_between_the_fraction_and_one(height, width, seed, fraction):
    """And does not depend on scale or on the order of the pixels."""
    maps = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) + 0.01
    found = concentration(maps, fraction=fraction)
    assert (found >= fraction - 1e-6).all()
    assert (found <= 1 + 1e-6).all()
    torch.testing.assert_close(concentration(3 * maps.flip(1, 2), fraction=fraction), found)


def test_share_inside_a_mask_by_hand():
    """Negative values don't count."""
    maps = torch.tensor([[[6.0, 2.0], [-4.0, 0.0]]])
    masks = torch.tensor([[[True, False], [True, False]]])
    assert inside(maps, masks).item() == 0.75
    with pytest.raises(ArgumentError, match="argument `masks` to be a tensor of shape"):
        inside(maps, masks[:, :1])


def test_curves_of_a_model_that_reads_one_pixel():
    """The right map loses all with the first tenth, and wins all with it; the wrong one at the very end."""
    images, targets = torch.zeros(1, 1, 2, 5), torch.tensor([1])
    images[0, 0, 0, 0] = 1.0
    right = torch.arange(10.0).flip(0).reshape(1, 2, 5)
    high, low = torch.sigmoid(torch.tensor([10.0, 0.0])).tolist()
    found = faithfulness(FirstPixel(), images, targets, right, baseline=0.0, steps=10)
    # Eleven points, the outer ones count half.
    assert found.deletion.item() == pytest.approx((high / 2 + 9 * low + low / 2) / 10)
    assert found.insertion.item() == pytest.approx((low / 2 + 9 * high + high / 2) / 10)
    wrong = faithfulness(FirstPixel(), images, targets, -right, baseline=0.0, steps=10)
    assert wrong.deletion.item() == pytest.approx((high / 2 + 9 * high + low / 2) / 10)
    assert wrong.insertion.item() == pytest.approx((low / 2 + 9 * low + high / 2) / 10)


def test_curves_equal_a_naive_loop():
    """One image and one point at a time."""
    model = spelled()
    images, targets = samples(3)
    maps = torch.randn(3, 9, 12)
    steps, pixels = 4, 9 * 12
    found = faithfulness(model, images, targets, maps, steps=steps, baseline=0.5, batch_size=5)
    for n in range(3):
        order = maps[n].flatten().argsort(descending=True)
        curves = {"deletion": [], "insertion": []}
        for step in range(steps + 1):
            first = torch.zeros(pixels, dtype=torch.bool)
            first[order[: step * pixels // steps]] = True
            first = first.reshape(9, 12)
            for name, shown in (("deletion", ~first), ("insertion", first)):
                image = torch.where(shown, images[n], torch.tensor(0.5))
                with torch.no_grad():
                    curves[name].append(model(image[None]).softmax(1)[0, targets[n]].item())
        for name, curve in curves.items():
            area = sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / steps
            assert getattr(found, name)[n].item() == pytest.approx(area, rel=1e-5)


def test_map_that_says_nothing_scores_like_chance():
    """Equal pixels go in random order, which depends on the seed alone: in the mean the pixel comes in the middle."""
    images, targets = torch.zeros(1, 1, 4, 5), torch.tensor([1])
    images[0, 0, 0, 0] = 1.0
    maps = torch.ones(1, 4, 5)
    gains = []
    for seed in range(40):
        found = faithfulness(FirstPixel(), images, targets, maps, baseline=0.0, seed=seed)
        gains.append((found.insertion - found.deletion).item())
    assert len(set(gains)) > 5
    assert abs(sum(gains) / 40) < 0.15
    again = faithfulness(FirstPixel(), images, targets, maps, baseline=0.0, seed=39)
    assert (again.insertion - again.deletion).item() == gains[-1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_ranks_are_a_permutation_in_the_order_of_importance(count, height, width, seed):
    """With many equal values."""
    maps = torch.randint(0, 3, (count, height, width), generator=torch.Generator().manual_seed(seed)).float()
    ranks = importance_ranks(maps, seed=seed)
    flat = ranks.flatten(1)
    assert torch.equal(flat.sort(1).values, torch.arange(height * width).expand(count, -1))
    assert (maps.flatten(1).gather(1, flat.argsort(1)).diff(dim=1) <= 0).all()


def test_cost_is_two_forwards_a_step():
    """No backward; batches are bounded."""
    counting = Counting(spelled())
    images, targets = samples(3)
    faithfulness(counting, images, targets, torch.rand(3, 9, 12), steps=7, batch_size=10)
    assert (counting.forwards, counting.backwards, counting.largest) == (3 * 2 * 7, 0, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(2, 3, 4)}, "argument `maps` to be a tensor of shape"),
        ({"steps": 0}, "argument `steps` to be a positive integer"),
        ({"batch_size": 0}, "argument `batch_size` to be a positive integer"),
    ],
)
def test_wrong_argument_is_refused(change, message):
    """What was expected, and what came."""
    images, targets = samples(2)
    with pytest.raises(ArgumentError, match=message):
        faithfulness(spelled(), images, targets, **{"maps": torch.rand(2, 9, 12), **change})
    with pytest.raises(ArgumentError, match=r"argument `maps` to be a tensor \(N, H, W\)"):
        concentration(torch.zeros(4))
