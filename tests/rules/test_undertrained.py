import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import History, UndertrainedRule
from lightning_interp.rules._curve import forecast
from tests.rules.writing import check, healthy, run_of, write

STEPS = 600
SEEDS = range(20)

CUT_SHORT = {
    "exponential, cut at its time constant": lambda t: 0.05 + 2.25 * math.exp(-t / STEPS),
    "straight": lambda t: 2.3 - t / STEPS,
    "power": lambda t: 2.3 * (1 + t / 400) ** -0.8,
}
DONE = {
    "converged": lambda t: 0.05 + 2.25 * math.exp(-t / 75),
    "converged far above zero": lambda t: 1.2 + 1.1 * math.exp(-t / 75),
    "never learned": lambda t: math.log(10),
    "near zero": lambda t: 0.3 * math.exp(-t / 100),
    "rising": lambda t: 1 + t / STEPS,
    "slow power": lambda t: 2.3 * (t + 1) ** -0.3,
}


def curve(law, noise, seed, *, steps=STEPS, finished=True, planned=STEPS):
    generator = np.random.default_rng(seed)
    losses = [max(1e-3, law(t) + noise * generator.standard_normal()) for t in range(steps)]
    return run_of(losses, finished=finished, planned=planned)


@pytest.mark.parametrize("law", CUT_SHORT.values(), ids=CUT_SHORT)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_curve_that_is_still_falling_fires_on_every_seed(law, noise):
    for seed in SEEDS:
        (alert,) = check(UndertrainedRule(), curve(law, noise, seed))
        assert (alert.severity, alert.cause) == ("warning", "too few steps")


@pytest.mark.parametrize("law", DONE.values(), ids=DONE)
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_a_curve_that_is_done_is_silent_on_every_seed(law, noise):
    for seed in SEEDS:
        assert check(UndertrainedRule(), curve(law, noise, seed)) == []


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_noise_that_hangs_together_is_no_trend(noise):
    """A plateau whose noise is a slow random process, as with epochs of different difficulty."""
    for seed in SEEDS:
        generator, losses, state = np.random.default_rng(seed), [], 0.0
        for _ in range(STEPS):
            state = 0.9 * state + noise * math.sqrt(1 - 0.81) * generator.standard_normal()
            losses.append(1.2 + state)
        losses[0] = 2.3
        assert check(UndertrainedRule(), run_of(losses, finished=True)) == []


def test_healthy_and_empty_runs_are_silent():
    assert check(UndertrainedRule(), healthy()) == []
    assert check(UndertrainedRule(), History()) == []


def test_before_the_end_it_is_information_from_nine_tenths_on():
    law = CUT_SHORT["straight"]
    assert check(UndertrainedRule(), curve(law, 0.0, 0, steps=530, finished=False)) == []
    (alert,) = check(UndertrainedRule(), curve(law, 0.0, 0, steps=545, finished=False))
    assert alert.severity == "info"


@pytest.mark.parametrize(
    ("accuracies", "rise"), [([0.5, 0.6, 0.7, 0.8, 0.85, 0.9], 0.2), ([0.5, 0.6, 0.902, 0.8, 0.9, 0.9], -0.002)]
)
def test_it_says_whether_the_classes_are_still_moving_apart(accuracies, rise):
    """Over the last half of the run; said only where it is more than noise."""
    history = curve(CUT_SHORT["straight"], 0.0, 0)
    write(history, "knn_accuracy", accuracies, start=99, every=100)
    (alert,) = check(UndertrainedRule(), history)
    assert alert.evidence["knn_accuracy"] == 0.9
    assert alert.evidence["knn_accuracy_rise"] == pytest.approx(rise)
    assert ("still moving apart" in alert.message) == (rise > 0.005)


@pytest.mark.parametrize("accuracies", [[], [0.9], [0.5, math.nan]])
def test_a_separation_that_was_not_measured_twice_says_nothing(accuracies):
    """The alert does not hang on it."""
    history = curve(CUT_SHORT["straight"], 0.0, 0)
    write(history, "knn_accuracy", accuracies, start=399, every=100)
    (alert,) = check(UndertrainedRule(), history)
    assert not any("knn" in key for key in alert.evidence)
    assert "apart" not in alert.message


