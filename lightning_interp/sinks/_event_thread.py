"""The thread in which TensorBoard writes events: an error of ours must not be the end of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def keeping_alive(writer: Any) -> Iterator[None]:
    """Raises what goes wrong inside, with the writer as good as new.

    An event that can't be written ends the writer's thread, and from then on each call raises that error again: also
    the user's own `self.log`, and Lightning's last flush of a run that logs nothing itself. With a new thread theirs
    are tried on their own, and fail only where they would without us.

    Args:
        writer: A SummaryWriter of torch; others are left alone.
    """
    try:
        yield
    except Exception:
        _revive(writer)
        raise


def _revive(writer: Any) -> None:
    """Puts a new thread in the place of one that has died. No public name leads there."""
    events: Any = getattr(getattr(writer, "file_writer", None), "event_writer", None)
    dead: Any = getattr(events, "_async_writer", None)
    thread: Any = getattr(dead, "_worker", None)
    if getattr(thread, "exception", None) is not None and not dead._closed:
        events._async_writer = type(dead)(dead._writer, dead._byte_queue.maxsize, thread._flush_secs)
