"""Shared by several rules: whether weight decay has taken the weights away before the network could learn."""

from __future__ import annotations

import math
import statistics

from lightning_interp.rules._evidence import LEARNED, guess_loss, lowest_median, recent_loss, reference_loss
from lightning_interp.rules.history import History

SHRUNK = 0.3  # part of its first norm that a weight has left
_GROWN = 1.5  # times the first norm: a too-high rate lets the weights grow before they die


def decayed_to(history: History, *, shrunk: float = SHRUNK, part: float = LEARNED) -> float | None:
    """The part of their norm that the weights have left, where that is why nothing is learned.

    Args:
        history: The numbers so far.
        shrunk: The part below which it counts.
        part: Of what nothing learned means: a loss above it.

    Returns:
        Median over the layers that an optimizer holds; None if the weights have not shrunk so far, had grown before,
        the loss is below that or once was below half of it, or, without a cross-entropy, if no decay is known.
    """
    loss, reference = recent_loss(history), nothing_learned(history)
    if loss is None or reference is None or loss <= part * reference:
        return None
    norms = [_left_and_grown(history, layer) for layer in history.layers("weight_norm")]
    known = [norm for norm in norms if norm is not None]
    left = statistics.median(now for now, _ in known) if known else math.inf
    if left >= shrunk or statistics.median(most for _, most in known) > _GROWN:
        return None
    return None if lowest_median(history) < reference / 2 else left


def decay_explains(history: History) -> bool:
    """Whether weight decay, with the default thresholds, is behind the loss of this run."""
    return history.once("decay_explains", lambda: decayed_to(history) is not None)


def nothing_learned(history: History) -> float | None:
    """The loss that means nothing is learned: ln C, or the first loss where a decay is known; None if neither is.

    Not the first loss of a cross-entropy: a trained network that goes on begins with next to none.
    """
    guess = guess_loss(history)
    decays = history.fact("weight_decay", 0.0) > 0
    return guess if guess is not None else reference_loss(history) if decays else None


def _left_and_grown(history: History, layer: str) -> tuple[float, float] | None:
    """The norm of the weight of a layer now, and the largest that it ever had, over the first one."""
    norms = [point.value for point in history.finite("weight_norm", layer)]
    if not norms or norms[0] <= 0 or not history.fact("in_optimizer", 1.0, layer):
        return None
    return norms[-1] / norms[0], max(norms) / norms[0]
