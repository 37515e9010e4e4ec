"""The history of dead filters as a table: who is dead, since when, and who came back."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_interp.functional.lifelines import Lifelines
from lightning_interp.render.markdown import escape

_MAX_LISTED = 24


def history_table(lifelines: Lifelines, *, partial: bool) -> str:
    """One row for each layer to which something happened, as Markdown.

    Args:
        lifelines: What happened.
        partial: Whether a part of the last window is missing, which is said below the table.

    Returns:
        The table; of more than 24 filters in a cell the first 24 and their number.
    """
    rows = ["| layer | dead now | born dead | died after .. by step | revived |", "|---|---|---|---|---|"]
    for layer in lifelines.layers:
        dead, born, revived = lifelines.dead(layer), lifelines.born_dead(layer), lifelines.revived(layer)
        if not (dead or born or revived):
            continue
        spans = [f"{i}: {max(a, 0)} .. {b}" for i, (a, b) in lifelines.died_between(layer).items()]
        rows.append(f"| {escape(layer)} | {_few(dead)} | {_few(born)} | {_few(spans)} | {_few(revived)} |")
    note = "\n\nThe window was cut by a resume: other ranks' part before it is missing." if partial else ""
    return "\n".join(rows) + note


def _few(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:_MAX_LISTED])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > _MAX_LISTED else shown
