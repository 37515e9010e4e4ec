"""Tables in Markdown, and how numbers stand in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.overhead.timing import Pairs


def markdown(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A heading and a table.

    Example:
        >>> print(markdown("T", ["a", "b"], [["1", "x | y"]]))
        ### T
        <BLANKLINE>
        | a | b |
        |---|---|
        | 1 | x \| y |
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return f"### {title}\n\n" + "\n".join(lines)


def share(value: float) -> str:
    """A share in percent, with two significant figures below ten.

    Example:
        >>> share(0.12345), share(0.0234), share(0.00005), share(0.0)
        ('12 %', '2.3 %', '0.0050 %', '0 %')
    """
    value *= 100
    if not math.isfinite(value) or value == 0:
        return f"{value:g} %"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f} %"


def ratio(pairs: Pairs) -> str:
    """Median and quartiles.

    Example:
        >>> ratio(Pairs([1.0, 1.0, 1.0], [1.0, 1.1, 1.3]))
        '1.10 (1.05-1.20)'
    """
    low, high = pairs.quartiles
    return f"{pairs.ratio:.2f} ({low:.2f}-{high:.2f})"


def duration(seconds: float) -> str:
    """In the unit that suits it.

    Example:
        >>> duration(2.5), duration(0.0123), duration(0.0000081)
        ('2.50 s', '12.3 ms', '8.1 us')
    """
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{1e3 * seconds:.1f} ms"
    return f"{1e6 * seconds:.1f} us"
