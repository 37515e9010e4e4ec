"""The rule on single batches whose loss towers above all before."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, GradientSpikeRule, History
from tests.rules.writing import check, falling, healthy, run_of, write


def spiked(losses, **options):
    """A run with these losses and the peaks among them."""
    history = run_of(losses, **options)
    for step, loss in enumerate(losses):
        history.record_peak("loss_peak", loss, step=step)
    return history


def bad_batch(height=20.0, at=300, steps=400, after=0.3):
    """A healthy run with one bad batch, after which the loss is `after` for a while."""
    losses = falling(steps)
    return [*losses[:at], height, *[after] * (steps - at - 1)]


def test_one_loss_above_all_before_it_is_a_bad_batch():
    """Told with its step, its size and the norm to clip to."""
    history = spiked(bad_batch())
    write(history, "gradient_norm", [0.5] * 50)
    write(history, "gradient_norm", [0.5, 80.0], start=200, every=100)
    (alert,) = check(GradientSpikeRule(), history)
    assert (alert.rule, alert.severity, alert.cause, alert.layer) == ("gradient_spike", "warning", "bad batch", None)
    assert alert.value == pytest.approx(20 / math.log(10))
    assert alert.evidence["spike_step"] == 300
    assert alert.evidence["gradient_norm"] == 80.0
    assert alert.evidence["loss_since"] == pytest.approx(0.3)
    assert "At step 300" in alert.message
    assert "gradient_clip_val=1," in alert.advice


@pytest.mark.parametrize(
    "losses",
    [
        falling(400),
        bad_batch(4.5),
        bad_batch(at=40),
        [2.3, 30.0, *falling(398)],
        [0.05] * 200 + [2.0] + [0.05] * 100,
        [9.0, *falling(299), 15.0, *[0.3] * 100],
    ],
    ids=["none", "low", "early", "catapult", "fine-tuning", "bad start"],
)
def test_silent_on_what_is_not_twice_a_guess_and_all_before_it(losses):
    """Early jumps are a matter of the rate."""
    assert check(GradientSpikeRule(), spiked(losses)) == []


def test_healthy_empty_and_continued_runs_are_silent():
    """Of a run that was continued, what came before is not known."""
    assert check(GradientSpikeRule(), healthy()) == []
    assert check(GradientSpikeRule(), History()) == []
    continued = History()
    write(continued, "loss", bad_batch(), start=1000)
    write(continued, "loss_peak", [2.3, 20.0], start=1000, every=300)
    assert check(GradientSpikeRule(), continued) == []


def test_jump_at_the_end_of_a_warm_up_is_a_matter_of_the_rate():
    """The rate strikes where it is large."""
    history = spiked(bad_batch(at=100))
    write(history, "learning_rate", [0.001 * step for step in range(111)])
    assert check(GradientSpikeRule(), history) == []


def test_training_that_is_undone_is_critical():
    """As long as half of what was learned is gone."""
    (alert,) = check(GradientSpikeRule(), spiked(bad_batch(after=2.3)))
    assert (alert.severity, alert.cause) == ("critical", "bad batch")
    assert "before step 300" in alert.advice
    (alert,) = check(GradientSpikeRule(), spiked(bad_batch(after=1.0)))
    assert alert.severity == "warning"


def test_loss_that_was_on_its_way_up_points_at_the_rate():
    """So does an update that had overshot."""
    losses = bad_batch()
    losses[296:300] = [0.2, 0.6, 2.0, 5.0]
    (alert,) = check(GradientSpikeRule(), spiked(losses))
    assert (alert.cause, alert.alternatives) == ("learning rate", ["bad batch"])
    history = spiked(bad_batch())
    history.record("step_ratio", -3.0, step=299)
    (alert,) = check(GradientSpikeRule(), history)
    assert alert.cause == "learning rate"


def test_spike_is_found_although_the_losses_were_averaged():
    """The history merges late losses in pairs; the peaks stay."""
    losses = falling(5000, end=0.01)
    losses[4900] = 8.0
    history = spiked(losses)
    assert max(history.get("loss").values[10:]) < 4.5
    (alert,) = check(GradientSpikeRule(), history)
    assert alert.evidence["spike_step"] == 4900


@given(st.floats(1e-3, 1e3))
def test_scale_of_a_loss_that_is_no_cross_entropy_does_not_matter(scale):
    """All is compared with the losses before."""
    history = spiked([scale * loss for loss in bad_batch()], classes=None)
    assert [round(alert.value, 6) for alert in check(GradientSpikeRule(), history)] == [round(20 / 2.3, 6)]


def test_losses_that_are_not_positive_have_no_multiples():
    """Nothing is said of them."""
    assert check(GradientSpikeRule(), spiked([loss - 1 for loss in bad_batch()], classes=None)) == []


def test_rate_that_was_too_high_from_the_start_explains_it():
    """An early jump with damage: then that rule speaks. So does `non_finite` of a loss that is no number."""
    history = spiked([2.3] * 200 + [20.0] + [2.3] * 100)
    assert len(check(GradientSpikeRule(), history)) == 1
    write(history, "loss_before", [2.3] * 3)
    write(history, "loss_after", [2.3, 6.0, 2.3])
    write(history, "dead_fraction", [0.0, 0.6], layer="conv1", every=200)
    assert check(GradientSpikeRule(), history) == []
    assert check(GradientSpikeRule(), spiked([*bad_batch(), math.nan])) == []


def test_gradient_that_stays_large_is_said_to_explode():
    """Not twice."""
    history = spiked([1.9] * 300 + [20.0] + [3.0] * 99)
    assert len(check(GradientSpikeRule(), history)) == 1
    write(history, "gradient_norm", [0.5] * 50 + [500.0] * 3, every=7)
    assert check(GradientSpikeRule(), history) == []


def test_book_raises_once_and_clears_after_two_hundred_steps():
    """A spike that is over is news for a while."""
    book, history, losses = AlertBook([GradientSpikeRule()]), run_of([]), bad_batch(steps=700)
    changed = []
    for step, loss in enumerate(losses):
        history.record("loss", loss, step=step)
        history.record_peak("loss_peak", loss, step=step)
        if step % 50 == 0:
            changed += [(alert.status, step) for alert in book.update(history)]
    assert changed == [("raised", 300), ("cleared", 500)]


def test_peaks_are_the_finite_records():
    """Each larger than the one before."""
    history = History()
    for step, value in enumerate([math.nan, 2.0, 1.0, 2.0, 3.0, math.inf, 2.5, 4.0]):
        history.record_peak("loss_peak", value, step=step)
    assert list(zip(history.get("loss_peak").steps, history.get("loss_peak").values, strict=True)) == [
        (1, 2.0),
        (4, 3.0),
        (7, 4.0),
    ]


@pytest.mark.parametrize("argument", ["factor", "min_steps", "keep", "lost"])
def test_thresholds_are_checked(argument):
    """By name."""
    with pytest.raises(ArgumentError, match=argument):
        GradientSpikeRule(**{argument: -1})


@pytest.mark.parametrize(("before", "cause"), [(2.6, "learning rate"), (2.2, "bad batch")])
def test_a_run_that_had_learned_nothing_has_nothing_that_a_batch_could_undo(before, cause):
    """A guess has ln 10, 2.303."""
    history = spiked([2.3, *[before] * 299, 20.0, *[4.2] * 100])
    (alert,) = check(GradientSpikeRule(), history)
    assert alert.cause == cause
