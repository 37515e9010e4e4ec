"""Shared by several rules: whether weight decay has taken the weights away before the network could learn."""

from __future__ import annotations

import statistics

from lightning_interp.rules._evidence import LEARNED, recent_loss, reference_loss
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
        or the loss has come down all the same.
    """
    loss, reference = recent_loss(history), reference_loss(history)
    if loss is None or reference is None or loss <= part * reference:
        return None
    left, most = [], []
    for layer in history.layers("weight_norm"):
        norms = history.get("weight_norm", layer)
        first, last = next(norms.finite(), None), next(norms.finite(newest_first=True), None)
        if first is not None and last is not None and first.value > 0 and history.fact("in_optimizer", 1.0, layer):
            left.append(last.value / first.value)
            most.append(layer)
    if not left or statistics.median(left) >= shrunk:
        return None
    return statistics.median(left) if statistics.median(_growth(history, layer) for layer in most) <= _GROWN else None


def decay_explains(history: History) -> bool:
    """Whether weight decay, with the default thresholds, is behind the loss of this run."""
    return history.once("decay_explains", lambda: decayed_to(history) is not None)


def _growth(history: History, layer: str) -> float:
    """The largest norm that the weight of a layer ever had, over the first one."""
    norms = [point.value for point in history.finite("weight_norm", layer)]
    return max(norms) / norms[0]
