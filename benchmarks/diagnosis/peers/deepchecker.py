"""TheDeepChecker (Ben Braiek and Khomh, TOSEM 2022): its checks with a counterpart here, at its default settings.

It trains on one small batch for 200 iterations to check the program; here its checks look at the run itself. Left out:
the distribution of activations, signs of weights, the F-test of the initialisation (it asks for He's variance, which no
layer has by PyTorch's default), regularisation, and all that needs a training of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from benchmarks.diagnosis.peers.finding import Finding, earliest
from benchmarks.diagnosis.peers.recorder import Recording, WeightStep

PERIOD, WINDOW = 10, 5
# The loss and the size of updates are judged as long as it trains, in its favour: later a schedule may lower the rate.
ITERATIONS = 200
DEAD_SHARE, DEAD_UNITS = 0.05, 0.5  # the 95th percentile of a unit's activations is below 1e-5; in over half the units
FAST, SLOW = -1.0, -4.0
VANISHED, EXPLODED, SHRINK, GROW = 1e-6, 1e6, 0.5, 2.0
STAGNATION, SMOOTH, SMOOTH_WINDOW = 0.05, 0.5, 50
RULES = frozenset(
    {"bad_start", "dead_filters", "non_finite", "vanishing_gradient", "exploding_gradient", "untrained_layer",
     "learning_rate_too_high", "learning_rate_too_low"}
)  # fmt: skip


def check(recording: Recording) -> list[Finding]:
    """All of the checks below."""
    checks = (_before_training, _activations, _gradients, _updates, _losses)
    return earliest(finding for one in checks for finding in one(recording))


def _before_training(recording: Recording) -> Iterator[Finding]:
    """Inputs that are not normalised, a constant weight, and a first loss that is 100 % or more from ln C."""
    mean, std, low, high = recording.inputs
    in_range = math.isclose(high, 1, abs_tol=0.1) and any(math.isclose(low, end, abs_tol=0.1) for end in (0, -1))
    if not in_range and (abs(mean) > 0.1 or abs(std - 1) > 0.1):
        yield Finding("inputs not normalised", "bad_start", 0)
    if any(spread < 1e-8 for spread in recording.initial_spread.values()):
        yield Finding("poor initialisation", "bad_start", 0)
    if recording.classes:
        expected, first = math.log(recording.classes), recording.losses[0]
        if math.isfinite(first) and abs(first - expected) >= expected:
            yield Finding("first loss", "bad_start", 0)


def _activations(recording: Recording) -> Iterator[Finding]:
    """Dead layers, over a buffer of the last ten batches, every tenth step."""
    for steps in recording.active.values():
        for step in range(PERIOD, len(steps), PERIOD):
            buffer = steps[step - PERIOD + 1 : step + 1]
            shares = [sum(unit) / PERIOD for unit in zip(*buffer, strict=True)]
            dead = sum(share < DEAD_SHARE for share in shares) / len(shares)
            if dead > DEAD_UNITS and math.isfinite(recording.losses[step]):
                yield Finding("dead layer", "dead_filters", step)


def _gradients(recording: Recording) -> Iterator[Finding]:
    """Vanishing or exploding: by the mean absolute value, or halved or doubled four times in a row."""
    for steps in recording.weights.values():
        for step in range(PERIOD, len(steps), PERIOD):
            if not steps[step].finite:
                yield Finding("no numbers", "non_finite", step)
                break
            means = [s.grad_mean for s in steps[step - WINDOW + 1 : step + 1]]
            rates = _rates(means)
            if means[-1] < VANISHED or all(rate <= SHRINK for rate in rates):
                yield Finding("vanishing gradient", "vanishing_gradient", step)
            if means[-1] > EXPLODED or all(rate >= GROW for rate in rates):
                yield Finding("exploding gradient", "exploding_gradient", step)


def _updates(recording: Recording) -> Iterator[Finding]:
    """Unstable learning: the mean of log10(mean |update| / mean |weight|) over each ten steps."""
    for steps in recording.weights.values():
        begin = 0
        for step in range(PERIOD, min(len(steps), ITERATIONS + 1), PERIOD):
            ratios = [log_ratio(s) for s in steps[begin : step + 1] if s.finite and s.weight_mean]
            begin = step + 1
            if not ratios:
                continue
            mean = sum(ratios) / len(ratios)
            if mean == 0:
                yield Finding("untrained weights", "untrained_layer", step)
            elif mean > FAST:
                yield Finding("updates too fast", "learning_rate_too_high", step)
            elif mean < SLOW:
                yield Finding("updates too slow", "learning_rate_too_low", step)


def log_ratio(step: WeightStep) -> float:
    """Its measure of a step; 0 where nothing moved."""
    return math.log10(step.update_mean / step.weight_mean) if step.update_mean > 0 else 0.0


def _losses(recording: Recording) -> Iterator[Finding]:
    """Stagnating, diverging and fluctuating loss, on means of ten steps. The first and the last name no cause."""
    means: list[float] = []
    begin, lowest = 0, math.inf
    for step in range(0, min(len(recording.losses), ITERATIONS + 1), PERIOD):
        chunk = recording.losses[begin : step + 1]
        begin = step + 1
        mean = sum(chunk) / len(chunk)
        if not math.isfinite(mean):
            yield Finding("loss is no number", "non_finite", step)
            return
        means.append(mean)
        lowest = min(lowest, mean)
        rates = _rates(means[-WINDOW:])
        if len(rates) == WINDOW - 1 and all(1 - rate < STAGNATION for rate in rates):
            yield Finding("stagnated loss", None, step)
        if len(rates) == WINDOW - 1 and all(rate >= GROW for rate in rates):
            yield Finding("diverging loss", "learning_rate_too_high", step)
        if smoothness(means[-SMOOTH_WINDOW:]) < SMOOTH:
            yield Finding("fluctuating loss", None, step)


def smoothness(values: Sequence[float]) -> float:
    """1 minus the share of places where a rise turns into a fall or a fall into a rise; 1 for fewer than 5 values.

    Example:
        >>> smoothness([5, 4, 3, 2, 1]), smoothness([1, 2, 1, 2, 1, 2])
        (1.0, 0.33333333333333337)
    """
    if len(values) < WINDOW:
        return 1.0
    rises = [b - a for a, b in pairwise(values)]
    return 1 - sum(a * b < 0 for a, b in pairwise(rises)) / len(values)


def _rates(values: Sequence[float]) -> list[float]:
    """Each value over the one before."""
    return [b / a if a > 0 else math.nan for a, b in pairwise(values)]
