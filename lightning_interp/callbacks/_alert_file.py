"""The file `alerts.jsonl` of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning_interp.rules.alert import Alert

FILE_NAME = "alerts.jsonl"


class AlertFile:
    """One JSON object a line, complete and on disk after each call.

    A resumed run begins with what its checkpoint knows: alerts that the interrupted run wrote after the checkpoint
    will be raised again, and must not stand there twice.
    """

    def __init__(self, directory: str, known: Iterable[Alert] = ()) -> None:
        """Makes the file, empty or with the known alerts.

        Raises:
            OSError: If it can't be written.
        """
        self.path = Path(directory) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(_lines(known), encoding="utf-8")

    def append(self, alerts: Iterable[Alert]) -> None:
        """Adds lines.

        Raises:
            OSError: If it can't be written.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(alerts))


def _lines(alerts: Iterable[Alert]) -> str:
    return "".join(f"{alert.to_json()}\n" for alert in alerts)
