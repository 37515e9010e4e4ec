"""Alerts as text: lines for the log, Markdown tables for TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from lightning_interp.render.markdown import escape, one_line
from lightning_interp.rules.alert import Alert

LISTED = 8  # layers named in one line
COLUMNS = ("alert", "what was seen", "what to do")
TOGETHER = 3  # alerts of one rule and severity that get a line each; more share one


def log_lines(alerts: Iterable[Alert]) -> list[tuple[int, str]]:
    """One readable line for each alert, with its logging level; many alike share a line.

    Example:
        >>> alert = Alert(rule="dead_filters", severity="warning", layer="conv1", step=9, message="Half are dead.")
        >>> log_lines([alert])
        [(30, 'Alert dead_filters (warning, conv1, step 9): Half are dead.')]
    """
    groups: dict[tuple[str, str, str], list[Alert]] = {}
    for alert in alerts:
        groups.setdefault((alert.rule, alert.severity, alert.status), []).append(alert)
    lines = []
    for group in groups.values():
        level = logging.WARNING if group[0].severity != "info" and group[0].status == "raised" else logging.INFO
        if len(group) > TOGETHER:
            lines.append((level, one_line(_shared_line(group))))
        else:
            lines += [(level, one_line(_line(alert))) for alert in group]
    return lines


def _line(alert: Alert) -> str:
    place = f"{alert.layer}, step {alert.step}" if alert.layer else f"step {alert.step}"
    if alert.status == "cleared":
        return f"Alert {alert.rule} cleared ({place})."
    parts = [f"Alert {alert.rule} ({alert.severity}, {place}): {alert.message}"]
    if alert.cause:
        parts.append(f"Likely cause: {alert.cause}.")
    if alert.advice:
        parts.append(alert.advice)
    return " ".join(parts)


def _shared_line(group: Sequence[Alert]) -> str:
    names = [alert.layer or "the whole run" for alert in group]
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    first = group[0]
    if first.status == "cleared":
        return f"Alert {first.rule} cleared for {len(group)} layers (step {first.step}): {listed}."
    return f"Alert {first.rule} ({first.severity}, {len(group)} layers, step {first.step}): {listed}. {_line(first)}"


def table(alerts: Iterable[Alert], *, active: Iterable[Alert] = ()) -> str:
    r"""A Markdown table, one row an alert; three columns, since TensorBoard breaks the words of narrow ones.

    Args:
        alerts: In the order of the rows.
        active: Those among them that are up: they are marked as such.

    Example:
        >>> print(table([Alert(rule="dead_filters", severity="info", layer="a|b", step=9, message="Dead.")]))
        <BLANKLINE>
        | alert | what was seen | what to do |
        | --- | --- | --- |
        | **info**: dead_filters of a\|b, step 9, raised | Dead. | |
    """
    up = list(active)
    rows = [
        _row(
            [
                f"**{alert.severity}**: {escape(_subject(alert))}, {'active' if alert in up else alert.status}",
                escape(alert.message),
                escape(_remedy(alert)),
            ]
        )
        for alert in alerts
    ]
    # Markdown wants a blank line before a table.
    return "\n".join(["", _row(COLUMNS), _row(["---"] * len(COLUMNS)), *rows])


def _subject(alert: Alert) -> str:
    return f"{alert.rule}{f' of {alert.layer}' if alert.layer else ''}, step {alert.step}"


def _remedy(alert: Alert) -> str:
    return " ".join(part for part in (alert.advice, f"Likely cause: {alert.cause}." if alert.cause else "") if part)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def digest(active: Sequence[Alert], history: Sequence[Alert], *, limit: int = 50) -> str:
    """The table of the whole run: the active alerts, newest first, then what came before, newest first."""
    earlier = [alert for alert in reversed(history) if alert not in active]
    newest = sorted(active, key=lambda alert: -alert.step)
    return table([*newest, *earlier][:limit], active=active)
