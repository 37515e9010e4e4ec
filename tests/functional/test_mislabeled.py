"""Scores of labels that look wrong, their neighbours' votes, and how many there may be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from lightning_interp.errors import ArgumentError
from lightning_interp.functional import mislabeled
from lightning_interp.functional.mislabeled import knn_disagreement, label_votes, rank_suspects, suspicion
from lightning_interp.functional.wrong_labels import wrong_label_share


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clouds(per_class=150, classes=5, features=8, spread=0.3, seed=0):
    """Points around one axis a class, and their true labels."""
    labels = torch.arange(per_class * classes) % classes
    return torch.eye(features)[labels] + spread * drawn(len(labels), features, seed=seed), labels


def flipped(labels, share, seed=0):
    """A share of the labels moved to any other class."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    which = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    wrong = labels.clone()
    wrong[which] = (wrong[which] + torch.randint(1, classes, which.shape, generator=generator)) % classes
    return wrong


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


@pytest.mark.parametrize("neighbors", [1, 7, 20])
def test_votes_agree_with_scikit_learn_and_a_loop(neighbors):
    """Cosine distance, the point itself left out."""
    points, labels = drawn(200, 6), torch.arange(200) % 4
    found = NearestNeighbors(n_neighbors=neighbors, metric="cosine").fit(points.double().numpy())
    around = labels.numpy()[found.kneighbors(return_distance=False)]
    votes = label_votes(points, labels, neighbors=neighbors)
    assert np.array_equal(votes.neighbor_labels.numpy(), around)
    for row, own in enumerate(labels.tolist()):
        classes = sorted(set(around[row]) - {own})
        counts = [(int((around[row] == c).sum()), -around[row].tolist().index(c), c) for c in classes]
        most = max(counts, default=(0, 0, own))
        assert votes.given[row] == pytest.approx((around[row] == own).mean())
        assert votes.other[row] == pytest.approx(most[0] / neighbors)
        if counts:
            assert votes.suggested[row] == most[2]


def test_disagreement_is_the_share_of_other_labels():
    """The same neighbours as in `label_votes`."""
    points, labels = drawn(50, 3), torch.arange(50) % 3
    votes = label_votes(points, labels, neighbors=5)
    expected = (votes.neighbor_labels != labels[:, None]).float().mean(dim=1)
    assert torch.allclose(expected, knn_disagreement(points, labels, neighbors=5))


def test_chunks_change_nothing(monkeypatch):
    """Of distances and of votes."""
    points, labels = drawn(300, 5), torch.arange(300) % 7
    whole = label_votes(points, labels)
    monkeypatch.setattr(mislabeled, "_CHUNK_VALUES", 1000)
    monkeypatch.setattr(mislabeled, "_ROWS", 17)
    parts = label_votes(points, labels)
    for name in ("given", "other", "suggested", "neighbor_labels"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("count", [1, 2, 5, 31])
def test_few_points_give_a_result(count):
    """One alone can't be asked about; the others have all others as neighbours."""
    votes = label_votes(drawn(count, 4), torch.arange(count) % 2)
    assert votes.neighbor_labels.shape == (count, min(20, count - 1))
    assert votes.given.isnan().all() if count == 1 else votes.given.isfinite().all()
    share = wrong_label_share(votes).share
    assert math.isnan(share) or 0 <= share <= 1


def test_no_points_give_nothing():
    """An empty set is no error."""
    votes = label_votes(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert votes.given.shape == (0,)
    assert wrong_label_share(votes).anchors == 0


def test_point_without_direction_has_no_votes_and_casts_none():
    """NaN, infinity and length 0 are left out, and the others are as if these were not there."""
    points, labels = drawn(40, 4), torch.arange(40) % 3
    points[3, 1], points[7, 0], points[11] = math.nan, math.inf, 0.0
    votes = label_votes(points, labels, neighbors=6)
    kept = torch.tensor([i not in (3, 7, 11) for i in range(40)])
    assert votes.given[~kept].isnan().all()
    assert (votes.neighbor_labels[~kept] == -1).all()
    assert torch.equal(votes.suggested[~kept], labels[~kept])
    clean = label_votes(points[kept], labels[kept], neighbors=6)
    assert torch.equal(votes.given[kept], clean.given)


def test_scale_of_a_point_means_nothing():
    """Also where its square leaves float32."""
    points, labels = drawn(60, 5).double(), torch.arange(60) % 3
    factors = 10.0 ** torch.linspace(-150, 150, 60, dtype=torch.float64)[:, None]
    assert torch.equal(label_votes(points, labels).given, label_votes(points * factors, labels).given)


def test_single_class_has_no_other_to_suggest():
    """No dissent, and no estimate."""
    votes = label_votes(drawn(40, 4), torch.full((40,), 9))
    assert (votes.given == 1).all()
    assert (votes.suggested == 9).all()
    assert math.isnan(wrong_label_share(votes).share)


@pytest.mark.parametrize(
    ("embeddings", "labels", "neighbors", "named"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), 2, "embeddings"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 2, "embeddings"),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), 2, "labels"),
        (torch.zeros(3, 2), torch.zeros(3), 2, "labels"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 0]), 2, "labels"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 0, "neighbors"),
    ],
)
def test_wrong_arguments_are_named(embeddings, labels, neighbors, named):
    """At once."""
    with pytest.raises(ArgumentError, match=f"`{named}`"):
        label_votes(embeddings, labels, neighbors=neighbors)


