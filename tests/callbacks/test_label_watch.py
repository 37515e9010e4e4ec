"""What one run remembers of its labels, look by look."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_interp.callbacks._embedded import Embedded
from lightning_interp.callbacks._influential import usable, why_unusable
from lightning_interp.callbacks._label_watch import LabelWatch, no_classes

ROWS = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]])
LABELS = torch.tensor([4, 4, 7, 7, 7, 7])  # the third lies among those of class 4
LOSSES = torch.tensor([0.1, 0.2, 3.0, 0.1, 0.2, 0.3])
INDICES = torch.tensor([10, 20, 30, 40, 50, 60])


def points(rows=ROWS, labels=LABELS, losses=LOSSES):
    """As a model with scores would give them; what it predicts is not looked at."""
    return Embedded(rows, labels, labels.clamp(min=0), losses, None)


def watch(*steps, **changes):
    found = LabelWatch(2)
    for step in steps:
        found.look(points(**changes), INDICES, step)
    return found


def test_without_losses_of_the_loop_the_points_are_ranked_by_their_own():
    """Mean loss times 1.05 + mean margin, in closed form; by index in the data set."""
    found = watch(3)
    found.look(points(losses=LOSSES * 3), INDICES, 7)
    ranked = found.rank(10)
    margins = [-0.0, -0.0, 1.0, -1.0, -1.0, -1.0]
    expected = {int(i): 2 * float(loss) * (1.05 + m) for i, loss, m in zip(INDICES, LOSSES, margins, strict=True)}
    assert dict(zip(ranked.indices.tolist(), ranked.scores.tolist(), strict=True)) == pytest.approx(expected)
    assert (ranked.indices[0], ranked.given[0], ranked.suggested[0]) == (30, 7, 4)
    assert len(found.rank(4).indices) == 4
    assert "does not return a score for each class" in found.limit


def test_a_step_that_was_looked_at_does_not_count_twice():
    """As after a resume from a checkpoint that was written just before the look."""
    assert watch(5, 5)._sums[2].tolist() == [1] * 6
    assert watch(5, 9)._sums[2].tolist() == [2] * 6


def test_the_state_goes_on_where_it_was():
    """Also at the same step."""
    state = watch(5).state_dict()
    found = LabelWatch(2)
    found.load_state_dict(state)
    found.look(points(), INDICES, 5)
    found.look(points(losses=LOSSES * 2), INDICES, 6)
    twice = watch(5)
    twice.look(points(losses=LOSSES * 2), INDICES, 6)
    assert torch.equal(found._sums, twice._sums)
    assert state["looks"]["sums"][2].tolist() == [1] * 6


def test_other_points_begin_anew():
    """The same number of points, of a data set that has grown: their history is that of others."""
    found = watch(5, 9)
    found.look(points(), INDICES + 1, 10)
    assert found._sums[2].tolist() == [1] * 6


def test_a_corrected_label_begins_anew():
    """What was said of the old label is not held against the new one."""
    found = watch(5, 9)
    corrected = LABELS.clone()
    corrected[2] = 4
    found.look(points(labels=corrected, losses=LOSSES.clamp(max=0.5)), INDICES, 10)
    assert found._sums[2].tolist() == [3, 3, 1, 3, 3, 3]
    ranked = found.rank(10)
    scores = dict(zip(ranked.indices.tolist(), ranked.scores.tolist(), strict=True))
    assert scores[30] == pytest.approx(0.5 * (1.05 - 1.0))


def test_what_can_not_be_used_in_one_look_counts_in_the_others():
    """A NaN in an embedding, and a label that is not known."""
    rows, labels = ROWS.clone(), LABELS.clone()
    rows[0, 1], labels[5] = math.nan, -1
    found = watch(1, rows=rows, labels=labels)
    assert found._sums[2].tolist() == [0, 1, 1, 1, 1, 0]
    assert set(found.rank(10).indices.tolist()) == {20, 30, 40, 50}


def test_without_any_loss_the_neighbours_decide():
    """A model without scores."""
    nothing = torch.full((6,), torch.nan)
    found = LabelWatch(2)
    found.look(Embedded(ROWS, LABELS, torch.full((6,), -1), nothing, None), INDICES, 1)
    ranked = found.rank(10)
    assert (ranked.indices[0], ranked.suggested[0], ranked.scores[0]) == (30, 4, pytest.approx(2.05))
    assert sorted(ranked.indices.tolist()) == INDICES.tolist()


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        ({"labels": torch.full((6,), -1)}, [], "no image has a label"),
        ({"rows": ROWS * math.nan}, [], "diverged"),
        ({"losses": LOSSES * math.nan}, [], "not among the classes"),
        ({"losses": torch.where(LABELS == 7, torch.nan, LOSSES)}, [0, 1], None),
    ],
)
def test_unusable_points_are_left_out_and_named(changes, rows, words):
    """A label beyond the scores has no loss."""
    found = points(**changes)
    assert usable(found).tolist() == rows
    assert words is None or words in why_unusable(found)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "the batches hold none"),
        (torch.tensor([0.25, 1.0]), "labels like 0.25"),
        (torch.tensor([[0.5], [2.0]]), "labels like 0.5"),
        (torch.tensor([[1, 1, 0], [0, 0, 0]]), "several labels an image"),
        (torch.zeros(2, 8, 8), "several labels an image"),
        (torch.tensor([3, -1]), None),
        (torch.tensor([0.0, 1.0]), None),
        (torch.tensor([[0.0], [1.0]]), None),
        (torch.tensor([True, False]), None),
        (torch.tensor([[0.2, 0.8], [1.0, 0.0]]), None),
        (torch.tensor([[0, 1], [1, 0]]), None),
    ],
)
def test_labels_that_are_not_one_class_an_image_are_told(labels, words):
    """Numbers, several labels, masks; not: whole numbers in any type, probabilities, one-hot."""
    found = no_classes(labels)
    assert (found is None) if words is None else (words in found and "interp_batch" in found)
