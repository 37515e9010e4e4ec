import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import History, UntrainedLayerRule
from tests.rules.writing import check, healthy, write


def probed(updates, *, rate=0.1, held=1.0, gradient=0.0, trainable=1.0):
    """`updates`: layer to its norms at the probed steps."""
    history = History()
    for layer, norms in updates.items():
        write(history, "update_norm", norms, layer=layer)
        write(history, "gradient_norm", [gradient] * len(norms), layer=layer)
        history.note("trainable", trainable, layer=layer)
        history.note("in_optimizer", held, layer=layer)
    return write(history, "learning_rate", [rate] * max(len(norms) for norms in updates.values()))


def test_healthy_and_empty_runs_are_silent():
    assert check(UntrainedLayerRule(), healthy()) == []
    assert check(UntrainedLayerRule(), History()) == []


def test_a_layer_that_never_moves_is_a_warning():
    (alert,) = check(UntrainedLayerRule(), probed({"conv1": [0.0] * 5, "conv2": [0.1] * 5}))
    assert (alert.layer, alert.severity, alert.value) == ("conv1", "warning", 0.0)
    assert alert.cause == "no gradient reaches it"


def test_a_layer_in_no_optimizer_is_named_so():
    history = probed({"conv1": [0.0] * 5, "conv2": [0.1] * 5}, gradient=1.0)
    history.note("in_optimizer", 0, layer="conv1")
    (alert,) = check(UntrainedLayerRule(), history)
    assert (alert.cause, alert.evidence["in_optimizer"]) == ("in no optimizer", 0.0)


def test_a_gradient_without_an_update_means_a_rate_of_zero():
    (alert,) = check(UntrainedLayerRule(), probed({"conv1": [0.0] * 5, "conv2": [0.1] * 5}, gradient=1.0))
    assert alert.cause == "learning rate 0"


def test_a_tiny_update_is_an_update():
    assert check(UntrainedLayerRule(), probed({"conv1": [0.0] * 9 + [1e-30], "conv2": [0.1] * 10})) == []


def test_a_few_probes_are_needed():
    assert check(UntrainedLayerRule(), probed({"conv1": [0.0] * 4, "conv2": [0.1] * 4})) == []


def test_steps_at_which_nothing_moved_do_not_count():
    """A warm-up from rate 0, or steps that the gradient scaler skipped."""
    assert check(UntrainedLayerRule(), probed({"conv1": [0.0] * 9, "conv2": [0.0] * 5 + [0.1] * 4})) == []
    assert check(UntrainedLayerRule(), probed({"conv1": [0.0] * 50, "conv2": [0.0] * 50}, rate=0.0)) == []
    assert check(UntrainedLayerRule(), probed({"conv1": [0.0] * 10, "conv2": [0.0] * 10})) == []


def test_a_network_that_never_moves_gets_one_warning():
    (alert,) = check(UntrainedLayerRule(), probed({"conv1": [0.0] * 20, "conv2": [0.0] * 20}, held=0.0))
    assert (alert.layer, alert.severity, alert.cause) == (None, "warning", "in no optimizer")


def test_frozen_layers_are_information_even_without_probes():
    history = probed({"conv1": [0.0] * 9, "conv2": [0.1] * 9})
    history.note("trainable", 0, layer="conv1")
    history.note("trainable", 0, layer="norm")
    assert [(alert.layer, alert.severity) for alert in check(UntrainedLayerRule(), history)] == [
        ("conv1", "info"),
        ("norm", "info"),
    ]


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`min_probes`"):
        UntrainedLayerRule(min_probes=0)
