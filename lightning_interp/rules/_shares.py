"""Shared by `dead_filters` and `dormant_units`: the share of a layer's filters that do no work, window by window."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

from lightning_interp._options import check_number
from lightning_interp.errors import ArgumentError
from lightning_interp.rules._decay import decay_explains
from lightning_interp.rules._evidence import inputs_blamed, level, of_unpruned, pruned_share, severity_of, started_badly
from lightning_interp.rules._jumps import early_jump
from lightning_interp.rules.alert import Severity
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key

WITHERED = "See weight_decay_too_high: the weights have withered."
BAD_START = 3.0  # as in `BadStartRule.factor`
Thresholds = tuple[float, float, float]


class Share(NamedTuple):
    """What was found in one layer.

    Attributes:
        layer: Its name.
        severity: Reached by `now`.
        now: Smaller one of the shares of the last two windows (at the end: the last one), in [0, 1]; of what pruning
            left of the layer.
        born: Share of the same that has done no work in any window, the one before the first update included; where
            that is not recorded, the share in that one; None if it was not seen.
        since: Step of the first window from which on the share never fell below the lowest threshold.
        cause: Likeliest cause, None if unknown.
        alternatives: Other causes.
    """

    layer: str
    severity: Severity
    now: float
    born: float | None
    since: int
    cause: str | None
    alternatives: list[str]


def check_thresholds(info: float, warning: float, critical: float) -> None:
    """Refuses thresholds outside [0, 1] or out of order."""
    for argument, value in (("info", info), ("warning", warning), ("critical", critical)):
        check_number(argument, value, low=0, high=1)
    if not info <= warning <= critical:
        raise ArgumentError(
            f"Expected `info` <= `warning` <= `critical`, but got {info:g}, {warning:g} and {critical:g}."
        )


def find_shares(
    history: History, quantity: str, rule: str, thresholds: Thresholds, active: Collection[Key]
) -> Iterator[Share]:
    """The layers of which a threshold was reached in two windows running."""
    # After a bad start the loss leaps, and filters die, because of it, whatever the rate.
    bad_start = started_badly(history, BAD_START)
    jumped = early_jump(history) is not None and not bad_start
    for layer in history.layers(quantity):
        newest = [point.value for point in islice(history.get(quantity, layer).finite(newest_first=True), 2)]
        if len(newest) < 2:
            continue
        # At the end no second window will follow that could bear the last one out.
        now = newest[0] if history.finished else min(newest)
        pruned = pruned_share(history, layer) if quantity == "dead_fraction" else 0.0
        now = of_unpruned(now, pruned)
        severity = level(now, thresholds, severity_of(active, (rule, layer)))
        if now <= 0 or severity is None:
            continue
        points = history.finite(quantity, layer)
        born = _born(history, quantity, layer, pruned)
        below = [i for i, point in enumerate(points) if of_unpruned(point.value, pruned) < min(thresholds[0], now)]
        since = points[below[-1] + 1].step if below and below[-1] + 1 < len(points) else points[0].step
        yield Share(layer, severity, now, born, since, *_cause(history, now, born, jumped=jumped, bad_start=bad_start))


def _born(history: History, quantity: str, layer: str, pruned: float) -> float | None:
    lasting = history.get(f"born_{quantity}", layer).last
    if lasting is not None:
        return lasting.value / (1 - pruned)
    first = history.finite(quantity, layer)[0]
    return of_unpruned(first.value, pruned) if first.step == 0 else None


def _cause(
    history: History, now: float, born: float | None, *, jumped: bool, bad_start: bool
) -> tuple[str | None, list[str]]:
    """Dead from the start, or after a bad one: not the rate. Died after the loss had leapt up: the rate."""
    start = ["inputs", "initialisation"] if inputs_blamed(history) else ["initialisation", "inputs"]
    start.insert(1, "bias")
    if bad_start:
        return start[0], start[1:]
    if born is None:
        return ("learning rate", start) if jumped else (None, ["learning rate", *start])
    if born >= 0.5 * now:
        return start[0], start[1:] + (["learning rate"] if jumped else [])
    if decay_explains(history):
        return "weight decay", ["learning rate"]
    if jumped:
        return "learning rate", start
    return None, ["learning rate", "initialisation"]


def count(history: History, layer: str, share: float, *, of_unpruned: bool = False) -> str:
    """The share in words, with the number of filters where it is known; `of_unpruned`: of what pruning left.

    Example:
        >>> history = History()
        >>> history.note("num_filters", 16, layer="conv1")
        >>> count(history, "conv1", 0.25), count(history, "conv2", 0.25)
        ('4 of 16 filters (25 %)', '25 % of the filters')
    """
    total = history.fact("num_filters", 0.0, layer)
    total -= history.fact("pruned_dead", 0.0, layer) if of_unpruned else 0.0
    percent = f"{100 * share:.0f} %"
    return f"{share * total:.0f} of {total:.0f} filters ({percent})" if total else f"{percent} of the filters"
