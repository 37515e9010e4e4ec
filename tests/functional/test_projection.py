"""Maps of embeddings on which points keep their place."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.projection import displacement, project_pca, project_tsne, project_umap
from lightning_interp.functional.projection_common import filled_in, nearest_orthonormal

UMAP = importlib.util.find_spec("umap") is not None
METHODS = [project_pca, project_tsne, *([project_umap] if UMAP else [])]
UNALIGNED = [project_pca, project_tsne]


def points(count=60, features=8, seed=0):
    """Random, with components of unlike variance."""
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(3.0, 1.0, features, dtype=torch.float64)


def turned(coordinates, angle, mirror=1.0):
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return coordinates @ turn * torch.tensor([1.0, mirror], dtype=torch.float64)


def spread(coordinates):
    centred = coordinates - coordinates.mean(dim=0)
    return float(centred.square().sum(dim=1).mean().sqrt())


@pytest.mark.parametrize(("count", "features"), [(60, 8), (12, 40), (3, 2), (2, 9)])
def test_pca_equals_that_of_scikit_learn_but_for_sign_and_scale(count, features):
    """More features than points too."""
    x = points(count, features)
    found = project_pca(x)
    oracle = PCA(2, svd_solver="full").fit(x.numpy())
    expected = torch.tensor(oracle.transform(x.numpy()))
    expected = expected / spread(expected)
    assert found.coordinates.abs().numpy() == pytest.approx(expected.abs().numpy(), abs=1e-8)
    assert found.explained == pytest.approx(oracle.explained_variance_ratio_, abs=1e-12)
    assert found.kl_divergence is None


def test_pca_of_an_ellipse_has_its_half_axes():
    """Closed form: along a and b cos and sin have equal variance."""
    angle = torch.linspace(0, 2 * math.pi, 101, dtype=torch.float64)[:-1]
    flat = torch.stack([3 * angle.cos(), angle.sin()], dim=1)
    frame, _ = torch.linalg.qr(points(5, 5)[:, :5])
    found = project_pca(flat @ frame[:2] + 100.0)
    assert found.explained == pytest.approx((0.9, 0.1))
    extent = found.coordinates.abs().amax(dim=0)
    assert float(extent[0] / extent[1]) == pytest.approx(3.0)


@given(angle=st.floats(0, 6.28), mirror=st.sampled_from([-1.0, 1.0]), scale=st.sampled_from([0.01, 1.0, 40.0]))
@settings(max_examples=30, deadline=None)
def test_pca_takes_the_place_of_the_last_map_however_that_was_turned_mirrored_or_scaled(angle, mirror, scale):
    """The same points again: they stand where they stood."""
    x = points()
    before = turned(project_pca(x).coordinates, angle, mirror)
    found = project_pca(x, previous=scale * before + 7.0)
    assert displacement(found.coordinates, before) < 1e-6


def test_pca_keeps_the_points_in_place_when_two_components_swap():
    """Where turning the best plane within itself could not: the second and third change rank."""
    x = points(400, 6)
    x = x - x.mean(dim=0)
    scale = torch.tensor([3.0, 1.5, 1.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    swapped = torch.tensor([3.0, 1.4, 1.5, 0.3, 0.2, 0.1], dtype=torch.float64)
    base, _ = torch.linalg.qr(x)
    before = project_pca(base * scale).coordinates
    assert displacement(project_pca(base * swapped).coordinates, before) > 0.2
    found = project_pca(base * swapped, previous=before)
    assert displacement(found.coordinates, before) < 0.05
    assert sum(found.explained) > 0.85 * sum(project_pca(base * swapped).explained)


@given(seed=st.integers(0, 200), count=st.integers(2, 30), features=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_pca_never_shows_much_less_than_the_best_plane(seed, count, features):
    """Whatever the last map was."""
    x = points(count, features, seed)
    before = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    best, found = project_pca(x), project_pca(x, previous=before)
    assert 0.85 * sum(best.explained) - 1e-9 <= sum(found.explained) <= sum(best.explained) + 1e-9
    assert spread(found.coordinates) == pytest.approx(1.0)


def test_pca_sign_noise_and_new_order_of_points_leave_every_point_in_its_place():
    """Components of either sign, rows in another order, a little noise."""
    x = points(200)
    before = project_pca(x).coordinates
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    noise = 0.02 * points(200, 8, 1)
    found = project_pca((-(x + noise))[order], previous=before[order])
    assert displacement(found.coordinates, before[order]) < 0.03


@pytest.mark.parametrize("seed", range(20))
def test_pca_half_dead_features_in_float32_never_fail(seed):
    """Repeated zero eigenvalues are what float32 solvers give up on."""
    x = points(120, 64, seed).float()
    x[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:32]] = 0
    found, alive = project_pca(x), project_pca(x[:, x.any(dim=0)])
    assert torch.equal(found.coordinates, alive.coordinates)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, 2, 5, 31])
@pytest.mark.parametrize("kind", ["normal", "zero", "constant", "line", "copies", "broken row", "all broken", "huge"])
def test_every_input_has_a_map(method, count, kind):
    """Tiny sets, no variance, dead and broken features: no exception and no warning."""
    x = points(count, 8).float()
    if kind in ("zero", "constant"):
        x = torch.full_like(x, 0.1 if kind == "constant" else 0.0)
    if kind == "line":
        x = x[:, :1] * torch.ones(8)
    if kind == "copies":
        x[count // 3 :] = x[:1]
    if kind == "broken row" and count:
        x[0, 3] = math.nan
    if kind == "all broken":
        x[:, 2] = -math.inf
    if kind == "huge":
        x = x / x.abs().max() * 3e38 if count else x
    found = method(x).coordinates
    finite = x.isfinite().all(dim=1)
    assert found.shape == (count, 2)
    assert found.dtype == torch.float64
    assert torch.equal(found.isfinite().all(dim=1), finite)
    if finite.any():
        differ = bool((x[finite] != x[finite][0]).any())
        assert spread(found[finite]) == pytest.approx(1.0 if differ else 0.0)
        assert found[finite].mean(dim=0).abs().max() < 1e-9


@pytest.mark.parametrize("method", UNALIGNED)
def test_rows_that_are_not_finite_do_not_move_the_others(method):
    """As if they had not been there."""
    x = points(40)
    broken = torch.cat([x[:5], torch.full((3, 8), math.nan, dtype=torch.float64), x[5:]])
    before = torch.cat([x[:5, :2], torch.full((3, 2), math.nan, dtype=torch.float64), x[5:, :2]])
    kept = broken.isfinite().all(dim=1)
    assert torch.equal(method(broken).coordinates[kept], method(x).coordinates)
    assert torch.equal(method(broken, previous=before).coordinates[kept], method(x, previous=x[:, :2]).coordinates)


@pytest.mark.parametrize("method", UNALIGNED)
def test_points_that_the_last_map_lacks_are_placed_and_the_others_stay(method):
    """Also when it lacks all of them, or had them all in one place."""
    x = points(60)
    before = method(x).coordinates
    partly = before.clone()
    partly[::3] = math.nan
    found = method(x, previous=partly).coordinates
    assert found.isfinite().all()
    assert displacement(found, before) < 0.15
    for useless in (torch.full((60, 2), math.nan), partly[:1].expand(60, 2)):
        assert torch.equal(method(x, previous=useless).coordinates, before)


def test_missing_places_are_in_the_middle_of_the_nearest_known_points():
    """Three of them."""
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0], [0.9]], dtype=torch.float64)
    places = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [9.0, 9.0], [math.nan, 1.0]], dtype=torch.float64)
    assert filled_in(places, x)[4].tolist() == [1.0, 1.0]
    assert torch.equal(filled_in(places, x)[:4], places[:4])


def test_tsne_keeps_neighbourhoods_of_real_digits():
    """Nearly as well as the definition asks, by scikit-learn's own measure."""
    x = torch.tensor(load_digits().data[:150])
    found = project_tsne(x, perplexity=15)
    assert trustworthiness(x.numpy(), found.coordinates.numpy(), n_neighbors=10) > 0.95
    assert found.kl_divergence > 0
    assert found.explained is None


