"""Five numbers about the separation of classes."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.separation import evenly, neighbor_votes, separation

KEYS = ["knn_accuracy", "silhouette", "fisher_ratio", "nc1", "effective_rank"]


def groups(count=60, features=5, classes=3, seed=0, distance=2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    middles = distance * torch.randn(classes, features, generator=generator)
    return torch.randn(count, features, generator=generator) + middles[labels], labels


def scatters(x, y):
    """Loops over the points, in numpy."""
    x, y = x.double().numpy(), y.numpy()
    mean = x.mean(axis=0)
    within = between = np.zeros((x.shape[1], x.shape[1]))
    for label in np.unique(y):
        own = x[y == label]
        between = between + len(own) * np.outer(own.mean(axis=0) - mean, own.mean(axis=0) - mean) / len(x)
        for point in own:
            within = within + np.outer(point - own.mean(axis=0), point - own.mean(axis=0)) / len(x)
    return within, between


def naive_vote(x, y, k):
    """Sorts all other points by distance and index."""
    votes = []
    for i in range(len(x)):
        others = sorted((float((x[i].double() - x[j].double()).norm()), j) for j in range(len(x)) if j != i)[:k]
        near = [int(y[j]) for _, j in others]
        most = max(near.count(label) for label in near)
        votes.append(next(label for label in near if near.count(label) == most))
    return torch.tensor(votes)


@pytest.mark.parametrize(("count", "features", "classes"), [(60, 5, 3), (30, 50, 4), (80, 2, 7)])
def test_scatter_numbers_equal_loops_with_numpys_pseudo_inverse(count, features, classes):
    """More features than points too."""
    x, y = groups(count, features, classes)
    within, between = scatters(x, y)
    found = separation(x, y)
    assert list(found) == KEYS
    assert found["fisher_ratio"] == pytest.approx(np.trace(between) / np.trace(within), rel=1e-9)
    inverse = np.linalg.pinv(between, rcond=1e-10, hermitian=True)
    assert found["nc1"] == pytest.approx(np.trace(within @ inverse) / len(y.unique()), rel=1e-7)


@pytest.mark.parametrize(("count", "features"), [(60, 5), (20, 50), (1, 3), (2, 3)])
def test_effective_rank_equals_that_of_numpys_singular_values(count, features):
    """Of the centred points; NaN for a single one."""
    x, y = groups(count, features)
    values = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(axis=0), compute_uv=False)
    shares = values[values > 1e-9] / values.sum() if values.sum() else np.array([math.nan])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert separation(x, y)["effective_rank"] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_effective_rank_of_equal_directions_is_their_number():
    """The corners of a cross in seven dimensions."""
    cross = torch.cat([torch.eye(7), -torch.eye(7)])
    assert separation(cross, torch.arange(14) % 2)["effective_rank"] == pytest.approx(7.0)


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_silhouette_equals_that_of_scikit_learn(classes):
    """With classes of a single point among them."""
    x, y = groups(60, 4, classes)
    assert separation(x, y)["silhouette"] == pytest.approx(silhouette_score(x.double().numpy(), y.numpy()), abs=1e-9)


def test_votes_equal_those_of_scikit_learn_where_no_two_classes_tie():
    """Leave-one-out over real digits, whose distances are often equal; with k = 1 there are no ties of classes."""
    data = load_digits()
    x, y = data.data[:150], data.target[:150]
    expected = cross_val_predict(KNeighborsClassifier(1), x, y, cv=LeaveOneOut())
    assert np.array_equal(expected, neighbor_votes(torch.tensor(x), torch.tensor(y), neighbors=1))
    near = y[NearestNeighbors(n_neighbors=7).fit(x).kneighbors(return_distance=False)]
    counts = np.stack([(near == label).sum(axis=1) for label in range(10)])
    clear = (counts == counts.max(axis=0)).sum(axis=0) == 1
    found = neighbor_votes(torch.tensor(x), torch.tensor(y), neighbors=7).numpy()
    assert clear.sum() > 100
    assert np.array_equal(found[clear], counts.argmax(axis=0)[clear])


@given(seed=st.integers(0, 1000), count=st.integers(2, 30), k=st.integers(1, 12), levels=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_votes_equal_a_naive_loop_with_many_equal_distances(seed, count, k, levels):
    """Points on a small grid: of equally near ones the lower index counts, of tied classes the nearest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (count, 2), generator=generator).float()
    y = torch.randint(3, (count,), generator=generator)
    near = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    order = near.fill_diagonal_(math.inf).argsort(dim=1, stable=True)[:, : min(k, count - 1)]
    expected = []
    for row in y[order].tolist():
        most = max(row.count(label) for label in row)
        expected.append(next(label for label in row if row.count(label) == most))
    assert expected == neighbor_votes(x, y, neighbors=k).tolist()


def test_votes_and_accuracy_in_chunks_equal_those_at_once(monkeypatch):
    """The size of a chunk is a matter of memory alone."""
    x, y = groups(90, 4, 5, distance=0.5)
    expected = neighbor_votes(x, y)
    assert torch.equal(expected, naive_vote(x, y, 10))
    assert separation(x, y)["knn_accuracy"] == pytest.approx(float((expected == y).double().mean()))
    module = sys.modules["lightning_interp.functional.separation"]  # the package has the function under that name
    monkeypatch.setattr(module, "_MAX_DISTANCES", 4 * 90 * 7)
    assert torch.equal(expected, neighbor_votes(x, y))


