"""What a peer says of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """One statement.

    Attributes:
        name: What the peer calls it.
        rule: The rule of ours that says the same; None where there is none, then no label can call it false.
        step: When it was said.
    """

    name: str
    rule: str | None
    step: int


def earliest(findings: Iterable[Finding]) -> list[Finding]:
    """Each statement once, at its first step, in the order of the steps.

    Example:
        >>> earliest([Finding("dead", "dead_filters", 20), Finding("dead", "dead_filters", 10)])
        [Finding(name='dead', rule='dead_filters', step=10)]
    """
    first: dict[tuple[str, str | None], Finding] = {}
    for finding in sorted(findings, key=lambda f: f.step):
        first.setdefault((finding.name, finding.rule), finding)
    return list(first.values())
