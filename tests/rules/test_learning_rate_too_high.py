import math

import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import History, LearningRateTooHighRule
from tests.rules.writing import check, falling, healthy, run_of, write

KEY = ("learning_rate_too_high", None)


def jumped(losses, *, factor=5.0, classes=10, finished=False, at=2):
    """A run whose batch at step `at` got worse by its own update."""
    history = run_of(losses, classes=classes, finished=finished)
    before = [2.3] * 20
    after = [2.2] * 20
    after[at] = 2.3 * factor
    write(history, "loss_before", before)
    write(history, "loss_after", after)
    write(history, "step_ratio", [0.9] * at + [-9.0] + [0.9] * (19 - at))
    return write(history, "learning_rate", [0.1] * 20)


def test_healthy_and_empty_runs_are_silent():
    assert check(LearningRateTooHighRule(), healthy()) == []
    assert check(LearningRateTooHighRule(), History()) == []


def test_a_jump_that_is_not_recovered_from_is_critical_at_step_60():
    assert check(LearningRateTooHighRule(), jumped([2.3] * 59)) == []
    (alert,) = check(LearningRateTooHighRule(), jumped([2.3] * 60))
    assert (alert.severity, alert.cause) == ("critical", "learning rate")
    assert (alert.value, alert.evidence["jump_step"], alert.evidence["same_batch"]) == (pytest.approx(5.0), 2, 1)
    assert "about 20" in alert.advice  # 1 / (2 (1 + 9))
    assert "5.0e-03" in alert.advice


def test_a_jump_that_is_recovered_from_is_a_catapult():
    (alert,) = check(LearningRateTooHighRule(), jumped(falling(200)))
    assert (alert.severity, alert.cause) == ("info", "catapult")


def killing(losses, *, planned=None, finished=False, share=0.4):
    """A run that jumped, and in which filters died."""
    history = jumped(losses, finished=finished)
    history.note("planned_steps", planned or len(losses))
    return write(history, "dead_fraction", [0.05, share], layer="conv2", every=50)


def test_of_filters_that_died_in_a_run_that_recovered_another_rule_speaks():
    (alert,) = check(LearningRateTooHighRule(), killing(falling(200)))
    assert (alert.severity, alert.cause) == ("info", "catapult")
    assert "35% of the filters of conv2" in alert.message


@pytest.mark.parametrize(
    ("part", "steps", "planned", "severity"),
    [
        (0.95, 60, 400, "critical"), (0.7, 99, 400, "info"), (0.7, 100, 400, "warning"), (0.62, 199, 400, "info"),
        (0.62, 200, 400, "warning"), (0.95, 200, 400, "critical"), (0.45, 399, 400, "info"),
    ],
)  # fmt: skip
def test_what_a_loss_means_hangs_on_how_far_the_run_is(part, steps, planned, severity):
    """With a layer killed by a jump: nothing learned by step 60, little by step 100, not much half-way."""
    history = killing([2.3, 2.3, *[part * math.log(10)] * (steps - 2)], planned=planned)
    assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == [severity]


def test_at_the_end_a_loss_that_more_steps_would_bring_down_is_not_blamed_on_the_rate():
    """Flat at 0.45 of a guess: the rate. Falling through it: too few steps."""
    flat = killing([2.3, 2.3, *[0.45 * math.log(10)] * 398], finished=True)
    assert check(LearningRateTooHighRule(), flat)[0].severity == "warning"
    on_its_way = killing([2.3, 2.3, *[2.3 - 1.25 * step / 398 for step in range(398)]], finished=True)
    assert check(LearningRateTooHighRule(), on_its_way)[0].severity == "info"


def test_without_a_death_and_without_a_jump_a_high_loss_is_no_sign():
    assert check(LearningRateTooHighRule(), overshooting([-1.0] * 8 + [0.5] * 12)) == []


