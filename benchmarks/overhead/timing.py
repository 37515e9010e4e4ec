"""Clocks, the time spent inside chosen functions, and pairs of measurements taken in turn."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Now = Callable[[], float]
_CALIBRATION = 1000  # empty calls


def clock_for(device: str) -> Now:
    """Processor time of this process, in seconds; on a GPU the wall time at which all its work is done."""
    return time.process_time if device == "cpu" else _synchronised


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Processor time spent inside the functions that it wraps; of nested ones only the outermost counts."""

    def __init__(self) -> None:
        self._depth = 0
        self._seconds = 0.0
        self._bias = 0.0
        self._bias = self._calibrate()

    def _calibrate(self) -> float:
        """What the clock itself takes of each call, in seconds."""
        empty = self.wrap(lambda: None)
        for _ in range(_CALIBRATION):
            empty()
        return self.take() / _CALIBRATION

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with its time counted."""

        @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds += time.process_time() - started - self._bias
                self._depth -= 1

        return timed

    def take(self) -> float:
        """Seconds since this was last asked."""
        seconds, self._seconds = max(0.0, self._seconds), 0.0
        return seconds


@dataclass(frozen=True)
class Pairs:
    """Times of two things done in turn, in seconds: without and with, or theirs and ours.

    Example:
        >>> found = Pairs([1.0, 2.0, 4.0], [1.5, 2.0, 8.0])
        >>> found.ratio, found.quartiles
        (1.5, (1.25, 1.75))
    """

    plain: list[float]
    other: list[float]

    @property
    def ratios(self) -> list[float]:
        """Of each pair, with over without."""
        return [other / plain for plain, other in zip(self.plain, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the pairs."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the ratios; of fewer than two pairs both are the ratio."""
        if len(self.plain) < 2:
            return self.ratio, self.ratio
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return round(low, 6), round(high, 6)

    @property
    def median_plain(self) -> float:
        """Seconds."""
        return statistics.median(self.plain)

    @property
    def median_other(self) -> float:
        """Seconds."""
        return statistics.median(self.other)


def take_turns(
    plain: Callable[[], float], other: Callable[[], float], *, most: int, least: int = 1, seconds: float = float("inf")
) -> Pairs:
    """Calls both in turn, each first every other time, so that drift of the machine hits both.

    Args:
        plain: Does one thing, and returns its time in seconds.
        other: Does the other.
        most: Most pairs.
        least: Fewest pairs, however long they take.
        seconds: Further pairs begin only until all of them together have taken so long.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(most):
        if turn >= least and sum(map(sum, times)) >= seconds:
            break
        for which in (turn % 2, 1 - turn % 2):
            times[which].append((plain, other)[which]())
    return Pairs(*times)


def timed(call: Callable[[], Any], now: Now) -> Callable[[], float]:
    """A function that makes the call and returns how long it took, in seconds."""

    def run() -> float:
        started = now()
        call()
        return now() - started

    return run