def test_an_interrupted_run_is_not_judged():
    assert check(UndertrainedRule(), curve(CUT_SHORT["straight"], 0.0, 0, steps=300, finished=False)) == []
    endless = curve(CUT_SHORT["straight"], 0.0, 0, finished=False, planned=math.inf)
    assert check(UndertrainedRule(), endless) == []


def test_a_long_run_is_fitted_to_merged_losses():
    (alert,) = check(UndertrainedRule(), curve(lambda t: 2.3 - t / 20000, 0.2, 0, steps=20000))
    assert alert.evidence["loss"] == pytest.approx(1.3, abs=0.1)


def test_deaths_explain_a_high_loss():
    """Those of half of a layer: with fewer a network learns on, and more steps help it too."""
    for share, count in ((0.5, 0), (0.4, 1)):
        history = curve(CUT_SHORT["straight"], 0.0, 0)
        write(history, "dead_fraction", [0.0, share], layer="conv1", every=300)
        assert len(check(UndertrainedRule(), history)) == count
    write(history, "dead_fraction", [0.0, 0.6], layer="conv2", every=300)
    assert check(UndertrainedRule(), history) == []
    history.note("num_filters", 10, layer="conv2")
    history.note("pruned_dead", 3, layer="conv2")  # on purpose; of the others 3 of 7
    assert len(check(UndertrainedRule(), history)) == 1


def test_a_too_high_rate_explains_a_high_loss():
    history = curve(lambda t: 3.5 - t / STEPS, 0.0, 0)
    write(history, "loss_before", [3.5] * 5)
    write(history, "loss_after", [20.0] * 5)
    assert check(UndertrainedRule(), history) == []


def test_a_too_low_rate_is_given_as_the_cause():
    history = curve(CUT_SHORT["straight"], 0.0, 0)
    write(history, "step_ratio", [0.999] * 30, every=20)
    write(history, "learning_rate", [1e-5] * 30, every=20)
    (alert,) = check(UndertrainedRule(), history)
    assert alert.cause == "learning rate too low"


def test_a_loss_that_has_not_left_its_first_level_is_not_called_falling():
    """The steps were too short for it to do so: what they promise is all that can be said."""
    history = curve(DONE["never learned"], 0.01, 0)
    assert check(UndertrainedRule(), history) == []
    write(history, "step_ratio", [0.999] * 30, every=20)
    (alert,) = check(UndertrainedRule(), history)
    assert "The training loss is 2.3 and has not left its first level, 2.3." in alert.message
    assert "falling" not in alert.message


def test_nan_is_another_matter():
    history = curve(CUT_SHORT["straight"], 0.0, 0)
    history.record("loss", math.nan, step=STEPS)
    assert check(UndertrainedRule(), history) == []


def test_without_a_cross_entropy_the_first_loss_is_the_measure():
    losses = [100 / (1 + step / 20) for step in range(STEPS)]
    assert check(UndertrainedRule(), run_of(losses, classes=None, finished=True)) == []  # 3 of 100 are left
    losses = [100 - 50 * step / STEPS for step in range(STEPS)]
    assert len(check(UndertrainedRule(), run_of(losses, classes=None, finished=True))) == 1


def test_the_flat_end_of_a_decay_is_no_floor():
    """The loss is a power of the work done; under a cosine its last fifth hardly moves, and a longer one would."""
    steps = range(STEPS)
    rates = [0.1 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in steps]
    work = np.cumsum(rates) / 0.1
    history = run_of([2.3 * (1 + each / 30) ** -0.4 for each in work], finished=True)
    assert history.get("loss").values[int(0.8 * STEPS)] < 1.02 * history.get("loss").values[-1]
    write(history, "learning_rate", rates)
    (alert,) = check(UndertrainedRule(), history)
    ahead = 2.3 * (1 + work[-1] / 30) ** -0.4 - 2.3 * (1 + 3 * work[-1] / 30) ** -0.4
    assert alert.value == pytest.approx(ahead / math.log(10), rel=0.25)


