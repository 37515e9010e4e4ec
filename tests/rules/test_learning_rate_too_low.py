import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import History, LearningRateTooLowRule
from tests.rules.writing import check, healthy, run_of, write


def slow(steps=600, *, ratio=0.995, loss=2.2, rates=None, classes=10):
    """A run that hardly moves, probed every 20 steps."""
    history = run_of([2.3] + [loss] * (steps - 1), classes=classes)
    write(history, "step_ratio", [ratio] * (steps // 20), every=20)
    return write(history, "learning_rate", rates or [1e-5] * (steps // 20), every=20)


def test_healthy_and_empty_runs_are_silent():
    assert check(LearningRateTooLowRule(), healthy()) == []
    assert check(LearningRateTooLowRule(), History()) == []


def test_short_steps_at_a_high_loss_fire_with_a_factor():
    (alert,) = check(LearningRateTooLowRule(), slow())
    assert (alert.severity, alert.value) == ("warning", 0.995)
    assert "about 10 times" in alert.advice  # 1 / (2 * 0.005) = 100, at most 10


def test_the_factor_follows_the_ratio():
    (alert,) = check(LearningRateTooLowRule(ratio=0.9), slow(ratio=0.92))
    assert "about 6 times" in alert.advice  # 1 / (2 * 0.08) = 6.25


@pytest.mark.parametrize("history", [slow(ratio=0.84), slow(loss=0.1), slow(steps=160)], ids=["long", "low", "early"])
def test_it_is_silent_where_steps_are_long_the_loss_is_low_or_it_is_early(history):
    assert check(LearningRateTooLowRule(), history) == []


@pytest.mark.parametrize(
    ("part", "ratio", "fires"),
    [
        (0.31, 0.91, False),
        (0.31, 0.93, True),
        (0.4, 0.88, False),
        (0.4, 0.89, True),
        (0.9, 0.84, False),
        (0.9, 0.86, True),
    ],
)
def test_the_ratio_must_prove_less_the_further_the_loss_is_from_its_floor(part, ratio, fires):
    """0.92 at 0.3 of ln C, 0.885 half-way, 0.85 from 0.5 on."""
    history = slow(ratio=ratio, loss=part * 2.3)
    assert bool(check(LearningRateTooLowRule(), history)) is fires


def test_a_blow_up_explains_small_steps():
    history = slow()
    history.series["loss", None].points[3] = history.series["loss", None].points[3]._replace(value=4.0)
    assert check(LearningRateTooLowRule(), history) == []


def test_deaths_explain_small_steps():
    history = write(slow(), "dead_fraction", [0.0, 0.3], layer="conv1", every=300)
    assert check(LearningRateTooLowRule(), history) == []
    history.note("num_filters", 10, layer="conv1")
    history.note("pruned_dead", 3, layer="conv1")  # on purpose
    assert len(check(LearningRateTooLowRule(), history)) == 1


def test_a_bad_start_explains_small_steps():
    history = slow()
    history.series["loss", None].points[0] = history.series["loss", None].points[0]._replace(value=40.0)
    assert check(LearningRateTooLowRule(), history) == []


def test_the_slow_end_of_a_decay_is_not_counted():
    """Half of the probes are short only because the schedule made them so."""
    rates = [0.1 * (1 + math.cos(math.pi * i / 30)) / 2 for i in range(30)]
    history = run_of([2.3] + [0.6] * 599)
    write(history, "learning_rate", rates, every=20)
    write(history, "step_ratio", [0.8 if rate >= 0.05 else 0.999 for rate in rates], every=20)
    assert check(LearningRateTooLowRule(), history) == []


def test_a_warm_up_that_still_rises_is_not_judged():
    rising = slow(rates=[1e-5 * (i + 1) for i in range(30)])
    assert check(LearningRateTooLowRule(), rising) == []
    over = slow(steps=2000, rates=[1e-5 * min(i + 1, 10) for i in range(100)])
    assert len(check(LearningRateTooLowRule(), over)) == 1


def test_without_a_cross_entropy_the_first_loss_is_the_measure():
    assert len(check(LearningRateTooLowRule(), slow(classes=None))) == 1
    assert check(LearningRateTooLowRule(), slow(loss=0.2, classes=None)) == []


def test_without_a_step_ratio_the_update_ratio_is_a_weaker_sign():
    def tiny(loss):
        history = run_of([2.3] + [loss] * 599)
        write(history, "learning_rate", [1e-5] * 30, every=20)
        return write(history, "update_ratio", [1e-6] * 30, layer="conv1", every=20)

    (alert,) = check(LearningRateTooLowRule(), tiny(2.25))
    assert (alert.severity, alert.evidence["same_batch"]) == ("warning", 0)
    assert "not recognised" in alert.message
    assert check(LearningRateTooLowRule(), tiny(1.5))[0].severity == "info"
    assert check(LearningRateTooLowRule(), tiny(1.0)) == []


def test_it_clears_only_well_below_the_threshold():
    wavering = slow(ratio=0.965)
    rule = LearningRateTooLowRule(ratio=0.97, far_ratio=0.97)
    assert check(rule, wavering) == []
    assert len(check(rule, wavering, {("learning_rate_too_low", None): "warning"})) == 1


def test_nothing_is_said_before_three_quarters_of_the_plan():
    """Many good runs begin with short steps."""
    early, late = slow(740), slow(750)
    for history in (early, late):
        history.note("planned_steps", 1000)
    assert check(LearningRateTooLowRule(), early) == []
    assert len(check(LearningRateTooLowRule(), late)) == 1


def test_a_loss_that_will_have_fallen_by_the_end_is_fine():
    """At three quarters it is at 0.29 of a guess, and heading for nearly nothing."""
    history = slow(750)
    for i, point in enumerate(history.series["loss", None].points):
        history.series["loss", None].points[i] = point._replace(value=2.3 * (1 - 0.95 * (point.step / 1000)))
    history.note("planned_steps", 1000)
    assert len(check(LearningRateTooLowRule(loss=0.25), history)) == 0
    assert len(check(LearningRateTooLowRule(loss=0.01), history)) == 1


def test_a_gradient_that_vanishes_or_labels_without_images_explain_it():
    """Then these rules speak."""
    history = slow(classes=10)
    write(history, "label_recognition", [0.1] * 6, start=99, every=100)
    write(history, "suspect_label_share", [0.2] * 6, start=99, every=100)
    assert check(LearningRateTooLowRule(), history) == []


def test_few_probes_are_not_enough():
    history = run_of([2.3] * 600)
    write(history, "step_ratio", [0.999] * 2, start=300, every=100)
    assert check(LearningRateTooLowRule(), history) == []


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`ratio`"):
        LearningRateTooLowRule(ratio=97)


@pytest.mark.parametrize(("loss", "fires"), [(0.2, False), (0.22, True)])
def test_a_trained_network_that_goes_on_near_zero_is_left_alone(loss, fires):
    """It began at 0.25; ln 10 / 11 is 0.209, and no rate can gain more than that."""
    history = run_of([0.25] + [loss] * 599)
    write(history, "step_ratio", [0.995] * 30, every=20)
    write(history, "learning_rate", [1e-5] * 30, every=20)
    assert bool(check(LearningRateTooLowRule(), history)) is fires


def test_targets_that_are_shared_between_classes_make_it_information():
    """Mixed images: some 0.4 of the loss always remain, and six times the rate changed nothing."""
    history = slow(loss=1.05, ratio=0.95, classes=None)
    assert check(LearningRateTooLowRule(), history)[0].severity == "warning"
    history.note("soft_targets", 1.0)
    (alert,) = check(LearningRateTooLowRule(), history)
    assert alert.severity == "info"
    assert "always remains" in alert.alternatives[0]
    assert "targets: raise the learning rate by about 10 times" in alert.advice


def test_a_softmax_before_the_cross_entropy_is_the_cause_and_no_rate_is_advised():
    """The floor of ten classes is ln(e + 9) - 1 = 1.461."""
    history = slow(loss=1.47, ratio=0.95)
    history.note("scores_normalised", 0.0)
    assert check(LearningRateTooLowRule(), history)[0].cause == "learning rate too low"
    history.note("scores_normalised", 1.0)
    (alert,) = check(LearningRateTooLowRule(), history)
    assert (alert.severity, alert.cause) == ("warning", "softmax before the cross-entropy")
    assert alert.alternatives[0] == "learning rate too low"
    assert "advised_rate_factor" not in alert.evidence
    assert "Raise" not in alert.advice
