import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import BadStartRule, History
from tests.rules.writing import check, healthy, run_of, write


def with_inputs(history, mean, std):
    history.note("input_mean", mean)
    history.note("input_std", std)
    return history


def test_healthy_and_empty_runs_are_silent():
    assert check(BadStartRule(), healthy()) == []
    assert check(BadStartRule(), History()) == []


def test_a_first_loss_above_three_ln_c_fires():
    (alert,) = check(BadStartRule(), with_inputs(run_of([40.0, 39.0]), 0.0, 1.0))
    assert (alert.severity, alert.cause, alert.value) == ("warning", "initialisation", 40.0)
    assert alert.threshold == pytest.approx(3 * math.log(10))


def test_just_below_the_factor_it_is_silent():
    assert check(BadStartRule(), run_of([2.99 * math.log(10)])) == []


def test_large_inputs_are_blamed_with_the_numbers_to_normalise_by():
    (alert,) = check(BadStartRule(), with_inputs(run_of([40.0]), 120.0, 60.0))
    assert alert.cause == "inputs"
    assert "subtract 120 and divide by 60" in alert.advice


def test_small_inputs_are_only_an_alternative():
    (alert,) = check(BadStartRule(), with_inputs(run_of([40.0]), 0.45, 0.25))
    assert (alert.cause, alert.alternatives) == ("initialisation", ["inputs", "a margin or a scale in the loss"])


def test_it_clears_when_the_loss_has_come_down_and_not_before():
    rule, key = BadStartRule(), {("bad_start", None): "warning"}
    still = run_of([40.0] + [0.85 * math.log(10)] * 20)
    assert check(rule, still) == []
    assert len(check(rule, still, key)) == 1
    assert check(rule, run_of([40.0] + [0.5] * 20), key) == []


def test_without_a_cross_entropy_only_nan_counts():
    assert check(BadStartRule(), run_of([1e6], classes=None)) == []
    (alert,) = check(BadStartRule(), run_of([math.nan], classes=None))
    assert alert.severity == "critical"


def test_a_run_that_was_continued_has_no_first_loss():
    history = write(History(), "loss", [50.0, 50.0], start=300)
    history.note("num_classes", 10)
    assert check(BadStartRule(), history) == []


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`factor`"):
        BadStartRule(factor=0.5)
