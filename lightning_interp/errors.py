"""Exceptions and warnings that a user of the package can see."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument is wrong. Raised at once, in `__init__` or `setup`, and never swallowed."""


class AlertRaised(RuntimeError):  # noqa: N818 - it is what the user asked for, not an error of the package
    """An alert came up and the user asked for `on_alert="raise"`."""


class InterpWarning(UserWarning):
    """A callback can't do (part of) its work; training goes on."""
