"""Built-in rules of SageMaker Debugger with their published defaults (AWS developer guide, "Debugger built-in rules").

The code of the rules is not public. Out of the box tensors are saved every 500 steps, when most of these runs have
ended; here they are seen at the first 20 steps and every 10th. What else the guide leaves open was chosen in the rules'
favour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from benchmarks.diagnosis.peers.finding import Finding, earliest
from benchmarks.diagnosis.peers.recorder import START, Recording

RULES = frozenset(
    {"dead_filters", "non_finite", "vanishing_gradient", "learning_rate_too_high", "learning_rate_too_low",
     "overfitting", "bad_start", "untrained_layer"}
)  # fmt: skip


def check(recording: Recording) -> list[Finding]:
    """All of the rules below."""
    rules = (_relus, _tensors, _update_ratio, _unchanged, _loss_not_decreasing, _overfit, _poor_initialisation)
    return earliest(finding for rule in rules for finding in rule(recording))


def _relus(recording: Recording) -> Iterator[Finding]:
    """DeadRelu: over 50 % of a layer's ReLUs are active less than 1 % of the time. AllZero: 100 % are zeros.

    A ReLU is taken to be a channel, and its time the positions and images of a batch: of single elements, half are zero
    in any healthy network.
    """
    for steps in recording.active.values():
        for step in recording.saved:
            units = steps[step]
            if sum(share < 0.01 for share in units) / len(units) > 0.5:
                yield Finding("DeadRelu", "dead_filters", step)
            if not any(units):
                yield Finding("AllZero", "dead_filters", step)


def _tensors(recording: Recording) -> Iterator[Finding]:
    """ExplodingTensor: anything that is no number. VanishingGradient: mean of the absolute gradient below 1e-7.

    Weights only: the bias before a normalisation has no gradient but rounding errors.
    """
    for step in recording.saved:
        steps = [series[step] for series in recording.weights.values()]
        if not math.isfinite(recording.losses[step]) or not all(s.finite for s in steps):
            yield Finding("ExplodingTensor", "non_finite", step)
        if any(s.grad_mean < 1e-7 for s in steps):
            yield Finding("VanishingGradient", "vanishing_gradient", step)


def _update_ratio(recording: Recording) -> Iterator[Finding]:
    """WeightUpdateRatio: update over weight above 10 or below 1e-8; by their norms, the guide does not say.

    No update at all is UnchangedTensor's business.
    """
    for steps in recording.weights.values():
        for step in recording.saved:
            ratio = steps[step].update_norm / (steps[step].weight_norm + 1e-9)
            if ratio > 10:
                yield Finding("WeightUpdateRatio, large", "learning_rate_too_high", step)
            elif 0 < ratio < 1e-8:
                yield Finding("WeightUpdateRatio, small", "learning_rate_too_low", step)


def _unchanged(recording: Recording) -> Iterator[Finding]:
    """UnchangedTensor: a weight is the same, to 1e-5, at three saved steps one after the other."""
    saved = recording.saved
    for steps in recording.weights.values():
        for before, step in pairwise(saved):
            if steps[before].unchanged and steps[step].unchanged:
                yield Finding("UnchangedTensor", "untrained_layer", step)


def _loss_not_decreasing(recording: Recording) -> Iterator[Finding]:
    """LossNotDecreasing: the loss is no lower than 10 steps before. It names no cause that a rule of ours names.

    The rule asks for validation steps first, and there is one in each epoch. By the loss of single training batches it
    would fire in every run.
    """
    for i in range(10, len(recording.epochs), 10):
        if recording.epochs[i].val_loss >= recording.epochs[i - 10].val_loss:
            yield Finding("LossNotDecreasing", None, recording.epochs[i].step)


def _overfit(recording: Recording) -> Iterator[Finding]:
    """Overfit: the mean validation loss exceeds the mean training loss by more than 10 %, with a patience of 1."""
    for epoch in recording.epochs:
        if epoch.val_loss - epoch.train_loss > 0.1 * epoch.train_loss:
            yield Finding("Overfit", "overfitting", epoch.step)


def _poor_initialisation(recording: Recording) -> Iterator[Finding]:
    """PoorWeightInitialization: of the first 10 steps, variances, gradients and loss together.

    The variance of the inputs of ReLUs differs by more than 10 times between layers, or the 5th and 95th percentile of
    a gradient by less than 0.001; and the loss has no new minimum for 5 steps. The guide does not say how the three are
    put together; either of the first two alone is true of healthy networks.
    """
    steps = min(START, len(recording.losses))
    if steps < START or min(recording.losses[5:START]) < min(recording.losses[:5]):
        return
    for step in range(steps):
        variances = [series[step] for series in recording.relu_input_variance.values()]
        spreads = [series[step].grad_spread for series in recording.weights.values()]
        uneven = len(variances) > 1 and max(variances) > 10 * min(variances)
        if uneven or any(spread < 0.001 for spread in spreads):
            yield Finding("PoorWeightInitialization", "bad_start", START - 1)
