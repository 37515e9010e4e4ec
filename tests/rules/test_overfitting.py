"""The rule on networks that learn their training images by heart."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import AlertBook, History, OverfittingRule
from lightning_interp.rules._validation import find_metric
from tests.rules.writing import check, falling, healthy, run_of, write

KEY = ("overfitting", None)
RISING = [2.0, 1.4, 1.0, 0.8, 0.7, 0.7, 0.72, 0.76, 0.8, 0.85, 0.9, 0.94]
FLAT = [2.0, 1.2, 0.6, 0.3, 0.2, 0.12, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]


def validated(values, *, history=None, name="val_loss", accuracies=None, scale=1.0, samples=1000):
    """A run of 600 steps whose training loss falls to 0.2, not by heart, with a validation every 50."""
    history = run_of([scale * loss for loss in falling(600, end=0.2, tau=150.0)]) if history is None else history
    write(history, "validation_metric", [scale * value for value in values], layer=name, start=49, every=50)
    write(history, "validation_metric", accuracies or [], layer="val_acc", start=49, every=50)
    history.note("validation_samples", samples)
    return history


def test_validation_loss_that_rises_while_the_training_loss_falls_is_told_with_the_best_step():
    """The smallest of the newest three, against the best median of three and three times the noise, 1.05 x 0.04."""
    (alert,) = check(OverfittingRule(), validated(RISING))
    assert (alert.rule, alert.severity, alert.layer) == ("overfitting", "warning", None)
    assert alert.cause == "learned by heart"
    assert alert.value == 0.85
    assert alert.threshold == pytest.approx(0.7 + 3 * 1.05 * 0.04)
    assert alert.evidence["best_validation_loss"] == 0.7
    assert alert.evidence["best_step"] in (249, 299)
    assert "near step" in alert.advice
    assert "'val_loss'" in alert.advice


def known():
    """A training loss that falls on and on, below all validation losses."""
    return run_of(falling(1400, end=0.12, tau=300.0))


@pytest.mark.parametrize(
    "values",
    [
        [],
        RISING[:5],
        FLAT,
        [2.0, 1.4, 1.0, 0.8, 0.7, 0.7, 0.70, 0.72, 0.74, 0.75, 0.76, 0.77],
        [2.0, 1.4, 1.0, 0.8, 0.7, 0.7, 0.9, 0.95, 0.99, 0.9, 0.7, 0.9],
        [2.0, 1.4, 0.9, 1.3, 0.8, 1.4, 0.9, 1.5, 0.7, 1.3, 1.2, 1.5],
        [math.nan] * 12,
    ],
    ids=["none", "few", "flat", "little", "not three in a row", "noise", "nan"],
)
def test_silent_without_a_rise_that_holds(values):
    """A flat one, a small one, a short one, and one that is no larger than the noise."""
    assert check(OverfittingRule(), validated(values)) == []


def test_share_of_what_was_learned_is_the_limit_where_there_is_little_noise():
    """Five hundredths of ln 10 - 0.1, or a tenth of the best value where that is more."""
    values = [2.0, 1.0, 0.5, 0.1, 0.1, 0.1, *[0.1 + 0.005 * step for step in range(1, 19)]]
    rising = [*values, 0.22, 0.225, 0.23]
    assert check(OverfittingRule(), validated([*values, 0.205, 0.21, 0.215], history=known())) == []
    (alert,) = check(OverfittingRule(), validated(rising, history=known()))
    assert alert.threshold == pytest.approx(0.1 + 0.05 * (math.log(10) - 0.1))
    (alert,) = check(OverfittingRule(rise=0.0), validated(rising, history=known()))
    assert alert.threshold == pytest.approx(max(0.1 * 1.1, 0.1 + 3 * 1.05 * 0.005))


def test_healthy_and_empty_runs_are_silent():
    """With and without a validation loss."""
    assert check(OverfittingRule(), healthy()) == []
    assert check(OverfittingRule(), History()) == []
    assert check(OverfittingRule(), validated(FLAT, history=healthy())) == []


def test_training_loss_that_does_not_fall_is_another_matter():
    """Near its start, where it was at the best step, or above the validation loss, as with dropout."""
    assert check(OverfittingRule(), validated(RISING, history=run_of(falling(600, end=1.9)))) == []
    stalled = run_of(falling(250, end=0.6) + [0.64] * 350)
    assert check(OverfittingRule(), validated(RISING, history=stalled)) == []
    dropout = run_of(falling(600, end=1.0, tau=200.0))
    assert check(OverfittingRule(), validated(RISING, history=dropout)) == []


def test_rise_that_came_at_once_or_goes_back_is_no_overfitting():
    """A batch on the wrong scale disturbs the normalisation so."""
    jump = [2.0, 1.0, 0.4, 0.1, 0.1, 0.1, 6.0, 5.9, 5.8, 5.9, 6.1, 6.0]
    assert check(OverfittingRule(), validated(jump, history=run_of(falling(600, end=0.01)))) == []
    back = [2.0, 1.0, 0.4, 0.1, 0.1, 0.1, 1.0, 2.0, 3.0, 1.4, 1.2, 1.1]
    assert check(OverfittingRule(), validated(back, history=run_of(falling(600, end=0.01)))) == []


def test_accuracy_that_goes_on_rising_makes_it_information():
    """The network is too sure of itself, not worse."""
    rises = [0.3, 0.5, 0.6, 0.7, 0.75, 0.76, 0.77, 0.78, 0.8, 0.82, 0.83, 0.84]
    (alert,) = check(OverfittingRule(), validated(RISING, accuracies=rises))
    assert (alert.severity, alert.cause) == ("info", "too sure of itself")
    assert alert.evidence["accuracy_gain"] > 0.05
    (alert,) = check(OverfittingRule(), validated(RISING, accuracies=rises[:6] + [0.75] * 6))
    assert (alert.severity, alert.cause) == ("warning", "learned by heart")


@pytest.mark.parametrize(("level", "severity"), [(0.2, None), (0.25, "info"), (0.56, "info"), (0.6, "warning")])
def test_gap_at_a_training_loss_near_zero_is_measured_in_ln_c(level, severity):
    """A tenth of ln 10 is 0.23, a quarter 0.576; the training loss is 0.01."""
    values = [2.0, 1.5, 1.0] + [level] * 9
    alerts = check(OverfittingRule(), validated(values, history=run_of(falling(600, end=0.01))))
    assert [alert.severity for alert in alerts] == ([] if severity is None else [severity])
    for alert in alerts:
        assert alert.value == pytest.approx((level - 0.01) / math.log(10), abs=1e-3)


def test_gap_needs_a_cross_entropy_and_images_known_by_heart():
    """Without ln C no level of the loss is known; and a network that still learns is left alone."""
    values = [2.0, 1.5] + [1.0] * 10
    assert check(OverfittingRule(), validated(values, history=run_of(falling(600, end=0.01), classes=None))) == []
    assert check(OverfittingRule(), validated(values, history=run_of(falling(600, end=0.3)))) == []


@given(st.floats(1e-3, 1e3))
def test_scale_of_a_loss_that_is_no_cross_entropy_does_not_matter(scale):
    """All is compared with the first loss and with the best one."""
    for values, number in ((RISING, 1), (FLAT, 0)):
        history = run_of([scale * loss for loss in falling(600, end=0.2, tau=150.0)], classes=None)
        assert len(check(OverfittingRule(), validated(values, history=history, scale=scale))) == number


def test_fine_tuned_network_is_measured_by_ln_c_and_not_by_its_low_first_loss():
    """From 0.10 to 0.13, with a training loss that goes from 0.1 to zero, is little."""
    history = run_of(falling(600, start=0.1, end=0.001))
    assert check(OverfittingRule(), validated([0.1] * 4 + [0.11, 0.12] + [0.13] * 6, history=history)) == []


def test_small_validation_sets_are_not_believed():
    """Fewer than a hundred samples, where the number is known."""
    assert check(OverfittingRule(), validated(RISING, samples=99)) == []
    assert len(check(OverfittingRule(min_samples=99), validated(RISING, samples=99))) == 1


def test_other_rules_go_first():
    """A loss that is no number. Filters that died in a run that learned all the same are no excuse."""
    broken = validated(RISING)
    write(broken, "loss", [math.nan], start=700)
    assert check(OverfittingRule(), broken) == []
    killed = validated(RISING, history=run_of([2.3, 50.0, *falling(598, end=0.2, tau=150.0)]))
    write(killed, "dead_fraction", [0.0, 0.6], layer="conv1", every=500)
    assert len(check(OverfittingRule(), killed)) == 1


def test_wrong_labels_are_the_cause_where_they_were_found():
    """`suspect_labels` speaks too, and of the same images."""
    history = validated(RISING)
    write(history, "suspect_label_share", [0.1, 0.1], start=199, every=100)
    write(history, "label_recognition", [0.9, 0.9], start=199, every=100)
    history.note("label_anchors", 2000)
    (alert,) = check(OverfittingRule(), history)
    assert alert.cause == "wrong labels learned by heart"
    assert "labels first" in alert.advice


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train_loss", "loss", "val_acc"], None),
        (["val_loss_box", "val_loss", "train_loss"], "val_loss"),
        (["Loss/valid", "Loss/train"], "Loss/valid"),
        (["validation-nll"], "validation-nll"),
        (["valLoss"], "valLoss"),
        (["val_loss_step", "val_loss_epoch"], "val_loss_epoch"),
        (["interval_loss", "value_loss"], None),
        (["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"], "val_loss/dataloader_idx_0"),
    ],
    ids=str,
)
def test_metric_is_found_by_its_words(names, found):
    """A word for validation and one for the loss; the shortest name of several."""
    history = History()
    for name in names:
        history.record("validation_metric", 1.0, step=0, layer=name)
    assert find_metric(history, {"loss", "nll"}) == found


def test_metric_can_be_named():
    """Then no other is looked at."""
    history = validated(RISING, name="held_out")
    assert check(OverfittingRule(), history) == []
    assert len(check(OverfittingRule(metric="held_out"), history)) == 1
    assert check(OverfittingRule(metric="other"), history) == []


def test_book_raises_once_and_clears_when_the_loss_comes_down():
    """A rate that decays may cure it."""
    book, history = AlertBook([OverfittingRule()]), run_of(falling(600, end=0.35))
    history.note("validation_samples", 1000)
    changed = []
    for step, value in enumerate([*RISING, 0.86, 0.8, 0.72, 0.7, 0.7, 0.7], start=1):
        history.record("validation_metric", value, step=600 + 50 * step, layer="val_loss")
        write(history, "loss", [0.34 - 0.01 * step] * 12, start=600 + 50 * step)
        changed += [alert.status for alert in book.update(history)]
    assert changed == ["raised", "cleared"]


@pytest.mark.parametrize("argument", ["rise", "relative", "certainty", "train_fall", "learned", "accuracy", "gap"])
def test_thresholds_are_checked(argument):
    """By name."""
    with pytest.raises(ArgumentError, match=argument):
        OverfittingRule(**{argument: -1})


@pytest.mark.parametrize("wrong", [{"metric": 3}, {"large_gap": 0.05}, {"checks": 0}, {"min_samples": 0}])
def test_other_options_are_checked(wrong):
    """By name, too."""
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        OverfittingRule(**wrong)


@pytest.mark.parametrize(("best", "cause"), [(2.31, "validation data of another kind"), (2.29, "learned by heart")])
def test_a_validation_that_never_was_better_than_a_guess_is_of_another_kind(best, cause):
    """Labels off by one, or images on another scale: ln 10 is 2.303, and to stop earlier brings nothing."""
    values = [best + 0.5, best + 0.2, best, best, best, best + 0.1, *[best + 0.3 * step for step in range(1, 7)]]
    (alert,) = check(OverfittingRule(), validated(values))
    assert (alert.severity, alert.cause) == ("warning", cause)
    unlike = cause != "learned by heart"
    assert ("labels of both sets" in alert.advice) is unlike
    assert ("EarlyStopping" in alert.advice) is not unlike
    assert alert.alternatives[0] == ("learned by heart" if unlike else "validation data of another kind")


def test_a_gap_to_a_validation_that_never_was_better_than_a_guess_is_no_learning_by_heart():
    (alert,) = check(OverfittingRule(), validated([35.0] * 12, history=run_of(falling(600, end=0.05, tau=60.0))))
    assert alert.cause == "validation data of another kind"
    assert "never been better than a guess" in alert.message
    assert "by heart" not in alert.message
