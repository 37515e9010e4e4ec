"""Reads the `alerts.jsonl` files that the runs below a folder have written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lightning_interp.rules.alert import SEVERITIES, Alert

FILE_NAME = "alerts.jsonl"


@dataclass(frozen=True)
class AlertLog:
    """The alerts of one run.

    Attributes:
        run: Folder of the run, relative to the folder that was searched; its own name if it is that folder.
        alerts: All lines, oldest first.
        unreadable: Number of lines that are no alerts; the last line of a run that goes on may be half written.
    """

    run: str
    alerts: list[Alert]
    unreadable: int = 0

    @property
    def latest(self) -> list[Alert]:
        """The newest line of each rule and layer, worst severity first, then in the order in which they came up."""
        newest: dict[tuple[str, str | None], Alert] = {}
        for alert in self.alerts:
            newest[alert.key] = alert
        return sorted(newest.values(), key=lambda alert: -SEVERITIES.index(alert.severity))

    @property
    def active(self) -> list[Alert]:
        """Those of `latest` that have not been cleared."""
        return [alert for alert in self.latest if alert.status == "raised"]


def read_alerts(folder: Path) -> list[AlertLog]:
    """The logs of all runs in and below a folder, sorted by path.

    Args:
        folder: Any folder, for example the one given to `tensorboard --logdir`.

    Returns:
        One log per `alerts.jsonl`; an empty file is a run without alerts.

    Raises:
        OSError: If a file can't be read.
    """
    return [_read(path, folder) for path in sorted(folder.rglob(FILE_NAME))]


def _read(path: Path, folder: Path) -> AlertLog:
    alerts, unreadable = [], 0
    # Not splitlines: JSON leaves U+2028 and its like as they are.
    for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            alert = Alert.from_dict(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            unreadable += 1
            continue
        if alert.severity in SEVERITIES:
            alerts.append(alert)
        else:
            unreadable += 1
    inside = path.parent.relative_to(folder)
    return AlertLog(inside.as_posix() if inside.parts else path.parent.resolve().name, alerts, unreadable)
