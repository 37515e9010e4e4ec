"""The rule on gradients that do not reach the far layers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, History, VanishingGradientRule
from tests.rules.gradients import graded, jumped
from tests.rules.writing import check, falling, healthy, write

KEY = ("vanishing_gradient", None)
SIGMOID = [1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 0.1, 0.99]
EVEN = [0.2, 0.4, 0.5, 0.4, 0.3, 0.3, 0.4]


def test_shares_that_fall_from_layer_to_layer_are_told_with_their_factor():
    """Seven layers: the second smallest share counts."""
    (alert,) = check(VanishingGradientRule(), graded(SIGMOID))
    assert (alert.rule, alert.severity, alert.layer) == ("vanishing_gradient", "warning", None)
    assert alert.cause == "depth or saturating activations"
    assert alert.value == pytest.approx(1e-6)
    assert alert.evidence["factor_per_layer"] == pytest.approx((0.99 / 1e-7) ** (1 / 6))
    assert alert.message.startswith("4 of 7 layers")
    assert "conv0 gets 1.0e-07" in alert.message


def test_small_gradients_everywhere_come_from_the_initialisation():
    """All of the gradient is left to the last bias, which is no layer's weight."""
    (alert,) = check(VanishingGradientRule(), graded([1e-5] * 5 + [5e-4]))
    assert alert.cause == "initialisation"
    assert alert.alternatives[0] == "depth or saturating activations"


def test_silent_where_the_gradient_gets_through():
    """Even shares; one small layer among many; two layers; nothing measured."""
    assert check(VanishingGradientRule(), graded(EVEN)) == []
    assert check(VanishingGradientRule(), graded([1e-5, *EVEN])) == []
    assert check(VanishingGradientRule(), graded([1e-5, 0.9])) == []
    assert check(VanishingGradientRule(), healthy()) == []
    assert check(VanishingGradientRule(), History()) == []


def test_network_that_learns_all_the_same_is_well():
    """And so is one whose loss is near zero."""
    assert check(VanishingGradientRule(), graded(SIGMOID, losses=falling(1200, end=1.5))) == []
    assert check(VanishingGradientRule(), graded(SIGMOID, losses=falling(1200))) == []


def test_nothing_is_said_before_a_hundred_steps():
    """A loss that stands still for a moment is normal."""
    assert check(VanishingGradientRule(), graded(SIGMOID, losses=[2.3] * 99, probes=50)) == []
    assert len(check(VanishingGradientRule(), graded(SIGMOID, losses=[2.3] * 100, probes=50))) == 1


def test_frozen_layers_and_exact_zeros_are_left_out():
    """The first are meant; the others are for `untrained_layer`."""
    assert check(VanishingGradientRule(), graded([0.0, 0.0, 0.0, *EVEN])) == []
    frozen = graded([1e-6, 1e-6, 1e-6, *EVEN])
    assert len(check(VanishingGradientRule(), frozen)) == 1
    for number in range(3):
        frozen.note("trainable", 0, layer=f"conv{number}")
    assert check(VanishingGradientRule(), frozen) == []


def test_only_the_newest_probes_count():
    """Ten of them."""
    history = graded(SIGMOID, probes=50)
    for number in range(10):
        history.record("gradient_norm", 0.5, step=99 + 100 * number)
        for layer, share in enumerate(EVEN):
            history.record("gradient_norm", 0.5 * share, step=99 + 100 * number, layer=f"conv{layer}")
    assert check(VanishingGradientRule(), history) == []


@given(st.floats(1e-6, 1e6).filter(lambda scale: scale != 1))
def test_scale_of_the_loss_does_not_matter(scale):
    """Without a cross-entropy, since ln C has a scale."""
    assert len(check(VanishingGradientRule(), graded(SIGMOID, scale=scale))) == 1
    assert check(VanishingGradientRule(), graded(EVEN, scale=scale)) == []


def test_other_causes_go_first():
    """Dead filters, a rate that is too high, a bad start, a loss that is no number."""
    dead = graded(SIGMOID)
    write(dead, "dead_fraction", [0.0, 0.6], layer="conv3", every=500)
    assert check(VanishingGradientRule(), dead) == []
    assert check(VanishingGradientRule(), jumped(graded(SIGMOID))) == []
    assert check(VanishingGradientRule(), graded(SIGMOID, losses=[40.0, *[2.3] * 600])) == []
    broken = graded(SIGMOID)
    write(broken, "loss", [math.nan], start=1200)
    assert check(VanishingGradientRule(), broken) == []


def test_alert_that_is_up_is_held_a_little_longer():
    """At eight tenths of the thresholds."""
    wavering = graded([1.1e-3] * 4 + EVEN)
    assert check(VanishingGradientRule(), wavering) == []
    assert len(check(VanishingGradientRule(), wavering, [KEY])) == 1
    falls = graded(SIGMOID, losses=[2.3] * 600 + [1.9] * 600)
    assert check(VanishingGradientRule(), falls) == []
    assert len(check(VanishingGradientRule(), falls, [KEY])) == 1


def test_book_raises_at_the_second_look_and_clears_when_the_network_learns():
    """The book asks twice before it believes."""
    book, history, changed = AlertBook([VanishingGradientRule()]), graded(SIGMOID), []
    for look in range(6):
        write(history, "loss", [2.3 if look < 3 else 1.0] * 50, start=1200 + 50 * look)
        changed.append([alert.status for alert in book.update(history)])
    assert changed == [[], ["raised"], [], [], ["cleared"], []]


@pytest.mark.parametrize("argument", ["share", "loss", "min_steps", "probes", "min_layers", "dead"])
def test_thresholds_are_checked(argument):
    """By name."""
    with pytest.raises(ArgumentError, match=argument):
        VanishingGradientRule(**{argument: -1})
