"""Checks of constructor arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning_interp.errors import ArgumentError

_LONGEST = 200  # characters of a value in a message


def expected(argument: str, what: str, value: object, advice: str = "") -> ArgumentError:
    """The house style of messages: "Expected argument `x` to be ..., but got ...".

    Example:
        >>> print(expected("k", "a positive integer", 0))
        Expected argument `k` to be a positive integer, but got 0.
    """
    return ArgumentError(f"Expected argument `{argument}` to be {what}, but got {_shown(value)}. {advice}".rstrip())


def _shown(value: object) -> str:
    """In one line: of tensors and arrays what they are, not what they hold."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)} and type {dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def check_positive_int(argument: str, value: Any, *, optional: bool = False) -> None:
    """Refuses everything but an integer of at least 1 (or None where `optional`)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise expected(argument, f"a positive integer{' or None' if optional else ''}", value)


def check_at_least(argument: str, value: Any, low: int) -> None:
    """Refuses everything but an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise expected(argument, f"an integer of at least {low}", value)


def check_number(argument: str, value: Any, *, low: float, high: float) -> None:
    """Refuses everything but a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise expected(argument, f"a number in [{low:g}, {high:g}]", value)


def check_share(argument: str, value: Any) -> None:
    """Refuses everything but None and a number in (0, 1]."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
        raise expected(argument, "a share above 0 and at most 1, or None", value)


def check_numbers(argument: str, value: Any, *, positive: bool = False) -> list[float] | None:
    """The numbers as a list; refuses all but None and a non-empty sequence of finite numbers, above 0 if `positive`."""
    if value is None:
        return None
    numbers = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    right = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not numbers or not right or (positive and min(numbers) <= 0):
        raise expected(argument, f"a list of {'positive ' if positive else ''}numbers or None", value)
    return [float(number) for number in numbers]


def check_scaling(mean: Any, std: Any) -> tuple[list[float] | None, list[float] | None]:
    """`mean` and `std` as lists; refuses also those of different lengths, unless one number counts for all channels."""
    means, stds = check_numbers("mean", mean), check_numbers("std", std, positive=True)
    if means and stds and len(means) != len(stds) and 1 not in {len(means), len(stds)}:
        raise expected("std", f"as long as `mean`, {len(means)} numbers, one for each channel", std)
    return means, stds


def check_bool(argument: str, value: Any) -> None:
    """Refuses everything but True and False."""
    if not isinstance(value, bool):
        raise expected(argument, "True or False", value)


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses everything but one of `choices`, and suggests the nearest one."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise expected(argument, f"one of {listed}", value, did_you_mean(str(value), choices))


def check_strings(argument: str, value: Any, *, optional: bool = True) -> None:
    """Refuses everything but a sequence of strings (any sequence: configuration tools have list types of their own)."""
    if optional and value is None:
        return
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise expected(argument, f"a list of strings{' or None' if optional else ''}", value)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A suggestion, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def select(argument: str, patterns: Sequence[str] | None, available: Sequence[str], kind: str = "layer") -> list[str]:
    """The names that match any of the globs, in their own order; all of them for None.

    Raises:
        ArgumentError: If a pattern matches nothing.

    Example:
        >>> select("layers", ["conv*"], ["conv1", "conv2", "fc"])
        ['conv1', 'conv2']
    """
    if patterns is None:
        return list(available)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in available):
            listed = ", ".join(repr(name) for name in available[:8]) + (", ..." if len(available) > 8 else "")
            raise ArgumentError(
                f"No {kind} matches {pattern!r} in argument `{argument}`. There are: {listed or 'none'}. "
                f"{did_you_mean(pattern, available)}".rstrip()
            )
    return [name for name in available if any(fnmatchcase(name, pattern) for pattern in patterns)]


def spread(names: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of the names, evenly spaced, the first and the last always among them.

    Example:
        >>> spread(["a", "b", "c", "d", "e"], 3)
        ['a', 'c', 'e']
    """
    if len(names) <= limit:
        return list(names)
    if limit == 1:
        return [names[0]]
    return [names[round(i * (len(names) - 1) / (limit - 1))] for i in range(limit)]
