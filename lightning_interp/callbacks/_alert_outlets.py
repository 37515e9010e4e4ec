"""Where alerts go besides TensorBoard: the log, `alerts.jsonl`, notifications. On rank zero only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lightning_interp.callbacks._alert_file import AlertFile
from lightning_interp.callbacks._alert_text import log_lines
from lightning_interp.callbacks._notify import Notifier
from lightning_interp.rules.alert import Alert

log = logging.getLogger("lightning_interp")


class Outlets:
    """The outlets of one fit. One that fails is closed and reported, and the others go on."""

    def __init__(
        self,
        directory: str | None,
        known: Sequence[Alert],
        urls: Sequence[str],
        report: Callable[[str], None],
        *,
        go_on: bool = False,
    ) -> None:
        """Makes the file and the thread that sends.

        Args:
            directory: Folder of `alerts.jsonl`; None writes no file.
            known: Alerts of the run before a resume, for the file.
            urls: Apprise URLs.
            report: Called with a sentence for what went wrong.
            go_on: Whether the same Trainer has trained before: its file is kept.
        """
        self._report = report
        self._notifier = Notifier(urls) if urls else None
        self._file: AlertFile | None = None
        if directory is not None:
            try:
                self._file = AlertFile(directory, known, go_on=go_on)
            except OSError as error:
                self._report_file(error)

    def tell(self, changed: Sequence[Alert]) -> None:
        """Passes alerts on: all to the log and the file, raised warnings and critical ones to the services."""
        for level, line in log_lines(changed):
            log.log(level, line)
        if self._file is not None:
            try:
                self._file.append(changed)
            except OSError as error:
                self._file = None
                self._report_file(error)
        urgent = [alert for alert in changed if alert.status == "raised" and alert.severity != "info"]
        if self._notifier is not None and urgent:
            self._notifier.send(_title(urgent), "\n".join(line for _, line in log_lines(urgent)))

    def check(self) -> None:
        """Reports messages that could not be sent."""
        for failure in self._notifier.failures() if self._notifier is not None else []:
            self._report(f"A notification could not be sent: {failure}. Training goes on.")

    def close(self) -> None:
        """Waits up to 5 seconds for messages on their way."""
        if self._notifier is not None:
            self._notifier.close()
            self.check()

    def _report_file(self, error: OSError) -> None:
        self._report(f"alerts.jsonl can't be written ({error}). Alerts still go to the log and to the loggers.")


def _title(alerts: Sequence[Alert]) -> str:
    more = f" and {len(alerts) - 1} more" if len(alerts) > 1 else ""
    return f"lightning-interp: {alerts[0].rule}{more} at step {alerts[0].step}"
