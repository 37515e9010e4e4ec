import math

from lightning_interp.rules import History
from lightning_interp.rules._evidence import broken_since, deaths, early_end, inputs_off, reference_loss
from lightning_interp.rules._jumps import early_jump
from tests.rules.writing import run_of, write


def test_reference_loss_is_the_smaller_one_of_guess_and_first_loss():
    assert reference_loss(run_of([5.0])) == math.log(10)
    assert reference_loss(run_of([0.4])) == 0.4
    assert reference_loss(run_of([5.0], classes=None)) == 5.0
    assert reference_loss(run_of([math.nan])) == math.log(10)
    assert reference_loss(History()) is None


def test_early_end_is_constant_without_a_warm_up():
    assert early_end(History(), 20) == 20
    assert early_end(write(History(), "learning_rate", [0.1] * 50), 20) == 20
    assert early_end(write(History(), "learning_rate", [0.1, 0.05, 0.2, 0.4]), 20) == 20


def test_early_end_is_counted_from_the_end_of_the_warm_up():
    history = write(History(), "learning_rate", [0.0, 0.1, 0.2, 0.2, 0.2, 0.1])
    assert early_end(history, 20) == 22


def test_the_jump_of_one_batch_goes_before_that_of_the_logged_loss():
    history = run_of([2.3, 40.0, 2.3])
    assert early_jump(history).same_batch is False
    write(history, "loss_before", [2.3])
    write(history, "loss_after", [10.0])
    assert early_jump(history).same_batch is True


def test_what_is_seen_at_a_step_was_done_earlier():
    history = run_of([2.3, 40.0, 2.3])
    write(history, "step_ratio", [-9.0, 0.9])
    assert early_jump(history).rate_factor == 1 / 20
    late = write(run_of([2.3, 2.3, 40.0]), "step_ratio", [-9.0, 0.9])
    assert early_jump(late).rate_factor == 0.1


def test_broken_since_ends_when_the_loss_is_finite_again():
    assert broken_since(run_of([1.0, math.nan])) == 1
    assert broken_since(run_of([1.0, math.nan, 1.0])) is None
    assert broken_since(run_of([1.0])) is None


def test_deaths_need_a_window_before_the_first_update():
    history = write(History(), "dead_fraction", [0.1, 0.4], layer="a", every=10)
    write(history, "dead_fraction", [0.1, 0.4], layer="b", start=10, every=10)
    write(history, "dead_fraction", [0.1], layer="c")
    (death,) = deaths(history)
    assert (death.layer, round(death.gain, 6)) == ("a", 0.3)


def test_inputs_are_off_when_far_from_zero_mean_or_unit_deviation():
    history = History()
    assert not inputs_off(history)
    history.note("input_std", 3.0)
    assert inputs_off(history)
    history.note("input_std", 1.0)
    history.note("input_mean", math.nan)
    assert inputs_off(history)
