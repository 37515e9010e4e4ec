"""Remedies: from an alert to what its advice says to do, as a short text that is a part of a specification.

A text is `none` or items joined by `+`, done in this order, each a name with or without an argument:

| item | what is done |
|---|---|
| `rate:F` | the largest learning rate times F |
| `steps:F` | F times as many epochs |
| `clip:N` | the norm of the gradient clipped to N |
| `skip:S` | the batch of step S left out |
| `finite` | images with NaN or infinite values left out |
| `inputs:M,S` | M subtracted from the images, and divided by S; without numbers, the mean and deviation they have |
| `images` | all images there are; if the run has them already, augmentation |
| `stop:S` | training ended with the epoch that is over nearest to step S |
| `labels:P` | the part P of the images that looks most suspicious looked through, and wrong labels put right |
| `pairs` | a few images looked at with their labels, and all labels put right if most of these are wrong |
| `init` | PyTorch's initialisation with zero bias, in the whole network |
| `small_last` | the last layer divided by 10 |
| `divide:F` | all weights divided by F |
| `normalise` | BatchNorm behind each convolution that has no normalisation |
| `relu` | ReLU instead of sigmoid and tanh |
| `train:L` | layer L not frozen, and held by the optimizer; without a name, all layers |

What was injected is never asked: all follows from the alert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Alert, Evidence = Mapping[str, Any], Mapping[str, float]
NONE = "none"
FACTORS = {"rate": "advised_rate_factor", "steps": "advised_steps_factor"}
# A person who looks through the ranked list goes on for a while after the number of wrong labels that was named.
FURTHER = 1.5
_NUMBER = r"(-?\d[\d.]*(?:e[+-]?\d+)?)"
_START = {"initialisation", "bias"}


def items(text: str) -> list[tuple[str, str]]:
    """Names and arguments.

    Example:
        >>> items("rate:0.1+init")
        [('rate', '0.1'), ('init', '')]
    """
    if text == NONE:
        return []
    return [(name, argument) for name, _, argument in (item.partition(":") for item in text.split("+"))]


def arguments(text: str, name: str) -> list[str]:
    """The arguments of all items of that name, in order."""
    return [argument for other, argument in items(text) if other == name]


def factor(text: str, name: str) -> float:
    """Product of the factors of that name; 1 without any."""
    return math.prod(map(float, arguments(text, name)))


def combine(first: str, second: str) -> str:
    """Both, one after the other: factors are multiplied, and what is done already isn't done again.

    Example:
        >>> combine("rate:0.1+init", "rate:0.5+init+steps:3")
        'rate:0.05+steps:3+init'
    """
    both = items(first) + items(second)
    products = {name: math.prod(float(a) for other, a in both if other == name) for name in FACTORS}
    parts = [f"{name}:{product:.4g}" for name, product in products.items() if product != 1]
    rest = dict.fromkeys(f"{name}:{argument}".rstrip(":") for name, argument in both if name not in FACTORS)
    return "+".join([*parts, *rest]) or NONE


def remedy_for(alert: Alert | None, alerts: Sequence[Alert] = (), done: str = NONE) -> str | None:
    """What is done in all after this alert: its first proposal that is not a part of `done`; None without any.

    Args:
        alert: The primary one.
        alerts: All of the run; one may refer to another.
        done: Remedy of the run itself.
    """
    texts = [combine(done, proposal) for proposal in proposals(alert, alerts)] if alert is not None else []
    return next((text for text in texts if text not in {done, NONE}), None)


def proposals(alert: Alert, alerts: Sequence[Alert] = ()) -> list[str]:
    """What the alert proposes, in the order of its advice."""
    evidence = _numbers(alert)
    factors = [f"{name}:{evidence[key]:.4g}" for name, key in FACTORS.items() if evidence.get(key, 0.0) > 0]
    if factors:
        return ["+".join(factors)]
    if alert["cause"] == "inputs":
        return [_inputs(evidence, alert["advice"])]
    special = _BY_RULE.get(alert["rule"])
    found = [] if special is None else special(alert, evidence, alerts)
    return found or (["init"] if alert["cause"] in _START else _in_words(alert["advice"]))


def _numbers(alert: Alert) -> Evidence:
    evidence = alert.get("evidence") or {}
    return {name: value for name, value in evidence.items() if value is not None and math.isfinite(value)}


def _inputs(evidence: Evidence, advice: str) -> str:
    named = re.search(rf"subtract {_NUMBER} and divide by {_NUMBER}", advice)
    if named is not None:
        return f"inputs:{named[1].rstrip('.')},{named[2].rstrip('.')}"
    if evidence.get("input_std", 0.0) > 0 and "input_mean" in evidence:
        return f"inputs:{evidence['input_mean']:.4g},{evidence['input_std']:.4g}"
    return "finite" if "NaN" in advice else "inputs"


def _batch(alert: Alert, evidence: Evidence, _: Sequence[Alert]) -> list[str]:
    """Without a cause too, a NaN sends the reader to the batch of its step first."""
    step = evidence.get("first_step", evidence.get("spike_step"))
    return [f"skip:{step:.0f}"] if alert["cause"] in {"bad batch", None} and step is not None else []


def _bad_start(alert: Alert, _: Evidence, __: Sequence[Alert]) -> list[str]:
    return ["init+small_last"]


def _dead(alert: Alert, _: Evidence, __: Sequence[Alert]) -> list[str]:
    return ["init", "normalise"] if alert["cause"] in _START else []


def _vanishing(alert: Alert, _: Evidence, __: Sequence[Alert]) -> list[str]:
    return ["init", "normalise"] if alert["cause"] in _START else ["normalise", "relu"]


def _exploding(alert: Alert, evidence: Evidence, _: Sequence[Alert]) -> list[str]:
    if "earlier_gradient_norm" in evidence:
        return [f"clip:{evidence['earlier_gradient_norm']:.2g}", "rate:0.333"]
    steep = re.search(rf"grows {_NUMBER} times a layer", alert["advice"])
    return [f"divide:{steep[1]}" if steep else "init", "normalise", "clip:1"]


def _untrained(alert: Alert, _: Evidence, __: Sequence[Alert]) -> list[str]:
    known = alert["cause"] in {"requires_grad=False", "in no optimizer"}
    return [f"train:{alert['layer'] or ''}".rstrip(":")] if known else []


def _labels(alert: Alert, _: Evidence, __: Sequence[Alert]) -> list[str]:
    return _list_of([alert]) if alert["cause"] == "wrong labels" else ["pairs"]


def _list_of(alerts: Iterable[Alert]) -> list[str]:
    """The part of the ranked list that is looked through, for the largest estimate."""
    found = [_numbers(alert).get("share", 0.0) for alert in alerts if alert["rule"] == "suspect_labels"]
    return [f"labels:{min(1.0, FURTHER * max(found)):.3g}"] if max(found, default=0.0) > 0 else []


def _overfitting(alert: Alert, evidence: Evidence, alerts: Sequence[Alert]) -> list[str]:
    texts = _list_of(alerts) if "wrong labels" in (alert["cause"] or "") else []
    # Both kinds name the step of the best validation loss, but only the one that rises says to stop there.
    if re.search(r"\bstop near", alert["advice"], re.IGNORECASE) and "best_step" in evidence:
        texts.append(f"stop:{evidence['best_step']:.0f}")
    return [*texts, "images"]


_BY_RULE: dict[str, Callable[[Alert, Evidence, Sequence[Alert]], list[str]]] = {
    "non_finite": _batch,
    "gradient_spike": _batch,
    "bad_start": _bad_start,
    "dead_filters": _dead,
    "vanishing_gradient": _vanishing,
    "exploding_gradient": _exploding,
    "untrained_layer": _untrained,
    "suspect_labels": _labels,
    "overfitting": _overfitting,
}


def _in_words(advice: str) -> list[str]:
    """The first of the factors that the sentence names; for alerts that have none in their evidence."""
    named = [
        (re.search(rf"divide the learning rate by about {_NUMBER}", advice, re.IGNORECASE), "rate", True),
        (re.search(rf"raise the learning rate by about {_NUMBER}", advice, re.IGNORECASE), "rate", False),
        (re.search(rf"a rate {_NUMBER} times lower", advice, re.IGNORECASE), "rate", True),
        (re.search(rf"train about {_NUMBER} times as long", advice, re.IGNORECASE), "steps", False),
    ]
    found = []
    for match, name, divided in named:
        if match is not None and (value := float(match[1].rstrip("."))) > 0:
            found.append((match.start(), f"{name}:{1 / value if divided else value:.4g}"))
    return [text for _, text in sorted(found)[:1]]