def test_a_run_that_ends_before_the_fall_has_set_in_was_too_short():
    """Short steps on the first level. With long ones, or lower down, a flat loss says nothing."""
    for level, ratio, count in ((2.29, 0.999, 1), (2.29, 0.8, 0), (1.5, 0.999, 0)):
        history = run_of([2.3] + [level] * (STEPS - 1), finished=True)
        write(history, "step_ratio", [ratio] * 20, every=20)
        assert len(check(UndertrainedRule(), history)) == count


def test_few_steps_are_not_judged():
    assert check(UndertrainedRule(), curve(CUT_SHORT["straight"], 0.0, 0, steps=20)) == []


def test_it_clears_when_training_goes_on():
    history = curve(CUT_SHORT["straight"], 0.0, 0)
    history.finished = False
    history.note("planned_steps", 10 * STEPS)
    assert check(UndertrainedRule(), history, {("undertrained", None): "warning"}) == []


def test_wrong_thresholds_are_refused():
    with pytest.raises(ArgumentError, match="`fall`"):
        UndertrainedRule(fall=20)


@settings(max_examples=50, deadline=None)
@given(
    exponent=st.floats(0.1, 3.0),
    scale=st.floats(0.1, 5.0),
    floor=st.floats(0.0, 3.0),
    steps=st.integers(40, 2000),
)
def test_forecast_recovers_a_power_law(exponent, scale, floor, steps):
    """Closed form: L(T) and L(3T) of the law itself; what is left is the grid of exponents and the blocks."""
    times = np.arange(steps // 2, steps + 1, dtype=float)
    losses = floor + scale * (times / steps) ** -exponent
    result = forecast(times, losses)
    assert result.now == pytest.approx(floor + scale, abs=0.02 * (losses[0] - floor))
    assert result.later == pytest.approx(floor + scale * 3**-exponent, abs=0.05 * (losses[0] - floor))


@settings(max_examples=50, deadline=None)
@given(losses=st.lists(st.floats(0, 100), min_size=16, max_size=80), factor=st.floats(0.1, 10))
def test_forecast_falls_and_scales_with_the_losses(losses, factor):
    times = np.arange(len(losses), 2 * len(losses), dtype=float)
    result, scaled = forecast(times, np.array(losses)), forecast(times, factor * np.array(losses))
    assert 0 <= result.later <= result.now + 1e-9
    assert scaled.now == pytest.approx(factor * result.now, rel=1e-6, abs=1e-9)
    assert scaled.later == pytest.approx(factor * result.later, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("decay", "rests"), [(0.9, True), (0.985, False)])
def test_a_rate_that_has_died_is_told_in_the_place_of_more_steps(decay, rests):
    """A schedule that is stepped with each batch: at such a rate three times the steps bring nothing.

    The rates are below a thousandth of the first after 66 and 458 of the 600 steps.
    """
    history = curve(lambda t: 0.79 + 1.5 * math.exp(-t / (10 if rests else 200)), 0.01, 0)
    for step in [*range(25), *range(30, STEPS, 20)]:
        history.record("learning_rate", 0.1 * decay**step, step=step)
    (alert,) = check(UndertrainedRule(), history)
    assert (alert.cause == "learning rate decayed to nothing") is rests
    assert ("still falling" in alert.message) is not rests
    assert ("schedule" in alert.advice) is rests
    assert alert.evidence.get("at_rest_since") == (70 if rests else None)


def test_a_trained_network_that_goes_on_is_not_told_to_begin():
    """Its first level is near zero, and there it may stay."""
    level = [0.0115 - 2e-6 * step for step in range(264)]
    history = run_of(level, finished=True, planned=264)
    write(history, "step_ratio", [0.999] * 20, every=10)
    assert check(UndertrainedRule(), history) == []
    high = run_of([2.3 - 1e-4 * step for step in range(264)], finished=True, planned=264)
    write(high, "step_ratio", [0.999] * 20, every=10)
    (alert,) = check(UndertrainedRule(), high)
    assert "has not left its first level" in alert.message


def test_a_softmax_before_the_cross_entropy_comes_before_more_steps():
    history = curve(CUT_SHORT["straight"], 0.0, 0)
    history.note("scores_normalised", 1.0)
    (alert,) = check(UndertrainedRule(), history)
    assert (alert.cause, alert.alternatives) == ("softmax before the cross-entropy", ["too few steps"])
    assert "scores themselves" in alert.advice
