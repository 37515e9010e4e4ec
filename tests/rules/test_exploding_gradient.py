"""The rule on gradients out of all proportion."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, ExplodingGradientRule, History
from tests.rules.gradients import graded, jumped
from tests.rules.writing import check, falling, healthy, write

KEY = ("exploding_gradient", None)
TANH = [0.4, 0.7, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01]
EVEN = [0.2, 0.4, 0.5, 0.4, 0.3, 0.3, 0.4, 0.2]


def test_gradient_that_grows_through_the_layers_is_told_with_its_factor():
    """Norm of the gradient times norm of the weights, over ln C: 0.7 15 8 / 2.30 at the second layer."""
    (alert,) = check(ExplodingGradientRule(), graded(TANH, total=15.0, weights=8.0))
    assert (alert.rule, alert.severity, alert.cause) == ("exploding_gradient", "warning", "initialisation")
    assert alert.value == pytest.approx(0.7 * 15 * 8 / math.log(10))
    assert alert.evidence["contrast"] == pytest.approx(70)
    assert "the gradient of conv1 is 70 times that of conv7" in alert.message
    assert f"{70 ** (1 / 6):.2g} times a layer" in alert.advice


def test_size_and_contrast_are_both_needed():
    """Large all over is no contrast; a contrast among small ones is a vanishing gradient or nothing."""
    assert check(ExplodingGradientRule(), graded(EVEN, total=500.0, weights=8.0)) == []
    assert check(ExplodingGradientRule(), graded(TANH, total=0.5, weights=8.0)) == []
    assert check(ExplodingGradientRule(), graded(TANH[::-1], total=0.5, weights=2.0)) == []


def test_gradient_that_grows_through_time_is_told_with_the_norm_to_clip_to():
    """The newest three against the median before."""
    totals = [0.5] * 57 + [60.0, 70.0, 80.0]
    (alert,) = check(ExplodingGradientRule(), graded(EVEN, total=totals))
    assert (alert.severity, alert.cause, alert.value) == ("critical", None, 120.0)
    assert "gradient_clip_val=0.5" in alert.advice
    assert check(ExplodingGradientRule(), graded(EVEN, total=[0.5] * 57 + [60.0, 0.5, 80.0])) == []
    assert check(ExplodingGradientRule(), graded(EVEN, total=[0.5] * 5 + [80.0] * 3)) == []


def test_healthy_and_empty_runs_are_silent():
    """And one that learns, however large its gradients: near a small loss all are large for it."""
    assert check(ExplodingGradientRule(), healthy()) == []
    assert check(ExplodingGradientRule(), History()) == []
    assert check(ExplodingGradientRule(), graded(TANH, total=15.0, losses=falling(1200), weights=8.0)) == []


def test_fine_tuned_network_is_measured_by_ln_c_and_not_by_its_low_first_loss():
    """Its loss stands still too, at 0.05."""
    assert check(ExplodingGradientRule(), graded(TANH, losses=[0.05] * 1200, total=0.5, weights=8.0)) == []


def test_layers_are_not_compared_before_sixty_steps():
    """A loss that stands still for a moment is normal."""
    assert check(ExplodingGradientRule(), graded(TANH, losses=[2.3] * 59, total=15.0, weights=8.0, probes=50)) == []


def test_weights_that_were_not_measured_leave_the_sensitivity_unknown():
    """Nothing is made up."""
    history = graded(TANH, total=15.0, weights=8.0)
    for key in [key for key in history.series if key[0] == "update_ratio"]:
        del history.series[key]
    assert check(ExplodingGradientRule(), history) == []


@given(st.floats(1e-6, 1e6).filter(lambda scale: scale != 1))
def test_scale_of_the_loss_does_not_matter(scale):
    """Without a cross-entropy, since ln C has a scale."""
    assert len(check(ExplodingGradientRule(), graded(TANH, total=15.0, weights=8.0, scale=scale))) == 1
    assert check(ExplodingGradientRule(), graded(EVEN, total=15.0, weights=8.0, scale=scale)) == []


@given(st.floats(1e-3, 1e3))
def test_scale_of_a_layer_against_its_gradient_does_not_matter(scale):
    """Twice the weights with half the gradient are the same network, when the output behind is halved."""
    history = graded([share / scale for share in TANH], total=15.0, weights=8.0 * scale)
    assert [round(alert.value, 6) for alert in check(ExplodingGradientRule(), history)] == [round(84 / math.log(10), 6)]


def test_other_causes_go_first():
    """A bad start, a rate that is too high, dead filters, a loss that is no number."""
    large = {"total": 15.0, "weights": 8.0}
    assert check(ExplodingGradientRule(), graded(TANH, losses=[40.0, *[2.3] * 600], **large)) == []
    assert check(ExplodingGradientRule(), jumped(graded(TANH, **large))) == []
    dead = graded(TANH, **large)
    write(dead, "dead_fraction", [0.0, 0.6], layer="conv3", every=500)
    assert check(ExplodingGradientRule(), dead) == []
    broken = graded(TANH, **large)
    write(broken, "loss", [math.nan], start=1200)
    assert check(ExplodingGradientRule(), broken) == []


def test_alert_that_is_up_is_held_a_little_longer():
    """At eight tenths of the thresholds."""
    wavering = graded(TANH, total=3.7, weights=8.0)
    assert check(ExplodingGradientRule(), wavering) == []
    assert len(check(ExplodingGradientRule(), wavering, [KEY])) == 1


def test_book_raises_at_the_second_look_and_clears_when_the_network_learns():
    """The book asks twice before it believes."""
    book, history, changed = AlertBook([ExplodingGradientRule()]), graded(TANH, total=15.0, weights=8.0), []
    for look in range(6):
        write(history, "loss", [2.3 if look < 3 else 1.0] * 50, start=1200 + 50 * look)
        changed.append([alert.status for alert in book.update(history)])
    assert changed == [[], ["raised"], [], [], ["cleared"], []]


@pytest.mark.parametrize(
    "argument", ["sensitivity", "contrast", "growth", "checks", "loss", "min_steps", "probes", "dead"]
)
def test_thresholds_are_checked(argument):
    """By name."""
    with pytest.raises(ArgumentError, match=argument):
        ExplodingGradientRule(**{argument: -1})
