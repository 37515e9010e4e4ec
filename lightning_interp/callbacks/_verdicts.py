"""What the model says about the samples, and how a picture puts it in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_interp._options import expected
from lightning_interp.callbacks._regression import read_regression
from lightning_interp.callbacks.scores import class_probabilities, read_targets, sample_losses
from lightning_interp.render.color import RIGHT, WRONG
from lightning_interp.render.text import INK, Segment

Target = Literal["label", "predicted"]
TARGETS = ("label", "predicted")
# From so many samples on the captions are narrow and take two lines.
_NARROW = 5


def choose_targets(scores: Tensor, labels: Tensor | None, target: Target, *, first: int = 0) -> Tensor:
    """The classes to explain: the labels, or the predicted classes, also where labels are missing.

    Of a regression each sample shows another output, the same one all along: none is the right or the chosen one.

    Args:
        scores: (N, classes).
        labels: As in `read_targets`.
        target: `"label"` or `"predicted"`; makes no difference for a regression.
        first: Number of the first of these samples among all.

    Returns:
        (N,) integers.
    """
    numbers = read_regression(scores, labels)
    if numbers is not None:
        rows = torch.arange(first, first + len(scores), device=scores.device)
        return rows % numbers.outputs.shape[1] + numbers.columns
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


class Reading(NamedTuple):
    """What the model says about one sample of a regression.

    Attributes:
        output: The output that is shown; None where there is only one.
        value: Of that output.
        target: What it should be; NaN if that is not known.
    """

    output: int | None
    value: float
    target: float


def verdicts(scores: Tensor, labels: Tensor | None, targets: Tensor) -> Sequence[Verdict | Reading]:
    """One verdict a sample; of a regression a reading of the output that is explained.

    Args:
        scores: (N, classes).
        labels: As in `read_targets`.
        targets: (N,), from `choose_targets`.
    """
    numbers = read_regression(scores, labels)
    if numbers is not None:
        # A part of the samples that by chance holds zeros and ones only was taken for classes.
        shown = (targets.to(numbers.outputs.device)[:, None] - numbers.columns).clamp(min=0)
        pairs = torch.cat([each.double().gather(1, shown) for each in numbers], dim=1).tolist()
        several = numbers.outputs.shape[1] > 1
        return [
            Reading(int(at) if several else None, *pair) for at, pair in zip(shown[:, 0].tolist(), pairs, strict=True)
        ]
    return _verdicts(scores, labels)


def _verdicts(scores: Tensor, labels: Tensor | None) -> list[Verdict]:
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


def captions(found: Sequence[Verdict | Reading], name: Callable[[int], str]) -> list[list[list[Segment]]]:
    """Label, prediction, probability and loss of each sample, the prediction green where right and orange where wrong.

    Args:
        found: One a sample.
        name: Names a class.
    """
    narrow = len(found) >= _NARROW
    return [
        _reading(each, name, narrow=narrow) if isinstance(each, Reading) else _caption(each, name, narrow=narrow)
        for each in found
    ]


def output_name(index: int | None, name: Callable[[int], str]) -> str:
    """What an output of a regression is called: as the user does, else "output 2", or "output" where there is one."""
    given = name(index or 0)
    if given != str(index or 0):
        return given
    return "output" if index is None else f"output {index}"


def _reading(reading: Reading, name: Callable[[int], str], *, narrow: bool) -> list[list[Segment]]:
    said = f"{_short(output_name(reading.output, name), 14)}: {reading.value:.3g}"
    target = "" if math.isnan(reading.target) else f"target {reading.target:.3g}"
    return [[(said, INK)], [(target or " ", INK)]] if narrow else [[(f"{said} {target}", INK)]]


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
