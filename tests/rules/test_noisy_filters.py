import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import History, NoisyFiltersRule
from tests.rules.writing import check, healthy, write


def smoothness(values, *, steps=600, movement=0.3, layer="conv1"):
    history = write(History(), "filter_smoothness", values, layer=layer, every=300)
    write(history, "filter_movement", [0.0, movement], layer=layer, every=300)
    history.step = steps
    return history


def test_healthy_and_empty_runs_are_silent():
    assert check(NoisyFiltersRule(), healthy()) == []
    assert check(NoisyFiltersRule(), History()) == []


def test_filters_that_stay_rough_are_information():
    (alert,) = check(NoisyFiltersRule(), smoothness([-0.02, -0.01]))
    assert (alert.severity, alert.layer, alert.cause) == ("info", "conv1", None)
    assert alert.value == pytest.approx(0.01)


def test_filters_that_did_not_move_are_said_to():
    (alert,) = check(NoisyFiltersRule(), smoothness([-0.02, -0.02], movement=0.003))
    assert alert.cause == "the layer hardly moved"
    assert "0.3%" in alert.advice


def test_a_pretrained_layer_that_was_smooth_before_is_silent():
    assert check(NoisyFiltersRule(), smoothness([0.4, 0.4])) == []


@pytest.mark.parametrize(
    "history", [smoothness([-0.02, -0.01], steps=200), smoothness([-0.02]), smoothness([math.nan, math.nan])]
)
def test_it_is_silent_early_and_without_data(history):
    assert check(NoisyFiltersRule(), history) == []


def test_where_the_loss_is_low_noise_does_no_harm():
    history = smoothness([-0.02, -0.01])
    write(history, "loss", [2.3, 2.0])
    assert len(check(NoisyFiltersRule(), history)) == 1
    write(history, "loss", [0.1] * 10, start=2)
    assert check(NoisyFiltersRule(), history) == []


def test_only_the_first_layer_with_a_smoothness_is_looked_at():
    history = smoothness([math.nan, math.nan], layer="stem")
    write(history, "filter_smoothness", [-0.02, 0.2], layer="conv1", every=300)
    write(history, "filter_smoothness", [-0.02, -0.02], layer="conv2", every=300)
    assert check(NoisyFiltersRule(), history) == []


def test_it_clears_only_well_above_the_threshold():
    wavering = smoothness([-0.02, 0.005])
    assert check(NoisyFiltersRule(), wavering) == []
    assert len(check(NoisyFiltersRule(), wavering, [("noisy_filters", "conv1")])) == 1


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`gain`"):
        NoisyFiltersRule(gain=-1)