def test_tsne_warm_map_moves_little_and_a_fresh_one_much():
    """Digits and the same with a little noise; a fresh map is turned to fit and still lies elsewhere."""
    x = torch.tensor(load_digits().data[:150])
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = project_tsne(x, perplexity=15).coordinates
    warm = project_tsne(noisy, perplexity=15, previous=before)
    fresh = project_tsne(noisy, perplexity=15, previous=before, warm=False)
    assert displacement(warm.coordinates, before) < 0.1
    assert displacement(fresh.coordinates, before) > 1.5 * displacement(warm.coordinates, before)
    assert warm.kl_divergence < 1.1 * fresh.kl_divergence
    scaled = project_tsne(noisy, perplexity=15, previous=20 * before + 3)
    assert displacement(scaled.coordinates, warm.coordinates) < 0.03


def test_tsne_fresh_map_is_turned_to_fit_the_last_one():
    """The same map again, from another angle."""
    x = points(40)
    plain = project_tsne(x, perplexity=5).coordinates
    before = turned(plain, 2.0, -1.0)
    found = project_tsne(x, perplexity=5, previous=before, warm=False).coordinates
    assert displacement(found, before) < 1e-6


def test_tsne_is_bit_for_bit_the_same_for_a_seed_and_another_for_another():
    """And draws from no generator of the user's."""
    x = points(40)
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = project_tsne(x, perplexity=5)
    assert torch.equal(first.coordinates, project_tsne(x, perplexity=5).coordinates)
    assert not torch.equal(first.coordinates, project_tsne(x, perplexity=5, seed=1).coordinates)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])


