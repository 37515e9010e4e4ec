"""The rule on training labels that look wrong."""

import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, LearningRateTooLowRule, SuspectLabelsRule
from lightning_interp.rules.learning_rate_too_high import explains_loss
from tests.rules.writing import check, falling, healthy, run_of, write

KEY = ("suspect_labels", None)


def labelled(shares, recognition=0.9, *, history=None, anchors=2000.0, every=100):
    """A healthy run in which these shares were measured, from step 99 on."""
    history = healthy() if history is None else history
    values = recognition if isinstance(recognition, list) else [recognition] * len(shares)
    write(history, "suspect_label_share", shares, start=every - 1, every=every)
    write(history, "label_recognition", values, start=every - 1, every=every)
    history.note("label_anchors", anchors)
    history.note("train_samples", 60000)
    history.finished = False
    return history


def test_share_that_holds_twice_is_told_with_its_count():
    """The smaller of the two counts, and the file is named."""
    (alert,) = check(SuspectLabelsRule(), labelled([0.0, 0.08, 0.10, 0.09]))
    assert (alert.rule, alert.severity, alert.layer, alert.cause) == ("suspect_labels", "warning", None, "wrong labels")
    assert alert.value == 0.09
    assert alert.threshold == 0.03
    assert "9%" in alert.message
    assert "(5400 of 60000)" in alert.message
    assert "suspect_labels.csv" in alert.advice
    assert alert.evidence["measured_at_step"] == 399
    assert alert.evidence["standard_error"] == pytest.approx(math.sqrt(0.09 * 0.91 / 2000))


@pytest.mark.parametrize(
    ("shares", "recognition"),
    [
        ([], []),
        ([0.5], [0.9]),
        ([0.5, 0.02, 0.5, 0.02], [0.9] * 4),
        ([0.02, 0.029, 0.02], [0.9] * 3),
        ([0.4, 0.4, 0.0], [0.4, 0.49, 0.9]),
        ([math.nan] * 3, [math.nan] * 3),
        ([math.nan, 0.3, math.nan], [math.nan, 0.9, math.nan]),
    ],
    ids=str,
)
def test_silent_on_chance_and_where_the_neighbours_know_too_little(shares, recognition):
    """One measurement, ones that waver, small ones, and those of an embedding that does not know the labels."""
    assert check(SuspectLabelsRule(), labelled(shares, recognition)) == []


def test_one_measurement_will_do_at_the_end():
    """There will be no other."""
    history = labelled([0.1])
    history.finished = True
    (alert,) = check(SuspectLabelsRule(), history)
    assert alert.value == 0.1


def test_few_points_must_say_more():
    """Two standard errors above zero."""
    assert check(SuspectLabelsRule(), labelled([0.1, 0.1], anchors=20)) == []
    assert len(check(SuspectLabelsRule(), labelled([0.1, 0.1], anchors=60))) == 1
    unknown = labelled([0.1, 0.1])
    unknown.note("label_anchors", math.nan)
    assert check(SuspectLabelsRule(), unknown) == []


def test_labels_learned_by_heart_are_no_less_wrong():
    """The share goes down, the alert stays and says why."""
    (alert,) = check(SuspectLabelsRule(), labelled([0.1, 0.1, 0.04, 0.01, 0.0]))
    assert alert.value == 0.1
    assert alert.evidence["share_now"] == 0.0
    assert "by heart" in alert.message


def test_share_that_wavers_about_the_threshold_does_not_clear():
    """Once up, four fifths hold it."""
    history = labelled([0.026, 0.026])
    assert check(SuspectLabelsRule(), history) == []
    assert len(check(SuspectLabelsRule(), history, active=[KEY])) == 1


def test_nothing_counts_before_the_network_has_learned_something():
    """Cross-entropy below nine tenths of ln C; without a cross-entropy all counts."""
    losses = [2.3] * 400 + [0.5] * 200
    early = labelled([0.1, 0.1, 0.1, 0.0, 0.0], history=run_of(losses))
    assert check(SuspectLabelsRule(), early) == []
    assert len(check(SuspectLabelsRule(), labelled([0.1] * 3 + [0.0] * 2, history=run_of(losses, classes=None)))) == 1
    assert check(SuspectLabelsRule(), labelled([0.1] * 3, history=run_of([2.3] * 600))) == []


