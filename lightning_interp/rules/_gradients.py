"""What several rules read from the gradient norms of the probed steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from itertools import takewhile
from typing import NamedTuple

from lightning_interp.rules.history import History


class LayerGradient(NamedTuple):
    """The gradient of one layer, medians over the newest probes.

    Attributes:
        layer: Its name.
        share: Its norm over that of the gradient of all parameters, in (0, 1].
        sensitivity: Norm of the gradient times norm of the weights, in units of the loss: what the loss would change
            by, to first order, if the weights changed by their own size along the gradient. NaN if it is not known.
    """

    layer: str
    share: float
    sensitivity: float


def layer_gradients(history: History, probes: int) -> list[LayerGradient]:
    """Trainable layers with a gradient, in the order of the model; those whose gradient is exactly 0 are left out.

    Neither the share nor the sensitivity depends on how the loss is scaled against the weights: multiplying the loss
    multiplies all gradients, and a layer whose weights are twice as large, with an output halved behind it, has half
    the gradient.
    """
    total = dict(history.finite("gradient_norm")[-probes:])
    found = []
    for layer in history.layers("gradient_norm"):
        norms = _at(history, "gradient_norm", layer, total)
        shares = [norms[step] / value for step, value in total.items() if step in norms and value > 0]
        if not history.fact("trainable", 1.0, layer) or not shares or statistics.median(shares) <= 0:
            continue
        weights = _weight_norms(history, layer, total)
        products = [norms[step] * weights[step] for step in total if step in norms and step in weights]
        sensitivity = statistics.median(products) if products else math.nan
        found.append(LayerGradient(layer, statistics.median(shares), sensitivity))
    return found


def _weight_norms(history: History, layer: str, steps: Collection[int]) -> dict[int, float]:
    """By step: norm(update) / (norm(update) / norm(weight)). Biases count in the first of the two, so about."""
    updates = _at(history, "update_norm", layer, steps)
    ratios = _at(history, "update_ratio", layer, steps)
    return {step: updates[step] / ratio for step, ratio in ratios.items() if ratio > 0 and step in updates}


def _at(history: History, quantity: str, layer: str, steps: Collection[int]) -> dict[int, float]:
    """The values at these steps, read from the newest one back: the steps are few and late, the layers may be many."""
    first = min(steps, default=math.inf)
    newest = history.get(quantity, layer).finite(newest_first=True)
    return {step: value for step, value in takewhile(lambda point: point.step >= first, newest) if step in steps}