def test_deaths_after_a_single_overshoot_are_a_mark_if_nothing_is_learned():
    """Neither a leap nor many overshoots: but a layer died, and the loss is where it began."""
    history = overshooting([0.5] * 19 + [-0.1], dead=0.9, losses=[2.3] * 120)
    assert check(LearningRateTooHighRule(), history)[0].severity == "critical"
    sound = overshooting([0.5] * 20, dead=0.4, losses=[2.3] * 120)
    assert check(LearningRateTooHighRule(), sound) == []


@pytest.mark.parametrize(
    ("share", "part", "steps", "severity"),
    [
        (0.5, 0.95, 100, "critical"), (0.5, 0.6, 100, "warning"), (0.5, 0.95, 99, None), (0.49, 0.95, 100, None),
        (0.5, 0.45, 100, None),
    ],
)  # fmt: skip
def test_most_of_a_layer_dead_is_a_mark_without_any_overshoot(share, part, steps, severity):
    """With dropout the loss of a batch before and after its update can't show one."""
    history = overshooting([0.5] * 20, dead=share, losses=[2.3, *[part * math.log(10)] * (steps - 1)])
    assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == [severity] * (
        severity is not None
    )


def test_a_layer_that_died_of_a_bad_batch_is_not_blamed_on_the_rate():
    """What overshot only after the batch may be its doing; before, it was the rate's."""
    for before, after, expected in ((0.5, 0.5, []), (0.5, -0.1, []), (-0.1, 0.5, ["critical"])):
        history = overshooting([before] + [0.5] * 19, dead=0.9, losses=[*falling(80, tau=15), 60.0, *[2.3] * 60])
        write(history, "loss_peak", [2.3] * 80 + [60.0])
        history.record("step_ratio", after, step=90)
        assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == expected


def test_what_is_said_of_a_layer_that_died_without_an_overshoot():
    (alert,) = check(LearningRateTooHighRule(), overshooting([0.5] * 20, dead=0.6, losses=[2.3] * 120))
    assert (alert.value, alert.threshold, alert.cause) == (0.6, 0.5, "learning rate")
    assert alert.message == (
        "60% of the filters of conv2 died since the start, and the loss is 2.3 where nothing learned means 2.3."
    )
    assert alert.evidence == {
        "loss": 2.3, "reference_loss": 2.3, "dead_gain": 0.6, "overshoot_fraction": 0.0, "advised_rate_factor": 0.1,
    }  # fmt: skip
    assert "Divide the learning rate by about 10" in alert.advice


def test_a_nan_out_of_the_blue_is_not_blamed_on_the_rate_for_a_layer_that_died():
    history = overshooting([0.5] * 20, dead=0.6, losses=[*falling(120), math.nan])
    assert check(LearningRateTooHighRule(), history) == []


def test_most_of_a_layer_dead_says_nothing_while_the_rate_is_still_rising():
    """Under a long warm-up the loss of any large run is that of a guess at step 100."""
    for last, expected in ((119, []), (80, ["critical"])):
        history = overshooting([0.5] * 20, dead=0.6, losses=[2.3] * 120)
        for step in range(120):
            history.record("learning_rate", 1e-5 * min(step, last), step=step)
        assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == expected


def test_a_start_that_was_bad_explains_the_deaths():
    history = overshooting([-0.1, *[0.5] * 19], dead=0.6, losses=[2.3] * 120)
    history.series["loss", None].points[0] = history.series["loss", None].points[0]._replace(value=30.0)
    assert check(LearningRateTooHighRule(), history) == []


def test_a_warning_never_becomes_worse_by_being_held():
    """Its thresholds are relaxed to take it back, not to raise it higher; below them it is taken back."""
    for share, expected in ((0.35, ["warning"]), (0.25, [])):
        history = overshooting([0.5] * 20, dead=share, losses=[2.3] * 120)
        assert check(LearningRateTooHighRule(), history) == []
        held = LearningRateTooHighRule().check(history, {KEY: "warning"})
        assert [alert.severity for alert in held] == expected


def test_a_verdict_does_not_wander_with_the_worst_overshoot():
    """The loss has been flat since step 0, and each overshoot is a bit worse than those before."""
    ratios = [0.5] * 300
    ratios[19], ratios[150], ratios[299] = -0.1, -0.2, -0.3
    for steps, expected in ((199, []), (200, ["critical"]), (210, ["critical"]), (300, ["critical"])):
        history = overshooting(ratios[:steps], dead=0.3, losses=[2.3] * steps)
        assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == expected


