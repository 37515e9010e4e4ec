"""AUTOTRAINER (Zhang et al., ICSE 2021): its five symptoms with the default parameters of its public repository.

Chosen in its favour: it looks after each epoch and one hit is enough; with its defaults, every fifth epoch and five
hits, it could not speak in runs this short. The gradient is that of the epoch's last batch, not of the first images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.diagnosis.peers.finding import Finding
from benchmarks.diagnosis.peers.recorder import Epoch, Recording

RATIO_LOW, NORM_LOW, RATIO_HIGH, ZEROS = 1e-3, 1e-4, 70.0, 0.7  # beta 1 to 3 and gamma
SWING, SWINGS, GAIN, SATISFIED = 0.03, 0.2, 0.01, 0.7  # zeta, eta, delta and Theta
BEGIN = 0.3  # share of the epochs before which accuracy is not judged
RULES = frozenset(
    {"dead_filters", "exploding_gradient", "vanishing_gradient", "learning_rate_too_low", "learning_rate_too_high"}
)
# What it repairs slow convergence and an oscillating loss with is, first, a higher and a lower rate.
NAMES = {
    "dying ReLU": "dead_filters",
    "gradient explode": "exploding_gradient",
    "gradient vanish": "vanishing_gradient",
    "slow convergence": "learning_rate_too_low",
    "oscillating loss": "learning_rate_too_high",
}


def check(recording: Recording) -> list[Finding]:
    """The first symptom found, and no other: it stops there to repair the run.

    Gradients count only in a run whose accuracy is not satisfying; in a regression there is no accuracy, so only a loss
    that is no number can be found.
    """
    seen: set[str] = set()
    for i, epoch in enumerate(recording.epochs):
        seen |= _gradients(recording, epoch.step)
        seen |= _accuracies(recording.epochs[: i + 1], recording)
        name = _symptom(seen)
        if name is not None:
            return [Finding(name, NAMES[name], epoch.step)]
    return []


def _symptom(seen: set[str]) -> str | None:
    """The order in which it decides; what was seen once stays seen."""
    if "non-finite" in seen:
        return "gradient explode"
    if seen & {"not converged", "slow convergence"}:
        order = ("dying ReLU", "gradient explode", "gradient vanish", "slow convergence")
        return next((name for name in order if name in seen), None)
    return "oscillating loss" if "oscillating loss" in seen else None


def _gradients(recording: Recording, step: int) -> set[str]:
    steps = [series[step] for series in recording.weights.values()]
    if not all(s.finite for s in steps) or not math.isfinite(recording.losses[step]):
        return {"non-finite"}
    norms = [s.grad_norm for s in steps if not math.isnan(s.grad_norm)]
    seen = set()
    if recording.zero_gradients[step] >= ZEROS:
        seen.add("dying ReLU")
    if norms and norms[0] > RATIO_HIGH * norms[-1]:
        seen.add("gradient explode")
    if norms and norms[0] < NORM_LOW and norms[0] < RATIO_LOW * norms[-1]:
        seen.add("gradient vanish")
    return seen


def _accuracies(epochs: Sequence[Epoch], recording: Recording) -> set[str]:
    if not math.isfinite(epochs[-1].train_loss + epochs[-1].val_loss):
        return {"non-finite"}
    # After one epoch nothing can have risen; its code would call that slow.
    if not recording.classes or len(epochs) < max(2, BEGIN * recording.epochs_planned):
        return set()
    train, val = [e.train_accuracy for e in epochs], [e.val_accuracy for e in epochs]
    seen = set()
    if min(max(train), max(val)) < SATISFIED:
        seen.add("not converged")
        # The paper asks for both: a run that is good already need not gain anything.
        if max(b - a for series in (train, val) for a, b in pairwise(series)) < GAIN:
            seen.add("slow convergence")
    if swings(train) >= SWINGS * len(train):
        seen.add("oscillating loss")
    return seen


def swings(accuracies: Sequence[float]) -> int:
    """How many local maxima lie more than zeta above the local minimum of the same number.

    Example:
        >>> swings([0.1, 0.5, 0.2, 0.6, 0.3, 0.9])
        2
    """
    inner = [(b, b - a, b - c) for a, b, c in zip(accuracies, accuracies[1:], accuracies[2:], strict=False)]
    highs = [b for b, left, right in inner if left >= 0 and right >= 0]
    lows = [b for b, left, right in inner if left <= 0 and right <= 0]
    return sum(high - low >= SWING for high, low in zip(highs, lows, strict=False))
