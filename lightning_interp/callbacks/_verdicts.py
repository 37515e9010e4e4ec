"""What the model says about the samples, and how a picture puts it in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_interp._options import expected
from lightning_interp.callbacks.scores import class_probabilities, read_targets, sample_losses
from lightning_interp.render.color import RIGHT, WRONG
from lightning_interp.render.text import INK, Segment

Target = Literal["label", "predicted"]
TARGETS = ("label", "predicted")
# From so many samples on the captions are narrow and take two lines.
_NARROW = 5


def choose_targets(scores: Tensor, labels: Tensor | None, target: Target) -> Tensor:
    """The classes to explain: the labels, or the predicted classes, also where labels are missing.

    Args:
        scores: (N, classes).
        labels: As in `read_targets`.
        target: `"label"` or `"predicted"`.

    Returns:
        (N,) integers.
    """
    found = read_targets(labels, scores) if target == "label" else None
    return scores.argmax(dim=1) if found is None else found


class Verdict(NamedTuple):
    """What the model says about one sample.

    Attributes:
        label: Class, or None.
        predicted: The class with the highest score.
        probability: Of that class.
        loss: Cross-entropy, or None without a label.
    """

    label: int | None
    predicted: int
    probability: float
    loss: float | None


def verdicts(scores: Tensor, labels: Tensor | None) -> list[Verdict]:
    """One verdict a sample.

    Args:
        scores: (N, classes).
        labels: As in `read_targets`.
    """
    top = class_probabilities(scores, labels).max(dim=1)
    targets, losses = read_targets(labels, scores), sample_losses(scores, labels)
    nothing = torch.full((len(scores),), torch.nan)
    rows = torch.stack(
        [
            nothing if targets is None else targets.cpu().double(),
            top.indices.cpu().double(),
            top.values.cpu().double(),
            nothing if losses is None else losses.cpu().double(),
        ],
        dim=1,
    ).tolist()
    known, lost = targets is not None, losses is not None
    return [Verdict(int(row[0]) if known else None, int(row[1]), row[2], row[3] if lost else None) for row in rows]


def captions(found: Sequence[Verdict], name: Callable[[int], str]) -> list[list[list[Segment]]]:
    """Label, prediction, probability and loss of each sample, the prediction green where right and orange where wrong.

    Args:
        found: One a sample.
        name: Names a class.
    """
    return [_caption(verdict, name, narrow=len(found) >= _NARROW) for verdict in found]


def _caption(verdict: Verdict, name: Callable[[int], str], *, narrow: bool) -> list[list[Segment]]:
    color = INK if verdict.label is None else RIGHT if verdict.label == verdict.predicted else WRONG
    room = 10 if narrow else 14
    predicted = (f"predicted {_short(name(verdict.predicted), room)} ({verdict.probability:.2f})", color)
    truth = "" if verdict.label is None else f"label {_short(name(verdict.label), room)} "
    loss = "" if verdict.loss is None else f" loss {verdict.loss:.3g}"
    if narrow:
        return [[((truth + loss.strip()) or " ", INK)], [predicted]]
    return [[(truth, INK), predicted, (loss, INK)]]


def _short(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}~"


def check_baseline(value: float | str) -> None:
    """Refuses everything but `"mean"` and finite numbers."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and value == "mean"):
        raise expected("baseline", '"mean" or a number', value)
