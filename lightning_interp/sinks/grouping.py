"""Records by step."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_interp.records import Scalar


def by_step(scalars: Iterable[Scalar]) -> dict[int, list[Scalar]]:
    """Groups scalars by their step, in the order in which the steps appear.

    Example:
        >>> groups = by_step([Scalar(tag="a", step=3, value=1.0), Scalar(tag="b", step=3, value=2.0)])
        >>> {step: [record.tag for record in group] for step, group in groups.items()}
        {3: ['a', 'b']}
    """
    groups: dict[int, list[Scalar]] = {}
    for record in scalars:
        groups.setdefault(record.step, []).append(record)
    return groups
