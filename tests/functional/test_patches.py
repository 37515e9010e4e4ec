"""Rankings of patches against a brute-force sort, and their projections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.patches import PatchRanker, merge_rankings, project_patches, rank_patches
from lightning_interp.functional.receptive_field import receptive_field


def net():
    """Two convolutions and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def sorted_by_hand(activations, k):
    """(value, image, position) of each filter by a plain sort of python."""
    found = []
    for filter_index in range(activations.shape[1]):
        candidates = []
        for image, maps in enumerate(activations[:, filter_index].flatten(1).tolist()):
            best = max(maps)
            candidates.append((-best, image, maps.index(best)))
        found.append(sorted(candidates)[:k])
    return found


@given(
    images=st.integers(1, 12),
    k=st.integers(1, 6),
    levels=st.integers(1, 4),
    split=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_ranking_equals_a_sort_by_hand_with_ties(images, k, levels, split, seed):
    """Few levels make many ties; the lower index and the first position win, however the batches are cut."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randint(0, levels, (images, 3, 2, 4), generator=generator).float()
    ranker = PatchRanker(k)
    for part, indices in zip(activations.split(split), torch.arange(images).split(split), strict=True):
        ranker.update(part, indices)
    expected = sorted_by_hand(activations, k)
    ranking = ranker.ranking
    assert ranking.values.tolist() == [[-value for value, _, _ in row] for row in expected]
    assert ranking.indices.tolist() == [[image for _, image, _ in row] for row in expected]
    assert ranking.positions.tolist() == [[place for _, _, place in row] for row in expected]


@given(k=st.integers(1, 4), ranks=st.integers(1, 4), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_merged_ranks_equal_one_rank(k, ranks, seed):
    """Each image on one rank, some on two (samplers repeat the first ones to fill the last batch)."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randint(0, 3, (11, 2, 3), generator=generator).float()
    whole = PatchRanker(k)
    whole.update(activations, torch.arange(11))
    parts = []
    for rank in range(ranks):
        indices = torch.tensor([(n * ranks + rank) % 11 for n in range(-(-11 // ranks))])
        ranker = PatchRanker(k)
        ranker.update(activations[indices], indices)
        parts.append(ranker.ranking)
    merged = merge_rankings(parts, k=k)
    assert all(torch.equal(a, b) for a, b in zip(merged, whole.ranking, strict=True))


def test_nan_never_ranks_and_bfloat16_does():
    """A NaN would otherwise be the largest of all."""
    ranker = PatchRanker(2)
    ranker.update(
        torch.tensor([[[float("nan"), 1.0]], [[0.5, 2.0]], [[1.0, 0.0]]], dtype=torch.bfloat16), torch.arange(3)
    )
    assert ranker.ranking.indices.tolist() == [[1, 2]]
    assert ranker.ranking.values.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize(("layer", "module"), [("0", 2), ("3", 4), ("2", 2), ("6", 6)])
def test_ranks_the_activation_of_filters_or_the_output_of_a_module(layer, module):
    """`0` means the output of the ReLU behind its normalisation; 7 images in batches of 3."""
    model, images = net().train(), torch.randn(7, 2, 9, 8)
    model.eval()
    with torch.no_grad():
        activations = model[: module + 1](images)
    model.train()
    ranking = rank_patches(model, layer, images.split(3), k=4)
    expected = sorted_by_hand(activations if activations.ndim > 2 else activations[..., None], 4)
    assert ranking.indices.tolist() == [[image for _, image, _ in row] for row in expected]
    assert ranking.positions.tolist() == [[place for _, _, place in row] for row in expected]
    assert model.training


def test_fewer_images_than_k_gives_fewer():
    """Nothing is invented."""
    assert rank_patches(net(), "0", [torch.randn(3, 2, 9, 8)], k=10).values.shape == (6, 3)


def test_bad_arguments_are_refused():
    """No images, no such layer, no k."""
    model = net()
    with pytest.raises(ArgumentError, match="at least one image"):
        rank_patches(model, "0", [], k=1)
    with pytest.raises(ArgumentError, match="layer"):
        rank_patches(model, "conv", [torch.randn(2, 2, 9, 8)], k=1)
    with pytest.raises(ArgumentError, match="`k`"):
        rank_patches(model, "0", [torch.randn(2, 2, 9, 8)], k=0)


def test_projection_stays_within_the_field_and_gives_the_stored_activation_back():
    """Feeding a shown image again gives the value that ranked it."""
    model, images = net().eval(), torch.randn(9, 2, 9, 8)
    for layer in ("0", "3"):
        ranking = rank_patches(model, layer, images.split(4), k=2)
        filters = torch.arange(4)
        gradient, values = project_patches(
            model, images[ranking.indices[:4, 0]], layer, filters, ranking.positions[:4, 0]
        )
        assert torch.allclose(values, ranking.values[:4, 0], atol=1e-6)
        field = receptive_field(model, layer, (2, 9, 8))
        columns = 8 if layer == "0" else 3
        for row in range(4):
            place = int(ranking.positions[row, 0])
            (top, bottom), (left, right) = field.box((place // columns, place % columns))
            outside = gradient[row].clone()
            outside[:, max(top, 0) : bottom, max(left, 0) : right] = 0
            assert not outside.any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_projection_of_a_linear_filter_is_its_kernel():
    """Closed form: one convolution and a ReLU that is open."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    nn.init.constant_(model[0].bias, 100.0)
    gradient, _ = project_patches(model, torch.randn(1, 1, 5, 5), "0", torch.tensor([0]), torch.tensor([4]))
    assert torch.equal(gradient[0, 0, 1:4, 1:4], model[0].weight[0, 0].detach())
    assert gradient.abs().sum().item() == pytest.approx(model[0].weight.abs().sum().item(), rel=1e-6)
