import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import (
    DeadFiltersRule,
    DormantUnitsRule,
    History,
    LearningRateTooHighRule,
    LearningRateTooLowRule,
    UndertrainedRule,
    VanishingGradientRule,
    WeightDecayTooHighRule,
)
from tests.rules.gradients import graded
from tests.rules.writing import check, falling, healthy, run_of, write

GUESS = math.log(10)
RULE = WeightDecayTooHighRule()


def withering(left, *, steps=100, planned=200, loss=GUESS, grown=1.0, layers=3):
    """A run whose weights shrink evenly to a part of their first norm, after they had grown by a factor."""
    history = run_of([max(loss, GUESS)] + [loss] * (steps - 1), planned=planned)
    wither(history, left, steps=steps, grown=grown, layers=layers)
    return history


def wither(history, left, *, steps, grown=1.0, layers):
    """Writes down the norms of the weights."""
    for i in range(layers):
        norms = [2.0 * left ** (step / (steps - 1)) for step in range(0, steps, 9)]
        norms[1] *= grown
        write(history, "weight_norm", norms, layer=f"conv{i}", every=9)
        history.note("in_optimizer", 1, layer=f"conv{i}")


def with_marks_of_other_rules(history):
    """Filters died, steps were short, and next to no gradient came through, as in a run that is eaten up."""
    for i in range(3):
        for quantity in ("dead_fraction", "dormant_fraction"):
            write(history, quantity, [0.0, 0.6, 0.6], layer=f"conv{i}", every=40)
        history.note("num_filters", 32, layer=f"conv{i}")
    write(history, "step_ratio", [0.999] * 12, every=9)
    write(history, "learning_rate", [0.1] * 12, every=9)
    return history


def test_healthy_and_empty_runs_are_silent():
    assert check(RULE, healthy()) == check(RULE, History()) == []


@pytest.mark.parametrize(("left", "severity"), [(0.31, None), (0.29, "warning"), (0.11, "warning"), (0.09, "critical")])
def test_severity_goes_by_what_is_left(left, severity):
    assert [alert.severity for alert in check(RULE, withering(left))] == ([severity] if severity else [])


@pytest.mark.parametrize(
    "history",
    [
        withering(0.05, loss=0.85 * GUESS),  # it learns all the same
        withering(0.05, grown=3.0),  # something else came first
        run_of([GUESS] * 100),  # nothing known of the weights
    ],
)
def test_what_speaks_against_decay_silences_it(history):
    assert check(RULE, history) == []


def test_most_layers_count_and_only_those_of_an_optimizer():
    history = withering(0.05, layers=3)
    history.record("weight_norm", 2.0, step=99, layer="conv0")
    assert len(check(RULE, history)) == 1
    history.record("weight_norm", 2.0, step=99, layer="conv1")
    assert check(RULE, history) == []
    for layer in ("conv0", "conv1"):
        history.note("in_optimizer", 0, layer=layer)
    assert len(check(RULE, history)) == 1


def test_a_weight_that_began_at_zero_is_left_out():
    history = withering(0.05)
    write(history, "weight_norm", [0.0, 0.1, 0.2], layer="head", every=40)
    (alert,) = check(RULE, history)
    assert alert.value == pytest.approx(0.05)


@pytest.mark.parametrize(("planned", "factor"), [(100, 0.1), (300, 0.3 / (3 * math.log(20))), (100_000, 0.01)])
def test_the_advice_lets_a_quarter_of_the_norm_go_over_the_whole_run(planned, factor):
    history = withering(0.05, planned=planned)
    history.note("weight_decay", 0.5)
    (alert,) = check(RULE, history)
    assert alert.evidence["advised_decay_factor"] == pytest.approx(factor)
    assert alert.advice == f"Lower the weight decay from 0.5 to about {0.5 * factor:.1g}."


@pytest.mark.parametrize("decay", [0.0, math.nan])
def test_where_the_optimizer_names_no_decay_the_loss_may_hold_a_penalty(decay):
    history = withering(0.05)
    history.note("weight_decay", decay)
    (alert,) = check(RULE, history)
    assert alert.cause == "weight decay"
    assert alert.advice == "Divide the weight decay, or the penalty on the weights in the loss, by about 20."


def test_without_a_cross_entropy_the_first_loss_stands_for_it_if_there_is_decay():
    """A critic whose weights are clipped has no decay, and its loss says nothing."""
    history = withering(0.05, loss=7.0)
    del history.facts["num_classes", None]
    assert check(RULE, history) == []
    history.note("weight_decay", 0.1)
    (alert,) = check(RULE, history)
    assert alert.evidence["reference_loss"] == 7.0


@pytest.mark.parametrize("loss", [0.01, 0.9 * GUESS])
def test_a_trained_network_that_goes_on_is_measured_by_a_guess(loss):
    """Its first loss is next to nothing, and any loss is above that."""
    history = run_of([0.001] + [loss] * 99, planned=200)
    wither(history, 0.05, steps=100, layers=3)
    assert check(RULE, history) == []


def test_a_network_that_had_learned_before_was_broken_by_something_else():
    history = run_of([*falling(300), *[GUESS] * 300], planned=600)
    wither(history, 0.05, steps=600, layers=3)
    assert check(RULE, history) == []
    assert [alert.cause for alert in check(LearningRateTooHighRule(), history)] == ["learning rate"]


def test_it_clears_later_than_it_fires():
    key = {(RULE.name, None): "warning"}
    for history in (withering(0.35), withering(0.05, loss=0.75 * GUESS)):
        assert check(RULE, history) == []
        assert len(check(RULE, history, key)) == 1
    assert check(RULE, withering(0.4), key) == check(RULE, withering(0.05, loss=0.7 * GUESS), key) == []


def test_rules_that_mistook_it_are_silent_and_dead_filters_names_it():
    """The same marks without the withering are told by each of them: the negative control."""
    eaten, other = with_marks_of_other_rules(withering(0.05)), with_marks_of_other_rules(withering(0.9))
    assert check(LearningRateTooHighRule(), eaten) == []
    assert [alert.severity for alert in check(LearningRateTooHighRule(), other)] == ["critical"]
    for rule in (DeadFiltersRule(), DormantUnitsRule()):
        alerts = check(rule, eaten)
        assert {(alert.cause, "weight_decay_too_high" in alert.advice) for alert in alerts} == {("weight decay", True)}
    assert {alert.cause for alert in check(DeadFiltersRule(), other)} == {None}


def test_short_steps_and_a_loss_that_never_left_its_level_are_not_told_either():
    for rule in (LearningRateTooLowRule(), UndertrainedRule()):
        for left, count in ((0.9, 1), (0.05, 0)):
            history = withering(left, steps=400, planned=400)
            write(history, "step_ratio", [0.999] * 40, every=10)
            write(history, "learning_rate", [1e-3] * 40, every=10)
            history.finished = True
            assert len(check(rule, history)) == count, (rule, left)


def test_vanishing_gradients_are_not_told_either():
    for left, count in ((0.9, 1), (0.05, 0)):
        history = graded([1e-6, 1e-5, 1e-3, 0.1])
        wither(history, left, steps=1200, layers=4)
        assert len(check(VanishingGradientRule(), history)) == count


@pytest.mark.parametrize("arguments", [{"shrunk": 1.1}, {"critical": 0.4}, {"loss": -1.0}])
def test_wrong_thresholds_are_refused(arguments):
    with pytest.raises(ArgumentError):
        WeightDecayTooHighRule(**arguments)