def test_under_a_warm_up_what_was_learned_and_lost_is_not_waited_for():
    """It counts from the end of the warm-up that the loss did not come down, but at once that it went back up."""
    for low, expected in ((0.4, ["critical"]), (0.6, [])):
        history = overshooting([0.5] * 40 + [-0.1], dead=0.3, losses=[*[low * math.log(10)] * 30, *[2.3] * 50])
        write(history, "learning_rate", [0.01 * step for step in range(80)])
        found = check(LearningRateTooHighRule(), history)
        assert [alert.severity for alert in found] == expected
        assert all("is back at 2.3" in alert.message for alert in found)


def test_filters_that_were_pruned_have_not_died():
    history = overshooting([0.5] * 20, dead=0.75, losses=[2.3] * 120)
    history.note("num_filters", 16, layer="conv2")
    history.note("pruned_dead", 12, layer="conv2")
    assert check(LearningRateTooHighRule(), history) == []
    history.note("pruned_dead", 4, layer="conv2")  # 8 of the 12 others
    (alert,) = check(LearningRateTooHighRule(), history)
    assert alert.evidence["dead_gain"] == pytest.approx(8 / 12)


def test_filters_that_were_dead_before_others_were_pruned_have_not_died_since():
    history = overshooting([0.5] * 20, losses=[2.3] * 120)
    del history.series["dead_fraction", "conv2"]
    write(history, "dead_fraction", [0.4, 0.8], layer="conv2", every=60)
    history.note("num_filters", 10, layer="conv2")
    history.note("pruned_dead", 4, layer="conv2")
    write(history, "born_dead_fraction", [0.4, 0.4], layer="conv2", every=60)
    assert check(LearningRateTooHighRule(), history) == []


def test_filters_dead_from_the_start_do_not_count():
    history = jumped(falling(200))
    write(history, "dead_fraction", [0.4, 0.4], layer="conv2", every=100)
    assert check(LearningRateTooHighRule(), history)[0].severity == "info"


def test_nan_after_a_jump_is_critical_at_once():
    (alert,) = check(LearningRateTooHighRule(), jumped([2.3, 2.3, 2.3, 40.0, math.nan, math.nan]))
    assert alert.severity == "critical"
    assert "since step 4" in alert.message


def test_nan_right_after_the_update_is_an_infinite_jump():
    (alert,) = check(LearningRateTooHighRule(), jumped([2.3, 2.3, 2.3, math.nan], factor=math.inf))
    assert (alert.severity, alert.value) == ("critical", math.inf)


def test_nan_out_of_the_blue_is_not_the_rate():
    history = jumped([2.3, 2.3, 2.3, math.nan], factor=0.9)
    assert check(LearningRateTooHighRule(), history) == []


def test_nan_after_a_later_jump_of_one_batch_is_the_rate():
    """As with momentum and no normalisation: the leap comes at step 35, the NaN at step 40."""
    history = run_of([1.0] * 35 + [5.0] * 5 + [math.nan] * 5)
    write(history, "loss_before", [1.0] * 35 + [5.0] * 5)
    write(history, "loss_after", [0.9] * 34 + [5.0, 40.0, 1e3, 1e6, 1e9, math.nan])
    write(history, "step_ratio", [0.9] * 34 + [-4.0] + [-1e3] * 5)
    (alert,) = check(LearningRateTooHighRule(), history)
    assert (alert.severity, "about 10" in alert.advice) == ("critical", True)  # 1 / (2 (1 + 4)), of the first leap


def test_nan_after_a_batch_that_was_bad_before_its_update_is_not_the_rate():
    history = run_of([1.0] * 35 + [50.0] + [math.nan] * 5)
    write(history, "loss_before", [1.0] * 35 + [50.0])
    write(history, "loss_after", [0.9] * 35 + [49.0])
    assert check(LearningRateTooHighRule(), history) == []


