"""An alert: what is wrong, where, since when, how we know, and what to do."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One finding of one rule, for one layer or for the whole run.

    Attributes:
        rule: Name of the rule, for example `learning_rate_too_high`.
        severity: `info`, `warning` or `critical`.
        status: `raised` when it appears, `cleared` when it no longer holds.
        layer: Name of the layer in `named_modules()`, or None for the whole run.
        epoch: Epoch in which the status changed, from 0.
        step: Optimizer step at which the status changed, from 0.
        value: The number that the rule compared.
        threshold: What it was compared with.
        cause: The likeliest cause, or None when it is unknown.
        message: One sentence: what was seen.
        advice: One sentence: what to do.
        evidence: The numbers behind it, by name.
        alternatives: Other causes that the evidence allows, likeliest first.
        source: Where the rule comes from: author, year, section.
    """

    rule: str
    severity: Severity
    status: Literal["raised", "cleared"] = "raised"
    layer: str | None = None
    epoch: int = 0
    step: int = 0
    value: float = math.nan
    threshold: float = math.nan
    cause: str | None = None
    message: str = ""
    advice: str = ""
    evidence: dict[str, float] = field(default_factory=dict)
    alternatives: list[str] = field(default_factory=list)
    source: str = ""

    @property
    def key(self) -> tuple[str, str | None]:
        """What makes two alerts the same one: the rule and the layer."""
        return self.rule, self.layer

    def to_json(self) -> str:
        """One line of strict JSON; NaN and infinities become the strings "NaN", "Infinity", "-Infinity"."""
        return json.dumps(_strict(asdict(self)), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Alert:
        """The inverse of `asdict` and of `json.loads(alert.to_json())`."""
        numbers = {name: float(values[name]) for name in ("value", "threshold")}
        evidence = {name: float(value) for name, value in values["evidence"].items()}
        return cls(**{**values, **numbers, "evidence": evidence})


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: spell them, so that every parser can read the line."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
