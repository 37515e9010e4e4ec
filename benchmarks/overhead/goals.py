"""What a cost may be at most, and how that is said in a table."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.overhead import ours
from benchmarks.overhead.models import Size


@dataclass(frozen=True)
class Goal:
    """A limit.

    Attributes:
        limit: In the unit of what is measured.
        text: How it is written.
        least: Whether it is a least value; otherwise it is the largest one.

    Example:
        >>> Goal(0.05, "<= 5 %").verdict(0.06), Goal(3.0, "3 times as fast", least=True).verdict(3.0)
        ('<= 5 %: **not met**', '3 times as fast: met')
    """

    limit: float
    text: str
    least: bool = False

    def met(self, value: float) -> bool:
        """Whether a measured value is within the limit; what is not a number is not."""
        return value >= self.limit if self.least else value <= self.limit

    def verdict(self, value: float) -> str:
        """For the table."""
        return f"{self.text}: {'met' if self.met(value) else '**not met**'}"


def percent(limit: float) -> Goal:
    """At most this share."""
    return Goal(limit, f"<= {100 * limit:g} %")


SAMPLING = "sparsity and update ratios at their default sampling"

_SHARES: dict[str, dict[Size, float]] = {
    f"DeadFilters, {ours.FIRST}": {"small": 0.05, "resnet": 0.02, "gpu": 0.01},
    f"DeadFilters, {ours.NONE_DEAD}": {"small": 0.005, "resnet": 0.0005, "gpu": 0.01},
    f"DeadFilters, {ours.SOME_DEAD}": {"small": 0.03, "resnet": 0.01, "gpu": 0.01},
    SAMPLING: {"small": 0.01, "resnet": 0.007, "gpu": 0.01},
}
FIT: dict[Size, Goal] = {"small": percent(0.15), "resnet": percent(0.05)}
BETWEEN = Goal(12e-6, "<= 12 us")
OCCLUSION = Goal(3.0, "3 times as fast", least=True)
EMBEDDINGS = Goal(0.020, "<= 20 ms")
IMPORT = Goal(0.030, "<= 30 ms")


def of_step(watch: str, size: Size) -> Goal | None:
    """The largest direct share of a step; None where there is no goal."""
    shares = _SHARES.get(watch, {})
    return percent(shares[size]) if size in shares else None