def test_a_run_that_had_learned_and_is_back_at_chance_is_critical():
    history = run_of([*falling(300), *[2.31] * 50])
    (alert,) = check(LearningRateTooHighRule(), history)
    assert (alert.severity, alert.value) == ("critical", 2.31)
    assert "divide the learning rate by about 3" in alert.advice


def test_one_bad_batch_is_no_collapse():
    assert check(LearningRateTooHighRule(), run_of([*falling(300), 9.0, 2.31, *[0.1] * 10])) == []
    assert check(LearningRateTooHighRule(), run_of([*falling(300), 9.0])) == []


def test_short_runs_are_judged_at_their_end():
    assert check(LearningRateTooHighRule(), jumped([2.3] * 30)) == []
    (alert,) = check(LearningRateTooHighRule(), jumped([2.3] * 30, finished=True))
    assert alert.severity == "critical"


def test_a_bad_start_explains_the_jump():
    history = jumped([30.0] * 100)
    assert check(LearningRateTooHighRule(), history) == []


def test_a_jump_after_the_early_phase_is_not_this_rule():
    history = run_of([2.3] * 200)
    write(history, "loss_before", [2.3] * 100)
    write(history, "loss_after", [2.2] * 50 + [20.0] + [2.2] * 49)
    write(history, "learning_rate", [0.1] * 100)
    assert check(LearningRateTooHighRule(), history) == []


def test_under_a_warm_up_the_early_phase_lasts_longer():
    history = run_of([2.3] * 200)
    write(history, "loss_before", [2.3] * 100)
    write(history, "loss_after", [2.2] * 50 + [20.0] + [2.2] * 49)
    write(history, "learning_rate", [0.002 * (step + 1) for step in range(60)] + [0.12] * 40)
    (alert,) = check(LearningRateTooHighRule(), history)
    assert (alert.severity, alert.evidence["jump_step"]) == ("critical", 50)


@pytest.mark.parametrize(("loss", "severities"), [(2.7, ["info"]), (2.9, ["critical"])])
def test_a_loss_above_that_of_a_guess_is_not_waited_for_even_under_a_warm_up(loss, severities):
    """1.2 ln 10 is 2.76; a loss of 2.7 is given until step 90, 60 after the jump could first have been."""
    history = run_of([2.3] * 30 + [loss] * 45)
    write(history, "loss_before", [2.3] * 75)
    write(history, "loss_after", [2.2] * 50 + [20.0] + [2.2] * 24)
    write(history, "learning_rate", [0.002 * (step + 1) for step in range(60)] + [0.12] * 15)
    assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == severities


def test_without_the_same_batch_the_logged_loss_decides_and_the_evidence_says_so():
    (alert,) = check(LearningRateTooHighRule(), run_of([2.3, 9.0] + [2.3] * 98))
    assert (alert.severity, alert.threshold, alert.evidence["same_batch"]) == ("critical", 3.0, 0)
    assert check(LearningRateTooHighRule(), run_of([2.3, 6.0] + [2.3] * 98)) == []


def test_without_a_cross_entropy_the_first_loss_is_the_measure():
    (alert,) = check(LearningRateTooHighRule(), run_of([100.0, 900.0] + [99.0] * 98, classes=None))
    assert alert.severity == "critical"
    (alert,) = check(LearningRateTooHighRule(), run_of([100.0, 900.0] + [20.0] * 98, classes=None))
    assert alert.severity == "info"


@pytest.mark.parametrize(("end", "severity"), [(0.03, "info"), (0.9, "info"), (1.3, "critical"), (2.3, "critical")])
def test_a_network_that_begins_with_a_small_loss_has_lost_all_from_half_of_a_guess_on(end, severity):
    """Fine-tuning: a batch of noise is far above the first loss, and no damage; ln 10 / 2 is 1.15."""
    losses = [0.02, 0.01, 0.09, 0.05, *[end] * 70]
    (alert,) = check(LearningRateTooHighRule(), jumped(losses))
    assert alert.severity == severity


