"""Alerts as a table for the terminal, legible from 60 columns on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_interp.render.markdown import one_line
from lightning_interp.rules.alert import Alert

STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


def alert_table(rows: Iterable[tuple[Sequence[str], Sequence[Alert]]], *, columns: Sequence[str]) -> Table:
    """One row per run: its cells, then its alerts, one block each.

    Args:
        rows: The cells of a run that stand before the alerts, and its alerts.
        columns: Headings of those cells.

    Returns:
        A table for a rich console.
    """
    table = Table(box=box.ROUNDED, show_lines=True)
    for column in columns:
        table.add_column(column, max_width=24, overflow="fold")
    table.add_column("alerts", ratio=1)
    for cells, alerts in rows:
        table.add_row(*(Text(cell) for cell in cells), _blocks(alerts))
    return table


def _blocks(alerts: Sequence[Alert]) -> Text:
    if not alerts:
        return Text("none", style="green")
    return Text("\n\n").join(describe(alert) for alert in alerts)


def describe(alert: Alert) -> Text:
    """The rule; severity, layer and step; what was seen, the evidence, the cause and the advice: a line each."""
    raised = alert.status == "raised"
    place = f"layer {alert.layer}" if alert.layer else "whole run"
    lines = [
        Text(alert.rule, style=STYLES[alert.severity] if raised else "dim"),
        Text(one_line(f"{alert.severity if raised else 'cleared'}, {place}, step {alert.step}")),
    ]
    if alert.message:
        lines.append(Text(one_line(alert.message)))
    evidence = ", ".join(f"{name} {value:.4g}" for name, value in alert.evidence.items())
    named = {"evidence": evidence, "cause": alert.cause, "advice": alert.advice}
    lines += [Text.assemble((f"{name}: ", "dim"), one_line(text)) for name, text in named.items() if text]
    return Text("\n").join(lines)