def test_tsne_takes_no_more_than_a_third_of_the_points_as_neighbours():
    """A perplexity beyond is the largest that they allow."""
    x = points(31)
    assert torch.equal(project_tsne(x, perplexity=10).coordinates, project_tsne(x, perplexity=500).coordinates)


def test_fewer_than_five_points_get_the_map_of_pca():
    """There are no neighbourhoods to keep."""
    x = points(4)
    for method in METHODS[1:]:
        found = method(x)
        assert found.kl_divergence is None
        assert torch.allclose(found.coordinates, project_pca(x).coordinates)


def test_umap_makes_a_map_or_says_what_to_install():
    """By whether umap-learn is there."""
    x = torch.tensor(load_digits().data[:150])
    if not UMAP:
        with pytest.raises(ArgumentError, match="pip install 'lightning-interp\\[umap\\]'"):
            project_umap(x)
        return
    before = project_umap(x)
    assert torch.equal(before.coordinates, project_umap(x).coordinates)
    warm = project_umap(x, previous=before.coordinates).coordinates
    fresh = project_umap(x, previous=before.coordinates, warm=False, seed=1).coordinates
    assert displacement(warm, before.coordinates) < displacement(fresh, before.coordinates)


@pytest.mark.parametrize("method", UNALIGNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arrays_and_tensors_of_any_precision_are_read_and_left_as_they_are(method, dtype):
    """As the same numbers in float64."""
    x = points(20).to(dtype)
    copy = x.clone()
    with torch.inference_mode():
        found = method(x.clone()).coordinates
    assert torch.equal(found, method(x.double()).coordinates)
    assert torch.equal(found, method(x.double().numpy(), previous=None).coordinates)
    assert torch.equal(x, copy)


def test_displacement_is_the_median_way_in_units_of_the_spread():
    """Closed form, with points that one map lacks."""
    before = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0], [9.0, 9.0], [math.nan, 0.0]])
    after = before + torch.tensor([0.3, 0.4])
    after[4] = math.nan
    assert displacement(after, before) == pytest.approx(0.25)
    assert displacement(after.numpy(), before) == pytest.approx(0.25)
    assert displacement(before, before) == 0.0
    assert math.isnan(displacement(after[:1], before[:1]))
    assert math.isnan(displacement(after[4:], before[4:]))


@given(seed=st.integers(0, 100), count=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_nearest_orthonormal_is_orthonormal_and_no_other_agrees_better(seed, count):
    """Against random ones."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    found = nearest_orthonormal(matrix)
    assert torch.allclose(found.T @ found, torch.eye(2, dtype=torch.float64))
    for _ in range(10):
        other, _ = torch.linalg.qr(torch.randn(count, 2, generator=generator, dtype=torch.float64))
        assert (found * matrix).sum() >= (other * matrix).sum() - 1e-9


def test_wrong_arguments_are_refused():
    """With their name."""
    x = points(6)
    for method in METHODS:
        for arguments, options, name in (
            ((x[0],), {}, "embeddings"),
            ((x.long(),), {}, "embeddings"),
            ((x,), {"previous": x[:, :3]}, "previous"),
            ((x,), {"previous": x[:3, :2]}, "previous"),
        ):
            with pytest.raises(ArgumentError, match=f"`{name}`"):
                method(*arguments, **options)
    for wrong in (0.5, math.nan, "30", True):
        with pytest.raises(ArgumentError, match="`perplexity`"):
            project_tsne(x, perplexity=wrong)
    for wrong in (1, 2.5):
        with pytest.raises(ArgumentError, match="`neighbors`"):
            project_umap(x, neighbors=wrong)
    with pytest.raises(ArgumentError, match="`previous`"):
        displacement(x[:, :2], x[:3, :2])