def test_other_causes_of_a_high_loss_go_first():
    """A loss that is no number, dead filters, a rate that is too high."""
    dead = labelled([0.1, 0.1])
    write(dead, "dead_fraction", [0.6], layer="conv3", start=599)
    assert check(SuspectLabelsRule(), dead) == []
    broken = labelled([0.1, 0.1])
    write(broken, "loss", [math.nan], start=700)
    assert check(SuspectLabelsRule(), broken) == []
    # Without a cross-entropy, since a loss stuck near ln C does not count anyway.
    high = labelled([0.1] * 5, history=run_of([2.3, 50.0] + [2.29] * 598, classes=None))
    assert explains_loss(high)
    assert check(SuspectLabelsRule(), high) == []
    assert len(check(SuspectLabelsRule(), labelled([0.1] * 5, history=run_of([2.3] * 600, classes=None)))) == 1


def test_labels_that_have_nothing_to_do_with_the_images_are_information():
    """After five measurements; the numbers can't tell shuffled labels from a blind network."""
    rule = SuspectLabelsRule()
    assert check(rule, labelled([0.2] * 4, 0.1, history=run_of([2.3] * 600))) == []
    (alert,) = check(rule, labelled([0.2] * 5, 0.1, history=run_of([2.3] * 600)))
    assert (alert.severity, alert.cause, alert.value, alert.threshold) == ("info", None, 0.1, 0.25)
    assert check(rule, labelled([0.2] * 5, [0.1, 0.1, 0.1, 0.1, 0.3], history=run_of([2.3] * 600))) == []


def test_labels_that_have_nothing_to_do_with_the_images_are_a_warning_at_the_end():
    """Then it was all for nothing, whichever of the two is the cause."""
    history = labelled([0.2] * 5, 0.2, history=run_of(falling(600, end=1.8)))
    assert [alert.severity for alert in check(SuspectLabelsRule(), history)] == ["info"]
    history.finished = True
    (alert,) = check(SuspectLabelsRule(), history)
    assert alert.severity == "warning"
    assert alert.evidence == {"recognition": 0.2, "measurements": 5.0, "loss": pytest.approx(1.8, abs=0.05)}


def test_rate_that_is_too_low_does_not_explain_labels_that_are_not_known():
    """Even an untrained network has neighbours that know the labels; and the other rule leaves it to this one."""
    history = run_of([2.3] * 600)
    write(history, "step_ratio", [0.999] * 12, every=50)
    write(history, "learning_rate", [1e-6] * 12, every=50)
    history = labelled([0.2] * 6, 0.1, history=history)
    assert len(check(SuspectLabelsRule(), history)) == 1
    assert check(LearningRateTooLowRule(), history) == []


def test_at_the_end_three_measurements_are_enough():
    history = labelled([0.2] * 3, 0.1)
    assert check(SuspectLabelsRule(), history) == []
    history.finished = True
    (alert,) = check(SuspectLabelsRule(), history)
    assert alert.severity == "warning"


def test_healthy_run_is_silent():
    """With and without measurements."""
    assert check(SuspectLabelsRule(), healthy()) == []
    assert check(SuspectLabelsRule(), labelled([0.004, 0.001, 0.0, 0.0, 0.0], [0.6, 0.9, 0.95, 0.97, 0.98])) == []


def test_book_raises_once_over_a_run_that_learns_by_heart():
    """Raised at the second measurement and never cleared."""
    book, history = AlertBook([SuspectLabelsRule()]), run_of([2.3] * 50 + [0.5] * 550)
    history.note("label_anchors", 1000)
    changed = []
    for step, share in enumerate([0.12, 0.1, 0.06, 0.02, 0.0, 0.0], start=1):
        history.record("suspect_label_share", share, step=100 * step)
        history.record("label_recognition", 0.8, step=100 * step)
        changed.append([alert.status for alert in book.update(history)])
    assert changed == [[], ["raised"], [], [], [], []]


@pytest.mark.parametrize("argument", ["share", "recognition", "unrelated", "dead", "certainty", "unrelated_after"])
def test_thresholds_are_checked(argument):
    """By name."""
    with pytest.raises(ArgumentError, match=argument):
        SuspectLabelsRule(**{argument: -1})
