"""The numbers of a run so far, as plain lists: all that a rule may look at.

No torch, no Lightning: a rule is tested by writing a history down by hand.

`step` is everywhere the index of the training step on the axis of `self.log`, from 0; a value measured before the first
update stands at step 0.

| series | per layer | what |
|---|---|---|
| `loss` | no | training loss of each step, as `training_step` returned it |
| `loss_peak` | no | each loss that is larger than all before it (in `loss`, later ones are averaged) |
| `loss_before`, `loss_after` | no | loss of one batch before and after the update that it caused (probed steps) |
| `step_ratio` | no | (loss_before - loss_after) / predicted fall; 1 = as the gradient promised, < 0 = overshoot |
| `learning_rate` | no | largest rate of all parameter groups |
| `gradient_norm` | both | Euclidean norm of the unscaled gradient, before clipping (probed steps) |
| `update_norm`, `update_ratio` | yes | norm(after - before), and the same over norm(before) (probed steps) |
| `weight_norm` | yes | norm of the weights of two or more axes, before the step (probed steps) |
| `dead_fraction`, `dead_filters` | yes | of each window; the first one is the window before the first update |
| `born_dead_fraction` | yes | of each window: dead in it and in all before, the first one included; not pruned |
| `dormant_fraction` | yes | of each window, where nothing is exactly zero |
| `sparsity` | yes | fraction of exact zeros |
| `validation_metric` | by name | what the user logged, as it stood at the end of each validation |
| `statistics_lag`, `weights_lag` | no | how far these raise the loss of a doubtful validation |
| `training_statistics_lag` | no | how far running statistics raise the loss of training images then |
| `class_image_augmented` | by class | probability of the class for its own image under augmentation |
| `knn_accuracy` | no | share of the points that lie among their own class in the embedding |
| `suspect_label_share` | no | estimated share of wrong training labels, in [0, 1]; once an epoch or event |
| `label_recognition` | no | how well neighbours in the embedding know the labels: 0 at chance, 1 always right |
| `filter_smoothness`, `filter_entropy`, `filter_movement` | yes | of the weights; the first one is at step 0 |

| fact | per layer | what |
|---|---|---|
| `num_classes` | no | known only if the loss is a cross-entropy: then ln(num_classes) is the loss of a guess |
| `soft_targets` | no | 1 if the loss is a cross-entropy of targets that are no indices: its floor is not known |
| `scores_normalised` | no | 1 if the scores that go into the cross-entropy are probabilities already |
| `weight_decay` | no | largest of all parameter groups, 0 if they have none |
| `planned_steps` | no | steps that the run is going to take; infinity if unknown |
| `input_mean`, `input_std` | no | of the images of the first training batch |
| `train_samples` | no | images of the training set whose loss is collected, on all ranks |
| `validation_samples` | no | samples that one validation looks at, on all ranks, if that is known |
| `label_anchors` | no | points on which the newest `suspect_label_share` rests |
| `non_finite_step` | both | first step at which the loss (no layer), a gradient or a weight was NaN or infinite |
| `trainable` | yes | 1 if a parameter of the layer has `requires_grad=True`, else 0 |
| `in_optimizer` | yes | 1 if an optimizer holds a parameter of the layer, else 0 |
| `num_filters` | yes | filters (units) of the layer |
| `pruned_dead` | yes | dead filters of the layer that pruning took out whole |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")


class Point(NamedTuple):
    """One measured value.

    Attributes:
        step: Index of the step at which it was measured, from 0.
        value: The number.
    """

    step: int
    value: float


@dataclass
class Series:
    """One quantity over time in bounded memory.

    The first `head` points are kept for ever, since a too-high learning rate does its damage in them; when the rest
    exceeds `capacity`, neighbours are averaged in pairs, so the spacing doubles and the memory stays bounded. The
    newest ones wait as they are until they are enough for one point; of more than `capacity` the older half is
    averaged, too.

    Attributes:
        points: All that is kept, oldest first.
        head: Number of early points that are never merged.
        capacity: Most points that are kept.
    """

    points: list[Point] = field(default_factory=list)
    head: int = 128
    capacity: int = 1024
    _stride: int = 1
    _pending: list[Point] = field(default_factory=list)
    _folded: int = 1  # values of which the oldest one that waits is the mean

    def append(self, step: int, value: float) -> None:
        """Adds one point; steps must not decrease."""
        if self._stride == 1:
            self.points.append(Point(step, value))
        else:
            self._pending.append(Point(step, value))
            if len(self._pending) + self._folded - 1 == self._stride:
                self.points.append(_average(self._pending, self._folded))
                self._pending, self._folded = [], 1
            elif len(self._pending) > self.capacity:
                half = self.capacity // 2
                self._pending[:half] = [_average(self._pending[:half], self._folded)]
                self._folded += half - 1
        if len(self.points) > self.capacity:
            early, late = self.points[: self.head], self.points[self.head :]
            # An odd one out stays as it is: it is the newest, and the next merge takes it.
            merged = [_average(late[i : i + 2]) for i in range(0, len(late), 2)]
            self.points = early + merged
            self._stride *= 2

    @property
    def steps(self) -> list[int]:
        """Steps of the kept points, with those not yet merged."""
        return [point.step for point in self]

    @property
    def values(self) -> list[float]:
        """Values of the kept points, with those not yet merged."""
        return [point.value for point in self]

    @property
    def first(self) -> Point | None:
        """The oldest point."""
        return next(iter(self), None)

    @property
    def last(self) -> Point | None:
        """The newest point."""
        if self._pending:
            return self._pending[-1]
        return self.points[-1] if self.points else None

    def __iter__(self) -> Iterator[Point]:
        return chain(self.points, self._pending)

    def finite(self, *, newest_first: bool = False) -> Iterator[Point]:
        """The points whose value is a number, one by one: whoever needs the first ones only reads no more."""
        parts = (reversed(self._pending), reversed(self.points)) if newest_first else (self.points, self._pending)
        return (point for point in chain(*parts) if math.isfinite(point.value))

    def __len__(self) -> int:
        return len(self.points) + len(self._pending)


def _average(points: list[Point], weight: int = 1) -> Point:
    """The mean, at the last step; the first point counts `weight` times."""
    total = sum(point.value for point in points)
    if weight > 1:
        total += (weight - 1) * points[0].value
    return Point(points[-1].step, total / (len(points) + weight - 1))


@dataclass
class History:
    """What is known of a run.

    Attributes:
        series: By quantity and layer (None = the whole run). The quantities are listed at the head of this file.
        facts: Numbers that do not change, or only the newest of which matters: `num_classes`, `planned_steps`, ...
        step: Index of the newest step, from 0.
        epoch: Current epoch, from 0.
        finished: Whether the training has ended as planned (not: was interrupted).
    """

    series: dict[tuple[str, str | None], Series] = field(default_factory=dict)
    facts: dict[tuple[str, str | None], float] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    finished: bool = False
    _known: dict[Hashable, Any] | None = field(default=None, repr=False, compare=False)

    def record(self, quantity: str, value: float, *, step: int, layer: str | None = None) -> None:
        """Appends one value to a series."""
        self.series.setdefault((quantity, layer), Series()).append(step, float(value))
        self.step = max(self.step, step)

    def record_peak(self, quantity: str, value: float, *, step: int) -> None:
        """Appends a finite value to a series if it is larger than the last one there."""
        last = self.get(quantity).last
        if math.isfinite(value) and (last is None or value > last.value):
            self.record(quantity, value, step=step)

    def note(self, fact: str, value: float, *, layer: str | None = None) -> None:
        """Sets a fact."""
        self.facts[fact, layer] = float(value)

    def get(self, quantity: str, layer: str | None = None) -> Series:
        """The series, empty when nothing was recorded."""
        series = self.series.get((quantity, layer))
        return Series() if series is None else series

    def finite(self, quantity: str, layer: str | None = None) -> list[Point]:
        """The points of a series whose value is a number, oldest first; not to be changed.

        Example:
            >>> history = History()
            >>> history.record("loss", 2.0, step=0)
            >>> history.record("loss", math.nan, step=1)
            >>> history.finite("loss")
            [Point(step=0, value=2.0)]
        """
        return self.once(("finite", quantity, layer), lambda: list(self.get(quantity, layer).finite()))

    def fact(self, fact: str, default: float, layer: str | None = None) -> float:
        """The fact, or `default`."""
        return self.facts.get((fact, layer), default)

    def layers(self, quantity: str) -> list[str]:
        """Layers for which the series or the fact exists, in the order in which they were first recorded."""
        return list(self.once(("layers",), self._layers).get(quantity, ()))

    def _layers(self) -> dict[str, dict[str, None]]:
        """Quantity to its layers, in order."""
        found: dict[str, dict[str, None]] = {}
        for name, layer in chain(self.series, self.facts):
            if layer is not None:
                found.setdefault(name, {})[layer] = None
        return found

    def look(self) -> History:
        """The same numbers for one look, during which nothing changes: what rules have in common is done once."""
        return History(self.series, self.facts, self.step, self.epoch, self.finished, _known={})

    def once(self, key: Hashable, work: Callable[[], _T]) -> _T:
        """What `work` gives; within a look (see `look`), that of the first call with this key."""
        if self._known is None:
            return work()
        if key not in self._known:
            self._known[key] = work()
        result: _T = self._known[key]
        return result

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, safe in a checkpoint."""
        return {
            "series": [
                [quantity, layer, s._stride, [list(p) for p in s.points], [list(p) for p in s._pending], s._folded]
                for (quantity, layer), s in self.series.items()
            ],
            "facts": [[fact, layer, value] for (fact, layer), value in self.facts.items()],
            "step": self.step,
            "epoch": self.epoch,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.series = {}
        for quantity, layer, stride, points, pending, *folded in state["series"]:
            series = Series([Point(*p) for p in points], _stride=stride, _pending=[Point(*p) for p in pending])
            series._folded = folded[0] if folded else 1  # earlier versions folded nothing
            self.series[quantity, layer] = series
        self.facts = {(fact, layer): value for fact, layer, value in state["facts"]}
        self.step, self.epoch, self.finished = state["step"], state["epoch"], state["finished"]
