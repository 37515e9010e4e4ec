"""Messages to the outside world through Apprise, without making the training wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

from lightning_interp._options import expected
from lightning_interp.errors import ArgumentError

WAITING = 100  # messages; more are dropped, and that is reported


def check_urls(urls: Sequence[str]) -> None:
    """Refuses URLs that Apprise doesn't know, and any when it is not installed.

    Raises:
        ArgumentError: Never with a whole URL in it, since URLs hold passwords.
    """
    if not urls:
        return
    try:
        import apprise
    except ImportError:
        raise ArgumentError(
            "Argument `notify` needs apprise, which is not installed: pip install 'lightning-interp[notify]'"
        ) from None
    for url in urls:
        if apprise.Apprise.instantiate(url, suppress_exceptions=True) is None:
            raise expected("notify", "a list of Apprise URLs", f"{url.partition(':')[0]}:...")


class Notifier:
    """Sends messages one after the other from a daemon thread.

    `send` returns at once; what goes wrong is kept for `failures`. A message that hangs delays only the later ones,
    and never the end of the process.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        """Starts the thread. `urls`: checked before, see `check_urls`."""
        self._urls = list(urls)
        self._messages: queue.Queue[tuple[str, str] | None] = queue.Queue(maxsize=WAITING)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lightning-interp-notify", daemon=True)
        self._thread.start()

    def send(self, title: str, body: str) -> None:
        """Queues one message."""
        try:
            self._messages.put_nowait((title, body))
        except queue.Full:
            self._failures.put(f"more than {WAITING} messages are waiting, so some were dropped")

    def failures(self) -> list[str]:
        """What went wrong since the last call."""
        found = []
        while not self._failures.empty():
            found.append(self._failures.get())
        return found

    def close(self, timeout: float = 5.0) -> None:
        """Lets the thread send what waits and end, for at most so many seconds."""
        try:
            self._messages.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _work(self) -> None:
        sender: Any = None
        while (message := self._messages.get()) is not None:
            try:
                if sender is None:
                    sender = _sender(self._urls)
                if not sender.notify(title=message[0], body=message[1]):
                    self._failures.put("at least one of the services refused the message")
            except Exception as error:  # a thread has nobody to raise to
                self._failures.put(type(error).__name__)


def _sender(urls: Sequence[str]) -> Any:
    import apprise

    sender = apprise.Apprise()
    for url in urls:
        sender.add(url)
    return sender
