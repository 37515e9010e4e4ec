"""The rule on validations that say little of the network, and what the rule `overfitting` makes of them."""

import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, History, OverfittingRule, ValidationMismatchRule
from lightning_interp.rules.validation_mismatch import in_doubt
from tests.rules.writing import check, healthy, run_of, write

LN10 = math.log(10)
HIGH = [2.3] * 8


def validated(values=HIGH, *, statistics=(), weights=None, training=0.1, classes=10):
    """A training loss that stays, a validation every 50 steps, and lags measured at the last of them."""
    history = run_of([training] * (50 * len(values)), classes=classes)
    write(history, "validation_metric", values, layer="val_loss", start=49, every=50)
    first = 49 + 50 * (len(values) - len(statistics))
    write(history, "statistics_lag", statistics, start=first, every=50)
    write(history, "weights_lag", [0.0] * len(statistics) if weights is None else weights, start=first, every=50)
    return history


def test_running_statistics_that_lag_are_told_with_what_they_cost():
    """More than half of 2.3 - 0.1, the gap."""
    (alert,) = check(ValidationMismatchRule(), validated(statistics=[1.2]))
    assert (alert.rule, alert.severity, alert.layer) == ("validation_mismatch", "info", None)
    assert alert.cause == "running statistics lag behind"
    assert (alert.value, alert.threshold) == (1.2, pytest.approx(1.1))
    assert "`val_loss` is 2.3 while the training loss is 0.1, but 1.2" in alert.message
    assert "momentum" in alert.advice
    assert alert.evidence == {
        "validation_loss": 2.3,
        "training_loss": 0.1,
        "statistics_lag": 1.2,
        "weights_lag": 0.0,
    }


@pytest.mark.parametrize(("on_training", "unlike"), [(0.59, True), (0.61, False), (-0.2, True)])
def test_validation_images_that_are_unlike_are_told_apart(on_training, unlike):
    """Running statistics that raise the loss of training images by less than half as much do not lag."""
    history = validated(statistics=[1.2])
    write(history, "training_statistics_lag", [on_training], start=399)
    (alert,) = check(ValidationMismatchRule(), history)
    causes = ["validation images are unlike the training images", "running statistics lag behind"]
    assert [alert.cause, alert.alternatives[0]] == (causes if unlike else causes[::-1])
    assert ("momentum" in alert.advice) is not unlike
    assert ("fit the training images" in alert.message) is unlike


def test_averaged_weights_are_told_apart():
    """The larger part is the cause, the other one its alternative."""
    (alert,) = check(ValidationMismatchRule(), validated(statistics=[0.3], weights=[1.0]))
    assert alert.cause == "averaged weights lag behind"
    assert alert.alternatives == ["running statistics lag behind"]
    assert alert.value == pytest.approx(1.3)
    assert "decay" in alert.advice


@pytest.mark.parametrize(
    "history",
    [
        validated(),
        validated(statistics=[1.0]),
        validated(statistics=[-1.2]),
        validated([2.3] * 7 + [0.3], statistics=[0.2]),
        validated([0.05] * 8, statistics=[1.2]),
        validated(statistics=[1.2], classes=None),
        validated(statistics=[math.nan]),
        write(validated(statistics=[1.2]), "validation_metric", [2.3], layer="val_loss", start=449),
        healthy(),
        History(),
    ],
    ids=["none", "less than half", "other way", "small", "no gap", "no classes", "nan", "old", "healthy", "empty"],
)
def test_silent_without_a_lag_that_explains_the_newest_validation(history):
    """A lag of an older validation says nothing of the newest."""
    assert check(ValidationMismatchRule(), history) == []


def test_a_large_lag_in_three_validations_in_a_row_is_a_warning():
    """More than a quarter of ln 10 in each of the last three."""
    rule = ValidationMismatchRule()
    values = [0.9] * 8
    assert check(rule, validated(values, statistics=[0.6, 0.6]))[0].severity == "info"
    assert check(rule, validated(values, statistics=[0.6, 0.6, 0.6]))[0].severity == "warning"
    assert check(rule, validated(values, statistics=[0.6, 0.5, 0.6]))[0].severity == "info"
    assert check(ValidationMismatchRule(checks=2), validated(values, statistics=[0.6, 0.6]))[0].severity == "warning"
    assert check(ValidationMismatchRule(large=0.3), validated(values, statistics=[0.6] * 3))[0].severity == "info"


def test_what_is_up_stays_up_down_to_four_fifths():
    """Raised at more than 1.1, cleared at less than 0.88."""
    book = AlertBook([ValidationMismatchRule(checks=9)])
    history = validated(statistics=[1.0])
    assert book.update(history) == []
    statuses = []
    for step, lag in ((449, 1.2), (499, 1.0), (549, 0.8)):
        history.step = step
        write(history, "validation_metric", [2.3], layer="val_loss", start=step)
        write(history, "statistics_lag", [lag], start=step)
        write(history, "weights_lag", [0.0], start=step)
        statuses.append([alert.status for alert in book.update(history)])
    assert statuses == [["raised"], [], ["cleared"]]


def test_overfitting_is_not_said_of_a_validation_that_lags():
    """Images known by heart, and a validation loss like that of a guess: where it comes from decides."""
    known = validated(training=0.01)
    assert [alert.rule for alert in check(OverfittingRule(), known)] == ["overfitting"]
    assert check(OverfittingRule(), validated(training=0.01, statistics=[0.3])) != []
    assert check(OverfittingRule(), validated(training=0.01, statistics=[1.5])) == []
    assert check(OverfittingRule(metric="val_loss"), validated(training=0.01, weights=[1.5], statistics=[0.0])) == []


@pytest.mark.parametrize(
    ("validation", "training", "classes", "asked"),
    [(0.4, 0.1, 10, True), (0.3, 0.1, 10, False), (0.1, 0.4, 10, False), (2.0, 0.1, None, False)],
)
def test_it_is_asked_where_the_loss_comes_from_only_if_it_is_high(validation, training, classes, asked):
    """By more than a tenth of ln 10, 0.23."""
    assert in_doubt(validated([validation], training=training, classes=classes)) is asked
    assert not in_doubt(History())


def test_thresholds_are_checked():
    with pytest.raises(ArgumentError, match="large"):
        ValidationMismatchRule(large=0.05)
    with pytest.raises(ArgumentError, match="checks"):
        ValidationMismatchRule(checks=0)


@pytest.mark.parametrize(("lag", "fires"), [(0.98, True), (1.42, False)])
def test_a_lag_that_is_more_than_the_whole_validation_loss_is_of_other_images(lag, fires):
    """A step of the user's that resizes or normalises: 0.659 can't fall by 1.42; 64 images may err by half."""
    history = validated([0.659] * 8, statistics=[lag])
    assert bool(check(ValidationMismatchRule(), history)) is fires


def test_what_is_said_of_the_statistics_is_not_the_sum_of_both():
    (alert,) = check(ValidationMismatchRule(), validated(statistics=[0.965], weights=[0.311]))
    assert "but 0.96 of that" in alert.message
    assert alert.value == pytest.approx(0.965 + 0.311)
