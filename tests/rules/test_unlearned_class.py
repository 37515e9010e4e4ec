"""The rule on class images that convince nobody."""

import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules.history import History
from lightning_interp.rules.unlearned_class import UnlearnedClassRule


def history(**series):
    """Class to its values; the first one is before the first step."""
    found = History()
    for name, values in series.items():
        for index, value in enumerate(values):
            found.record("class_image_augmented", value, step=index * 10, layer=name)
    return found


def check(past, active=()):
    return list(UnlearnedClassRule().check(past, active))


def test_class_that_stays_low_is_named_with_its_value():
    """As a class without training examples does: 0.01, the others 1."""
    (alert,) = check(history(cat=[0.1, 0.9, 1.0], dog=[0.1, 0.02, 0.01], owl=[0.1, 0.3, 0.2]))
    assert (alert.rule, alert.severity, alert.layer) == ("unlearned_class", "info", None)
    assert "dog (0.01), owl (0.20)" in alert.message
    assert "cat" not in alert.message
    assert alert.value == 0.01
    assert alert.evidence == {"probability_dog": 0.01, "probability_owl": 0.2}
    assert alert.cause is None


def test_all_classes_low_is_another_cause():
    """Nothing has been learned, if the outputs are scores of classes: without a cross-entropy nobody knows."""
    past = history(cat=[0.1, 0.1, 0.1], dog=[0.1, 0.1, 0.2])
    assert check(past) == []
    past.note("num_classes", 2)
    (alert,) = check(past)
    assert alert.cause == "nothing has been learned yet"


@pytest.mark.parametrize(("loss", "cause"), [(2.1, "nothing has been learned yet"), (1.9, None)])
def test_all_classes_low_although_the_loss_has_fallen_is_no_sign_that_nothing_was_learned(loss, cause):
    """0.9 ln 10 is 2.07."""
    past = history(cat=[0.1, 0.1, 0.1], dog=[0.1, 0.1, 0.2])
    past.note("num_classes", 10)
    for step in range(20):
        past.record("loss", loss, step=step)
    (alert,) = check(past)
    assert alert.cause == cause
    assert ("softmax" in alert.advice) is (cause is None)


def test_silent_where_the_network_is_another_one_when_it_is_evaluated():
    """Then images made for it as it is evaluated say nothing of it."""
    past = history(cat=[0.1, 0.1, 0.1], dog=[0.1, 0.1, 0.2])
    past.note("num_classes", 10)
    for step in range(20):
        past.record("loss", 0.1, step=step)
    past.record("validation_metric", 2.3, step=20, layer="val_loss")
    past.record("statistics_lag", 0.2, step=20)
    past.record("weights_lag", 0.0, step=20)
    assert check(past)
    past.record("validation_metric", 2.3, step=21, layer="val_loss")
    past.record("statistics_lag", 2.0, step=21)
    past.record("weights_lag", 0.0, step=21)
    assert check(past) == []


@pytest.mark.parametrize(
    "values", [[], [0.1], [0.1, 0.1], [0.1, 0.2, 0.9], [0.1, 0.9, 0.2], [0.1, math.nan, 0.2], [0.0, 0.5, 0.5]], ids=str
)
def test_silent_unless_the_last_two_after_the_first_step_are_low(values):
    """One value is chance, and before the first step every class is low."""
    assert check(history(cat=values, dog=[0.1, 1.0, 1.0])) == []


def test_value_that_wavers_about_the_threshold_does_not_clear():
    """Once up, 0.6 is the limit."""
    past = history(cat=[0.1, 0.55, 0.55], dog=[0.1, 1.0, 1.0])
    assert check(past) == []
    assert len(check(past, {("unlearned_class", None)})) == 1


def test_many_classes_are_counted():
    """Eight are named."""
    (alert,) = check(history(**{f"c{index}": [0.1, 0.2, 0.1] for index in range(11)}, good=[0, 1.0, 1.0]))
    assert alert.message.endswith("and 3 more.")


def test_threshold_is_checked():
    """A probability."""
    with pytest.raises(ArgumentError, match="probability"):
        UnlearnedClassRule(probability=1.5)
