"""Tells regressions by their targets: real numbers, as many as outputs, that can't be about classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SUM_TO_ONE = 1e-3  # how near


class Regression(NamedTuple):
    """What a model and the labels say where both are real numbers, K an image.

    Attributes:
        outputs: (N, K), as the model gives them.
        targets: (N, K), in float64 and on the same device.
    """

    outputs: Tensor
    targets: Tensor

    @property
    def columns(self) -> int:
        """Columns of the scores before the first output: a single one is the second of two, see `read_scores`."""
        return int(self.outputs.shape[1] == 1)


def read_regression(scores: Tensor, labels: Tensor | None) -> Regression | None:
    """The outputs and targets of a regression: as many numbers as outputs, that can't be about classes.

    About classes are zeros and ones (also smoothed: a and 1 - a), and rows of probabilities, such as one-hot ones.
    NaN and negative whole numbers say "ignore" there, so they decide nothing. One integer an image is a class: beside a
    single output it may be that of a binary task whose step puts classes together.

    Args:
        scores: (N, classes), from `read_scores`.
        labels: (N, ...), as in a batch.

    Returns:
        None if the labels are those of classes, or there are none.

    Example:
        >>> read_regression(torch.zeros(1, 2), torch.tensor([[3.5, -0.2]])).targets
        tensor([[ 3.5000, -0.2000]], dtype=torch.float64)
        >>> read_regression(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])) is None
        True
    """
    if labels is None or labels.shape[:1] != scores.shape[:1]:
        return None
    outputs = scores
    if labels.numel() == len(scores):
        if not labels.is_floating_point() or scores.shape[1] != 2 or bool((scores[:, 0] != -scores[:, 1]).any()):
            return None
        outputs = 2 * scores[:, 1:]  # `read_scores` has made two columns of one
    if labels.numel() != outputs.numel():
        return None
    targets = labels.detach().reshape(outputs.shape).to(outputs.device, torch.float64)
    return None if about_classes(targets) else Regression(outputs, targets)


def about_classes(targets: Tensor) -> bool:
    """Whether numbers (N, K) say which of K classes an image shows, see `read_regression`."""
    given = targets[~(targets.isnan() | ((targets < 0) & (targets == targets.round())))]
    if not given.numel() or bool(((given == 0) | (given == 1)).all()):
        return True
    low, high = given.aminmax()
    if bool(low < 0) or bool(high > 1):
        return False
    smoothed = ((given == low) | (given == high)).all() & ((low + high - 1).abs() < _SUM_TO_ONE)
    rows = targets[targets.isfinite().all(dim=1)]
    shares = targets.shape[1] > 1 and bool(((rows.sum(dim=1) - 1).abs() < _SUM_TO_ONE).all())
    return bool(smoothed) or shares
