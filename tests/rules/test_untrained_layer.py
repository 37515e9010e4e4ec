import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, History, UntrainedLayerRule
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


@pytest.mark.parametrize(("share", "cause"), [(1.0, "dead filters"), (0.9, "no gradient reaches it")])
def test_a_layer_before_one_that_is_dead_is_not_detached(share, cause):
    """No gradient passes a layer in which no filter fires; a tenth of one is enough."""
    history = probed({"conv1": [0.0] * 5, "conv2": [0.1] * 5})
    write(history, "dead_fraction", [share], layer="conv2")
    (alert,) = check(UntrainedLayerRule(), history)
    assert alert.cause == cause
    assert ("conv2" in alert.advice) is (share == 1)
    assert ("detach" in alert.advice) is (share < 1)


@pytest.mark.parametrize(
    ("still", "gradient", "cause"),
    [("conv1", 1.0, "learning rate 0"), ("conv1", 0.0, "no gradient reaches it"), (None, 0.0, None)],
)
def test_a_normalisation_has_the_cause_of_its_neighbours(still, gradient, cause):
    """Gradients are measured of weights with two axes or more."""
    history = probed({"fc": [0.1] * 5} | ({still: [0.0] * 5} if still else {}), gradient=gradient)
    write(history, "update_norm", [0.0] * 5, layer="norm")
    history.note("trainable", 1.0, layer="norm")
    history.note("in_optimizer", 1.0, layer="norm")
    found = {alert.layer: alert for alert in check(UntrainedLayerRule(), history)}
    assert {alert.cause for alert in found.values()} == {cause}
    assert len(found) == 1 + bool(still)


def test_a_layer_in_no_optimizer_is_named_so():
    history = probed({"conv1": [0.0] * 5, "conv2": [0.1] * 5}, gradient=1.0)
    history.note("in_optimizer", 0, layer="conv1")
    (alert,) = check(UntrainedLayerRule(), history)
    assert (alert.cause, alert.evidence["in_optimizer"]) == ("in no optimizer", 0.0)
    assert "requires_grad_(False)" in alert.advice
    assert "teacher" in alert.alternatives[0]


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


def frozen(*names):
    history = probed({"head": [0.1] * 9})
    for name in names:
        history.note("trainable", 0, layer=name)
    return history


def thaw(history, *names):
    for name in names:
        history.note("trainable", 1, layer=name)
    return history


def told(alerts):
    return [(alert.status, alert.layer) for alert in alerts]


def test_a_frozen_backbone_is_one_alert_raised_once_and_cleared_once():
    """With each layer in its evidence, some in its message; also where the layers thaw one by one."""
    book, names = AlertBook([UntrainedLayerRule()]), [f"backbone.{i}" for i in range(40)]
    history = frozen(*names)
    (alert,) = book.update(history)
    assert (alert.status, alert.layer, alert.severity, alert.evidence["layers"]) == ("raised", None, "info", 40)
    assert [name for name in names if f"trainable_{name}" in alert.evidence] == names
    assert "40 layers are frozen" in alert.message
    assert "backbone.7 and 32 more" in alert.message
    assert book.update(history) == []
    assert book.update(thaw(history, *names[1:])) == []
    assert told(book.update(thaw(history, names[0]))) == [("cleared", None)]
    assert book.active == []


def test_a_single_frozen_layer_keeps_its_name_also_when_others_follow():
    book, history = AlertBook([UntrainedLayerRule()]), frozen("conv1")
    assert told(book.update(history)) == [("raised", "conv1")]
    history.note("trainable", 0, layer="conv2")
    assert told(book.update(history)) == [("raised", "conv2")]


def test_muted_layers_are_not_among_those_that_are_told_together():
    book = AlertBook([UntrainedLayerRule()], mute=["untrained_layer:a.*"])
    (alert,) = book.update(frozen("a.0", "a.1", "b.0", "b.1"))
    assert alert.evidence == {"layers": 2.0, "trainable_b.0": 0.0, "trainable_b.1": 0.0}
    assert AlertBook([UntrainedLayerRule()], mute=["untrained_layer:a.*"]).update(frozen("a.0", "a.1")) == []


def test_a_run_that_was_told_of_each_layer_is_told_nothing_anew_after_a_resume():
    """As alerts were before they were put together: no clearing of what still holds."""
    history, old = frozen("a", "b"), AlertBook([UntrainedLayerRule()])
    old._active = {each.key: each for each in check(UntrainedLayerRule(), history)}
    book = AlertBook([UntrainedLayerRule()])
    book.load_state_dict(old.state_dict())
    assert book.update(history) == []
    assert told(book.update(thaw(history, "a", "b"))) == [("cleared", "a"), ("cleared", "b")]


def test_a_network_that_never_moves_is_told_before_its_frozen_layers():
    """One alert of the whole run: the worse one, and the other when that is over."""
    history = frozen("a", "b")
    book, still = AlertBook([UntrainedLayerRule()]), probed({"head": [0.0] * 20})
    for name in ("a", "b"):
        still.note("trainable", 0, layer=name)
    assert [alert.severity for alert in book.update(still)] == ["warning"]
    assert [alert.severity for alert in book.update(history)] == ["info"]


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`min_probes`"):
        UntrainedLayerRule(min_probes=0)