def test_one_bad_batch_late_in_a_run_is_left_to_another_rule():
    """What the loss does after it is the batch's doing; without the batch it is the rate's."""
    bad = [*falling(150), 400.0, *[2.35] * 60]
    assert check(LearningRateTooHighRule(), peaked(bad)) == []
    (alert,) = check(LearningRateTooHighRule(), peaked([*falling(150), *[2.35] * 60]))
    assert alert.severity == "critical"


def peaked(losses):
    """A run with its record losses."""
    history = run_of(losses)
    for step, loss in enumerate(losses):
        history.record_peak("loss_peak", loss, step=step)
    return history


def test_a_small_loss_that_doubles_is_noise():
    history = run_of([0.01] * 100)
    history.note("num_classes", 10)
    history.series["loss", None].points[0] = history.series["loss", None].points[0]._replace(value=2.3)
    write(history, "loss_before", [0.01] * 20)
    write(history, "loss_after", [0.1] * 20)
    assert check(LearningRateTooHighRule(), history) == []


def test_a_negative_loss_is_not_judged():
    assert check(LearningRateTooHighRule(), run_of([-1.0, 5.0] + [-1.0] * 80, classes=None)) == []


def test_it_clears_only_well_below_the_threshold():
    rule = LearningRateTooHighRule()
    wavering = jumped([2.3] * 60 + [0.6 * math.log(10)] * 60)
    assert check(rule, wavering)[0].severity == "info"
    assert check(rule, wavering, {KEY: "critical"})[0].severity == "critical"
    assert check(rule, wavering, {KEY: "warning"})[0].severity == "warning"
    assert check(rule, wavering, {KEY: "info"})[0].severity == "info"


def test_the_early_evidence_is_latched_in_a_long_run():
    history = jumped([2.3] * 20000)
    (alert,) = check(LearningRateTooHighRule(), history)
    assert (alert.severity, alert.value) == ("critical", pytest.approx(5.0))


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`dead_gain`"):
        LearningRateTooHighRule(dead_gain=25)
    with pytest.raises(ArgumentError, match="`judge_step`"):
        LearningRateTooHighRule(judge_step=10)


def overshooting(ratios, *, dead=0.0, losses=None):
    """A run whose first updates had these step ratios, none of them with a leap of the loss."""
    history = run_of([2.3] * 80 if losses is None else losses)
    write(history, "loss_before", [2.3] * len(ratios))
    write(history, "loss_after", [2.3 * (1.2 if ratio < 0 else 0.99) for ratio in ratios])
    write(history, "step_ratio", ratios)
    return write(history, "dead_fraction", [0.0, dead], layer="conv2", every=60)


def test_repeated_overshoots_with_lasting_damage_are_blamed_on_the_rate():
    """Some rates kill the units before the loss can leap."""
    (alert,) = check(LearningRateTooHighRule(), overshooting([-1.0] * 5 + [0.5] * 15, dead=0.9, losses=[2.3] * 120))
    assert (alert.severity, alert.cause) == ("critical", "learning rate")
    assert alert.value == 0.25
    assert "25%" in alert.message
    learned = overshooting([-1.0] * 5 + [0.5] * 15, dead=0.9, losses=falling(120, tau=15))
    assert check(LearningRateTooHighRule(), learned) == []


def test_overshoots_without_damage_or_too_few_of_them_are_no_alert():
    """The edge of stability is a normal place to be."""
    losses = falling(80, tau=15)
    assert check(LearningRateTooHighRule(), overshooting([-1.0] * 8 + [0.5] * 12, losses=losses)) == []
    assert check(LearningRateTooHighRule(), overshooting([-1.0] * 3 + [0.5] * 17, dead=0.9)) == []  # before step 100
    assert check(LearningRateTooHighRule(), overshooting([-1.0] * 5, dead=0.9)) == []


def test_a_single_overshoot_among_few_probes_is_no_mark():
    for probes, expected in ((9, []), (10, ["critical"])):
        history = overshooting([-0.1, *[0.5] * (probes - 1)], dead=0.3, losses=[2.3] * 300)
        assert [alert.severity for alert in check(LearningRateTooHighRule(), history)] == expected
