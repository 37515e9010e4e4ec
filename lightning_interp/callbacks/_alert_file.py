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

    def __init__(self, directory: str, known: Iterable[Alert] = (), *, go_on: bool = False) -> None:
        """Makes the file, empty or with the known alerts; with `go_on` and nothing known, what stands there is kept.

        Raises:
            OSError: If it can't be written.
        """
        self.path = Path(directory) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = _lines(known)
        if lines or not (go_on and self.path.exists()):
            self.path.write_text(lines, encoding="utf-8")

    def append(self, alerts: Iterable[Alert]) -> None:
        """Adds lines.

        Raises:
            OSError: If it can't be written.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(alerts))


def _lines(alerts: Iterable[Alert]) -> str:
    return "".join(f"{alert.to_json()}\n" for alert in alerts)