def test_suspicion_orders_by_loss_where_the_votes_are_equal_and_by_votes_where_the_loss_is():
    """The product of both; unanimous neighbours leave a twentieth."""
    loss = torch.tensor([1.0, 2.0, 1.0])
    assert suspicion(loss, torch.tensor([-1.0, -1.0, 1.0])).tolist() == pytest.approx([0.05, 0.1, 2.05])
    assert suspicion(loss).tolist() == [1.0, 2.0, 1.0]


def test_points_without_votes_get_those_of_points_with_a_similar_loss():
    """So that a point is not suspicious because it was not embedded."""
    loss = torch.linspace(0.01, 4.0, 400, dtype=torch.float64)
    margin = loss / 2 - 1
    asked = margin.clone()
    asked[::2] = math.nan
    assert torch.allclose(suspicion(loss, asked), suspicion(loss, margin), rtol=0.2, atol=0.02)
    nobody = torch.full((400,), math.nan)
    assert torch.equal(suspicion(loss, nobody).argsort(), torch.arange(400))


def test_suspicion_without_a_loss_is_nan():
    """NaN and infinity of the loss."""
    scores = suspicion(torch.tensor([1.0, math.nan, math.inf]), torch.zeros(3))
    assert scores.isnan().tolist() == [False, True, True]
    with pytest.raises(ArgumentError, match="vote_margin"):
        suspicion(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ArgumentError, match="mean_loss"):
        suspicion(torch.zeros(3, 1))


def test_ranking_is_descending_stable_and_leaves_out_what_has_no_score():
    """Equal scores in the order of their index."""
    scores = torch.tensor([1.0, 3.0, math.nan, 3.0, 2.0, math.inf])
    ranked = rank_suspects(scores, torch.arange(6), torch.tensor([5, 4, 3, -1, 1, 0]))
    assert ranked.indices.tolist() == [1, 3, 4, 0]
    assert ranked.scores.tolist() == [3.0, 3.0, 2.0, 1.0]
    assert ranked.given.tolist() == [1, 3, 4, 0]
    assert ranked.suggested.tolist() == [4, 3, 1, 5]
    assert rank_suspects(scores, torch.arange(6), torch.arange(6), count=2).indices.tolist() == [1, 3]
    with pytest.raises(ArgumentError, match="rivals"):
        rank_suspects(scores, torch.arange(6), torch.arange(5))
    with pytest.raises(ArgumentError, match="count"):
        rank_suspects(scores, torch.arange(6), torch.arange(6), count=0)


def test_neighbours_suggest_where_they_outvote_the_given_label():
    """Else the network does."""
    points = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6) + 0.01 * drawn(12, 2).abs()
    labels = torch.tensor([2, 7, 7, 7, 7, 7, 4, 4, 4, 4, 4, 4])
    votes = label_votes(points, labels, neighbors=4)
    ranked = rank_suspects(torch.arange(12.0).flip(0), labels, torch.full((12,), 9), votes)
    assert ranked.suggested.tolist() == [7] + [9] * 11
    with pytest.raises(ArgumentError, match="votes"):
        rank_suspects(torch.zeros(3), torch.zeros(3), torch.zeros(3), votes)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_estimate_is_near_the_truth_on_clear_classes(share):
    """Clouds that hardly overlap."""
    points, labels = clouds(per_class=300)
    found = wrong_label_share(label_votes(points, flipped(labels, share)))
    assert abs(found.share - share) <= 0.02 + 0.1 * share
    assert found.recognition > 0.4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
