"""The file `suspect_labels.csv` of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_interp.render.suspects import SuspectRow, suspects_csv

MOST_ROWS = 10_000


def write_suspects(directory: str | Path, rows: Sequence[SuspectRow], name: str | None = None) -> Path:
    """Writes the ranked list, at most 10,000 rows; one moment the old file is there, the next the new one.

    Args:
        directory: The log folder; made if it is missing.
        rows: The most suspicious first.
        name: Of the callback: the file is then `suspect_labels.<name>.csv`.

    Raises:
        OSError: If it can't be written.
    """
    path = Path(directory) / (f"suspect_labels.{name}.csv" if name else "suspect_labels.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(suspects_csv(rows[:MOST_ROWS]), encoding="utf-8", newline="")
    part.replace(path)
    return path
