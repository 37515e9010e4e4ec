"""Labels: what is wrong with a run, from what other runs of its cell reached, from brute force, or from the injection.

A label is True, False, or None: ambiguous, or not known. Rules are never asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.diagnosis.faults import FAULTS
from benchmarks.diagnosis.spec import Spec

Label = bool | None
NO_GAIN, CLEAR_GAIN = 0.1, 0.3  # in units of the attainable fall of the loss; between them it is ambiguous
LEARNABLE = 0.8  # part of the guess: where no rate gets below it, progress means nothing
RATE_RULES = ("learning_rate_too_high", "learning_rate_too_low", "undertrained")
LABELLED = (
    "non_finite", "bad_start", *RATE_RULES, "dead_filters", "dormant_units", "untrained_layer", "overfitting",
    "vanishing_gradient", "exploding_gradient", "gradient_spike", "suspect_labels",
)  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """A run that was judged, with its labels.

    Attributes:
        spec: Of the run.
        record: Its line.
        labels: By rule.
        causes: Names of causes that are right for it, see `cause_of`.
        faulty: True, False (healthy), or None.
        progress: Share of the attainable fall of the loss; None where the cell has no ladder.
    """

    spec: Spec
    record: dict[str, Any]
    labels: dict[str, Label]
    causes: frozenset[str] = field(default_factory=frozenset)
    faulty: Label = None
    progress: float | None = None


def band(value: float, no: float, yes: float) -> Label:
    """False below `no`, True above `yes`, None between.

    Example:
        >>> band(0.05, 0.1, 0.3), band(0.2, 0.1, 0.3), band(0.4, 0.1, 0.3)
        (False, None, True)
    """
    return True if value > yes else False if value < no else None


def progress(final: float | None, guess: float, best: float) -> float:
    """Share of the way from the loss of a guess to the best loss, at least 0; 0 for a loss that is no number."""
    if final is None or not guess > best:
        return 0.0
    return max(0.0, (guess - final) / (guess - best))


def rate_labels(short: Mapping[float, float], long: Mapping[float, float]) -> dict[float, dict[str, Label]]:
    """The three labels of each rate of a cell.

    Args:
        short: Rate to progress.
        long: Rate to progress of the run three times as long; may lack some.

    Returns:
        For each rate: `learning_rate_too_high` if a lower rate gains more than 0.3, `learning_rate_too_low` if a
        higher one does, `undertrained` if the long version gains more than 0.2; not so below 0.1. A rate that is right
        at this length and wrong at three times the length, since here none has learned yet, is ambiguous.
    """
    labels: dict[float, dict[str, Label]] = {}
    for rate, reached in short.items():
        high, low = (_better(rate, short, long, side) for side in (float.__lt__, float.__gt__))
        labels[rate] = {
            "learning_rate_too_high": high,
            "learning_rate_too_low": low,
            "undertrained": band(long[rate] - reached, NO_GAIN, 0.2) if rate in long else None,
        }
    return labels


def settled(final: float | None, guess: float) -> bool:
    """Whether less than 0.1 of the attainable fall is left even if the loss fell to 0.

    No rate and no length can gain more then, whatever the best of the cell is. `final` is below 1/11 of the guess.

    Example:
        >>> settled(0.2, 2.3), settled(0.22, 2.3), settled(None, 2.3)
        (True, False, False)
    """
    return final is not None and final < NO_GAIN * (guess - final)


def long_labels(rate: float, long: Mapping[float, float], *, done: bool) -> dict[str, Label]:
    """The same for the long version of a run, from the other long versions of its cell, or by arithmetic.

    Nobody trained the lowest and the highest rate so long, nor any three times as long again. So all is False if the
    run is `settled`; otherwise only what another rate gained by more than 0.3 is known.

    Args:
        rate: Of the run.
        long: Rate to progress of the long versions.
        done: Whether the run is `settled`.
    """
    if done:
        return dict.fromkeys(RATE_RULES, False)
    high, low = (_gain(rate, long, side) > CLEAR_GAIN or None for side in (float.__lt__, float.__gt__))
    return {"learning_rate_too_high": high, "learning_rate_too_low": low, "undertrained": None}


def _better(
    rate: float,
    short: Mapping[float, float],
    long: Mapping[float, float],
    beyond: Callable[[float, float], bool],
) -> Label:
    """Whether one of the rates beyond this one, on one side, brings more."""
    now = band(_gain(rate, short, beyond), NO_GAIN, CLEAR_GAIN)
    later = rate in long and band(_gain(rate, long, beyond), NO_GAIN, CLEAR_GAIN)
    return None if now is False and later else now


def _gain(rate: float, reached: Mapping[float, float], beyond: Callable[[float, float], bool]) -> float:
    """What the best of the rates beyond this one, on one side, brings more; minus infinity where there is none."""
    return max((value for other, value in reached.items() if beyond(other, rate)), default=-math.inf) - reached[rate]


def overfitting(val_losses: Sequence[float | None], final: float | None, guess: float) -> Label:
    """Whether stopping at the best epoch would have been better: lasting rise of the validation loss above its minimum.

    By how much the lowest of the last third of the validations, at least two, is above the lowest of all: a single
    one is often high for a while, as with BatchNorm, and of a run that is still falling it is the last. In units of the
    loss of a guess: more than 0.1 is overfitting if the training loss at the end is below half of it; less than 0.03 is
    not, unless the validation loss stays more than 0.15 above the training loss: whether that is overfitting only more
    images could tell, see `memorised`. A run whose loss did not fall can't be.

    Example:
        >>> overfitting([1.0, 0.5, 0.2], 0.1, 2.3), overfitting([1.0, 0.5, 0.9, 1.0], 0.1, 2.3)
        (False, True)
    """
    values = [value for value in val_losses if value is not None]
    if final is None or final > 0.5 * guess or len(values) < 3:
        return False
    last = values[-max(2, len(values) // 3) :]
    risen = band((min(last) - min(values)) / guess, 0.03, 0.1)
    return None if risen is False and min(last) - final > 0.15 * guess else risen


def memorised(record: Mapping[str, Any], twin: Mapping[str, Any] | None) -> Label:
    """The same for a run with few images; true also if its twin with all of them does better by 0.1 in validation."""
    risen = overfitting(record["val_losses"], record["final"], record["guess"])
    if risen or twin is None or record["final"] is None or record["final"] > 0.5 * record["guess"]:
        return risen
    few, all_of_them = record["val_losses"][-1], twin["val_losses"][-1]
    if few is None or all_of_them is None:
        return None
    return band((few - all_of_them) / record["guess"], 0.03, 0.1)


def share_label(counts: Iterable[Sequence[float]], which: int) -> Label:
    """Whether a quarter of a layer or more is dead (0) or dormant (1), by brute force.

    True if it is so in the middle of the run or at its end; None if only after the first epoch, since a rule that said
    so then was right, and one that waited was right too; between a fifth and a quarter it is ambiguous.
    """
    shares = [count[which] for count in counts]
    late = band(max(shares[1:] or shares, default=0.0), 0.2, 0.2499)
    return None if late is False and max(shares, default=0.0) >= 0.2 else late


def label_all(records: Iterable[Mapping[str, Any]], plan: Mapping[str, str] | None = None) -> list[Labelled]:
    """The labels of all judged runs. A cell whose ladder is not complete yet gives no counterfactual label.

    Args:
        records: Lines of the runs.
        plan: Cell of each run that is to come, by key (`runner.read_plan`); None if `records` are all.
    """
    pairs = [(Spec.from_dict(record["spec"]), dict(record)) for record in records]
    by_key = {record["key"]: record for _, record in pairs}
    unfinished = {cell for key, cell in (plan or {}).items() if key not in by_key}
    cells: dict[str, list[tuple[Spec, dict[str, Any]]]] = {}
    for spec, record in pairs:
        if spec.fault == "none":
            cells.setdefault(spec.cell, []).append((spec, record))
    rungs = {cell: _rungs(runs) for cell, runs in cells.items() if cell not in unfinished}
    found = []
    for spec, record in pairs:
        cell = rungs.get(spec.cell, _UNKNOWN)
        reached = None if cell.best is None else progress(record["final"], record["guess"], cell.best)
        rates = cell.labels.get((spec.rate, spec.long))
        if spec.fault == "none":
            found.append(_natural(spec, record, rates, reached, _killing(spec, cells[spec.cell])))
        else:
            twin = _Twin(by_key.get(spec.twin), cell.short.get(spec.rate), rates or {})
            found.append(_injected(spec, record, reached, twin))
    return found


class _Rungs(NamedTuple):
    """What the ladder of a cell tells: the best loss of the long versions, progress by rate, and labels."""

    best: float | None
    short: Mapping[float, float]
    labels: Mapping[tuple[float, bool], dict[str, Label]]


_UNKNOWN = _Rungs(None, {}, {})


def _rungs(runs: list[tuple[Spec, dict[str, Any]]]) -> _Rungs:
    """Nothing if no rate learned anything; of a run without a ladder only that it is settled."""
    guess = runs[0][1]["guess"]
    finals = {
        long: {spec.rate: record["final"] for spec, record in runs if spec.long == long} for long in (False, True)
    }
    done = {(rate, long): settled(final, guess) for long in finals for rate, final in finals[long].items()}
    if not finals[True]:
        return _Rungs(None, {}, {key: dict.fromkeys(RATE_RULES, False) for key in done if done[key]})
    best = min((final for final in finals[True].values() if final is not None), default=math.inf)
    if best > LEARNABLE * guess:
        return _UNKNOWN
    short, long = (
        {rate: progress(final, guess, best) for rate, final in finals[kind].items()} for kind in (False, True)
    )
    found = {(rate, False): labels for rate, labels in rate_labels(short, long).items()}
    found |= {(rate, True): long_labels(rate, long, done=done[rate, True]) for rate in long}
    return _Rungs(best, short, found)


def _killing(spec: Spec, runs: list[tuple[Spec, dict[str, Any]]]) -> bool:
    """Whether a lower rate of the cell leaves less than half as many dead: then the rate is a right cause of death."""
    shares = {s.rate: max(map(max, r["counts"])) for s, r in runs if s.long == spec.long and r["counts"]}
    return any(rate < spec.rate and share < 0.5 * shares[spec.rate] for rate, share in shares.items())


def _born_dead(record: Mapping[str, Any]) -> bool:
    """Whether half of the dead or dormant were so before the first update: then the initialisation is a right cause."""
    late = max((max(count) for count in record["counts"]), default=0.0)
    return bool(late > 0 and max(record["born"]) >= 0.5 * late)


def _brute(record: Mapping[str, Any]) -> dict[str, Label]:
    """Labels that need no other run."""
    finite = bool(record["finite"])  # weights that are no numbers are neither dead nor alive
    return {
        "non_finite": not finite,
        "dead_filters": share_label(record["counts"], 0) if finite else None,
        "dormant_units": share_label(record["counts"], 1) if finite else None,
        "untrained_layer": bool(record["still"]),
        "overfitting": overfitting(record["val_losses"], record["final"], record["guess"]),
    }


def _natural(
    spec: Spec, record: dict[str, Any], rates: dict[str, Label] | None, reached: float | None, killing: bool
) -> Labelled:
    labels: dict[str, Label] = {**dict.fromkeys(LABELLED, False), **_brute(record)}
    labels |= rates or dict.fromkeys(RATE_RULES)
    if not record["watched_labels"]:
        labels["suspect_labels"] = None  # nobody looked
    if labels["learning_rate_too_high"] is not False:
        # Vanished and exploded gradients are a part of what such a rate does.
        labels |= dict.fromkeys(("vanishing_gradient", "exploding_gradient", "gradient_spike"))
    if labels["learning_rate_too_high"]:
        labels["undertrained"] = None  # more steps may help too, but that is not what is wrong
    causes = {rule for rule, label in labels.items() if label}
    if causes:  # what is ambiguous can't be a wrong cause of something that is there
        causes |= {rule for rule in RATE_RULES if labels[rule] is None}
    if killing and causes & {"dead_filters", "dormant_units"}:
        causes.add("learning_rate_too_high")
    if _born_dead(record) and causes & {"dead_filters", "dormant_units"}:
        causes.add("initialisation")
    if labels["learning_rate_too_high"]:
        causes -= {"learning_rate_too_low", "undertrained"}
    values = [label for rule, label in labels.items() if rule != "suspect_labels"]
    faulty = True if True in values else None if None in values else False
    return Labelled(spec, record, labels, frozenset(causes), faulty, reached)


class _Twin(NamedTuple):
    """The run without the fault: its line, its progress, and the labels of its rate."""

    record: dict[str, Any] | None
    progress: float | None
    labels: Mapping[str, Label]


def _injected(spec: Spec, record: dict[str, Any], reached: float | None, twin: _Twin) -> Labelled:
    fault = FAULTS[spec.fault]
    labels: dict[str, Label] = {**dict.fromkeys(LABELLED), **_brute(record)}
    if not record["watched_labels"]:
        labels["suspect_labels"] = None
    if spec.fault == "few_images":
        labels["overfitting"] = memorised(record, twin.record)
    harm = None if reached is None or twin.progress is None else twin.progress - reached
    real = _counts(spec, record, harm, labels)
    for rule in fault.rules:
        labels[rule] = real
    # What is wrong, or may be, with the twin is so here too.
    also = {rule for rule, label in twin.labels.items() if label is not False}
    return Labelled(spec, record, labels, frozenset({*fault.causes, *also}), real, reached)


def _counts(spec: Spec, record: Mapping[str, Any], harm: float | None, labels: Mapping[str, Label]) -> Label:
    """Whether the injection is a fault: by itself, by brute force where there is one, else by the harm that it does."""
    if spec.fault in {"few_images", "dead_bias"}:
        return labels["overfitting" if spec.fault == "few_images" else "dead_filters"]
    if not FAULTS[spec.fault].by_harm:
        return True
    first = record["early"][0]
    if first is None or first > 3 * record["guess"]:
        return True
    return None if harm is None else band(harm, 0.1, 0.3)


def cause_of(rule: str, cause: str | None) -> str:
    """One vocabulary for the causes that alerts name; the rule itself where the alert names none.

    Example:
        >>> cause_of("dead_filters", "learning rate"), cause_of("dead_filters", None)
        ('learning_rate_too_high', 'dead_filters')
    """
    text = (cause or "").lower()
    if "too low" in text:
        return "learning_rate_too_low"
    if "learning rate" in text and "learning rate 0" not in text:
        return "learning_rate_too_high"
    if text in {"initialisation", "bias"} or "input" in text:
        return "inputs" if "input" in text else "initialisation"
    return {"suspect_labels": "labels"}.get(rule, rule)