def test_estimate_is_near_the_truth_on_the_pixels_of_real_digits(digits, share):
    """Without any network: pixels are an embedding too."""
    images, labels = digits
    found = wrong_label_share(label_votes(images, flipped(labels, share)))
    assert abs(found.share - share) <= 0.02 + 0.1 * share


def test_classes_that_overlap_are_not_taken_for_wrong_labels():
    """A third of the labels is not what the neighbours say, yet none is wrong."""
    points, labels = clouds(per_class=300, spread=0.9)
    votes = label_votes(points, labels)
    found = wrong_label_share(votes)
    assert (votes.margin > 0).float().mean() > 0.3
    assert found.share < 0.03 or found.recognition < 0.5


@pytest.mark.parametrize("odds", [2, 20])
def test_embedding_that_knows_nothing_is_recognised_as_such(odds):
    """Also with few of one class, where the vote is nearly always right by chance."""
    labels = (torch.arange(1200) % odds == 0).long()
    found = wrong_label_share(label_votes(drawn(1200, 8), labels))
    assert found.recognition < 0.1
    constant = wrong_label_share(label_votes(torch.ones(1200, 3), labels.sort().values))
    assert not constant.recognition > 0.1


def test_small_classes_are_not_counted():
    """A class with fewer points than neighbours can't win a vote."""
    points, labels = clouds(per_class=100)
    labels[:5] = 40
    assert wrong_label_share(label_votes(points, labels)).share < 0.01


def test_lift_agrees_with_a_loop_over_groups_and_labels():
    """Mean of [label is b] times votes for b, over the product of the means, summed over groups and labels."""
    points, labels = clouds(per_class=200, spread=0.6)
    labels = flipped(labels, 0.1)
    votes = label_votes(points, labels)
    around = torch.stack([(votes.neighbor_labels == c).double().mean(dim=1) for c in range(5)], dim=1)
    counts = [np.bincount(row, minlength=5) for row in votes.neighbor_labels.numpy()]
    winner = torch.tensor(
        [
            next(c for c in row if count[c] == count.max())
            for row, count in zip(votes.neighbor_labels.tolist(), counts, strict=True)
        ]
    )
    observed = expected = dissent = 0.0
    for group in range(5):
        members = (winner == group).nonzero()[:, 0]
        level = around[members, group].float().sort().values[len(members) // 2]
        anchors = members[around[members, group].float() >= level - 1e-6]
        for other in set(range(5)) - {group}:
            own = (labels[anchors] == other).double()
            observed += len(members) * float((own * around[anchors, other]).mean())
            expected += len(members) * float(own.mean() * around[anchors, other].mean())
            dissent += len(members) * float(own.mean())
    found = wrong_label_share(votes)
    assert found.lift == pytest.approx(observed / expected)
    assert found.disagreement == pytest.approx(dissent / len(labels))
    assert found.share == pytest.approx(found.disagreement * min(1, max(0, 2 - found.lift)))


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_order_of_points_and_names_of_classes_mean_nothing(seed):
    """Permuted points, and labels under other numbers."""
    points, labels = clouds(per_class=40, classes=3, spread=0.5, seed=seed)
    labels = flipped(labels, 0.1, seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one = wrong_label_share(label_votes(points, labels))
    other = wrong_label_share(label_votes(points[order], 10**6 - 3 * labels[order]))
    assert other.anchors == one.anchors
    assert [other.share, other.recognition] == pytest.approx([one.share, one.recognition], abs=1e-6)


def test_ten_thousand_classes_fit():
    """Two points a class: nothing can be said, in little memory; with thirty of two of them, it can."""
    labels = torch.cat([torch.arange(4000) // 2 + 7000, torch.full((40,), 1), torch.full((40,), 9999)])
    votes = label_votes(drawn(len(labels), 4), labels)
    assert math.isfinite(wrong_label_share(votes).recognition)
    assert math.isnan(wrong_label_share(label_votes(drawn(4000, 4), labels[:4000])).share)
