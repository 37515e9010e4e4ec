import math

from lightning_interp.rules import History, NonFiniteRule
from tests.rules.writing import check, healthy, run_of, write


def test_a_healthy_run_is_silent():
    assert check(NonFiniteRule(), healthy()) == []


def test_an_empty_history_is_silent():
    assert check(NonFiniteRule(), History()) == []


def test_a_loss_that_is_nan_is_critical_with_its_step():
    (alert,) = check(NonFiniteRule(), run_of([2.3] * 40 + [math.nan] * 3))
    assert (alert.severity, alert.layer, alert.evidence["first_step"]) == ("critical", None, 40)
    assert "step 40" in alert.message


def test_the_noted_step_counts_without_a_recorded_loss():
    history = run_of([2.3] * 5)
    history.note("non_finite_step", 5)
    (alert,) = check(NonFiniteRule(), history)
    assert alert.severity == "critical"


def test_a_loss_that_is_finite_again_is_a_warning():
    (alert,) = check(NonFiniteRule(), run_of([2.3, 2.2, math.inf, 2.1, 2.0]))
    assert alert.severity == "warning"


def test_the_first_layer_is_named():
    history = run_of([2.3] * 30)
    history.note("non_finite_step", 29, layer="conv2")
    history.note("non_finite_step", 28, layer="conv1")
    (alert,) = check(NonFiniteRule(), history)
    assert "conv1" in alert.message
    assert (alert.severity, alert.evidence["first_step"]) == ("critical", 28)


def test_a_gradient_that_did_no_harm_is_information():
    history = run_of([2.3] * 30)
    history.note("non_finite_step", 3, layer="conv1")
    (alert,) = check(NonFiniteRule(), history)
    assert (alert.severity, "mixed precision" in alert.advice) == ("info", True)


def test_after_an_early_jump_the_rate_is_blamed():
    history = run_of([2.3, 9.0, 50.0, 1e9, math.nan])
    write(history, "loss_before", [2.3, 9.0])
    write(history, "loss_after", [9.1, 50.0])
    (alert,) = check(NonFiniteRule(), history)
    assert alert.cause == "learning rate"


def test_without_a_jump_the_cause_is_unknown_and_the_rate_only_one_of_several():
    (alert,) = check(NonFiniteRule(), run_of([1.0] * 200 + [math.nan]))
    assert alert.cause is None
    assert alert.alternatives[0] == "learning rate"


def test_images_that_are_not_finite_are_blamed():
    history = run_of([math.nan])
    history.note("input_mean", math.nan)
    (alert,) = check(NonFiniteRule(), history)
    assert alert.cause == "inputs"