@given(
    seed=st.integers(0, 100),
    scale=st.sampled_from([1e-30, 1e-3, 7.0, 1e30]),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
)
@settings(max_examples=30, deadline=None)
def test_all_five_are_the_same_after_a_turn_a_scale_a_shift_and_a_new_order(seed, scale, shift):
    """In float64, over sixty orders of magnitude."""
    x, y = groups(40, 6, 3, seed)
    x = x.double()
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    order = torch.randperm(40, generator=generator)
    first, second = separation(x, y), separation(((x + shift) @ turn * scale)[order], y[order])
    for key in KEYS:
        assert first[key] == pytest.approx(second[key], rel=1e-6), key


def test_classes_that_collapse_to_places_of_their_own_are_perfectly_separated():
    """Infinite Fisher ratio, no spread left within the classes."""
    y = torch.arange(40) % 4
    found = separation(torch.eye(4)[y] * 0.1, y, neighbors=5)
    assert found == {
        "knn_accuracy": 1.0,
        "silhouette": 1.0,
        "fisher_ratio": math.inf,
        "nc1": 0.0,
        "effective_rank": pytest.approx(3.0),
    }


def test_dead_network_is_at_chance():
    """All points are the same: what needs a spread is NaN, votes are those of one class."""
    y = torch.arange(100) % 4
    for value in (0.0, 0.1, -3e38):
        found = separation(torch.full((100, 8), value), y)
        assert 0.2 <= found["knn_accuracy"] <= 0.25
        assert found["silhouette"] == 0.0
        assert all(math.isnan(found[key]) for key in KEYS[2:])


def test_class_means_in_one_place_give_a_ratio_of_zero_and_no_nc1():
    """Two classes that mirror each other."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = separation(x, torch.tensor([0, 0, 1, 1]))
    assert found["fisher_ratio"] == 0.0
    assert math.isnan(found["nc1"])


@pytest.mark.parametrize("count", [0, 1, 2, 5, 31])
@pytest.mark.parametrize("classes", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["normal", "constant", "dead", "nan"])
def test_tiny_sets_have_all_keys_and_no_exception(count, classes, kind):
    """One class, or as many classes as points, leaves only the rank."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    if kind == "constant":
        x[:, :] = 0.1
    if kind == "dead":
        x[:, :5] = 0
    if kind == "nan" and count:
        x[0, 2] = math.nan
    y = torch.arange(count) % classes
    found = separation(x, y)
    assert list(found) == KEYS
    if classes != 2:
        assert all(math.isnan(found[key]) for key in KEYS[:4])
    if count == 31 and kind in ("normal", "nan"):
        assert 1 < found["effective_rank"] <= 6


def test_rows_that_are_not_finite_are_left_out():
    """As if they had not been there; each keeps its own label in the votes."""
    x, y = groups(50, 4, 3, distance=0.3)
    broken, labels = x.repeat_interleave(2, dim=0), y.repeat_interleave(2)
    broken[1::4, 0], broken[3::4, 2] = math.nan, -math.inf
    assert separation(broken, labels) == separation(x, y)
    votes = neighbor_votes(broken, labels)
    assert torch.equal(votes[::2], neighbor_votes(x, y))
    assert torch.equal(votes[1::2], labels[1::2])


@pytest.mark.parametrize("seed", range(20))
def test_half_dead_features_in_float32_never_fail(seed):
    """Repeated zero eigenvalues are what float32 solvers give up on."""
    x, y = groups(120, 64, 4, seed)
    x[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:32]] = 0
    found = separation(x, y)
    assert all(math.isfinite(value) for value in found.values())
    assert found == separation(x[:, x.any(dim=0)], y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_inference_tensors_are_read(dtype):
    """As the same numbers in float64."""
    x, y = groups()
    with torch.inference_mode():
        low = x.to(dtype)
        found = separation(low, y)
    assert found == separation(low.double(), y)


def test_large_sets_take_a_fixed_subset_in_which_all_classes_are():
    """Also where the classes take turns with the period of the subset."""
    chosen = evenly(100_000, 1000)
    assert torch.equal(chosen, evenly(100_000, 1000))
    assert torch.equal(chosen // 100, torch.arange(1000))
    assert torch.bincount(chosen % 100).min() > 0
    assert len(evenly(7, 7)) == 7
    x, y = groups(1000, 3, 4)
    assert separation(x, y, max_points=100, max_silhouette_points=50) == separation(
        x[evenly(1000, 100)], y[evenly(1000, 100)], max_silhouette_points=50
    )


def test_hundred_thousand_points_of_ten_thousand_classes_give_five_numbers():
    """On a subset, and without a table of points by classes."""
    y = torch.arange(100_000) % 10_000
    x = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    found = separation(x, y, max_points=2000)
    assert list(found) == KEYS
    assert all(math.isfinite(value) for value in found.values())


def test_inputs_and_generators_stay_as_they_were():
    """Nothing is written to what is passed."""
    x, y = groups()
    copy, labels, state = x.clone(), y.clone(), torch.get_rng_state()
    separation(x, y, max_points=20)
    neighbor_votes(x, y)
    assert torch.equal(x, copy)
    assert torch.equal(y, labels)
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_arguments_are_refused():
    """With their name."""
    x, y = groups()
    for arguments, name in (
        ((x[0], y), "embeddings"),
        ((x.long(), y), "embeddings"),
        ((x, y[:3]), "labels"),
        ((x, y.float()), "labels"),
    ):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            separation(*arguments)
    for option in ("neighbors", "max_points", "max_silhouette_points"):
        with pytest.raises(ArgumentError, match=f"`{option}`"):
            separation(x, y, **{option: 0})
