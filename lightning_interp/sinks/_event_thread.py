"""The thread in which a SummaryWriter writes events: an error of ours must be neither its end nor a run that hangs."""

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
        writer: A SummaryWriter of torch or of tensorboardX; others are left alone.

    Raises:
        Exception: That of an event which could not be written before.
    """
    _spare(writer)
    try:
        yield
    except Exception:
        _revive(writer)
        raise


def _events(writer: Any) -> Any:
    """What hands events to the thread, or None. No public name leads there."""
    return getattr(getattr(writer, "file_writer", None), "event_writer", None)


def _revive(writer: Any) -> None:
    """Puts a new thread in the place of one of TensorBoard's that has died."""
    events = _events(writer)
    dead: Any = getattr(events, "_async_writer", None)
    thread: Any = getattr(dead, "_worker", None)
    if getattr(thread, "exception", None) is not None and not dead._closed:
        events._async_writer = type(dead)(dead._writer, dead._byte_queue.maxsize, thread._flush_secs)


class _Patient:
    """A file that takes everything: what the disk does not waits for the next flush, in order and whole."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        """Keeps bytes."""
        self._waiting += data

    def flush(self) -> None:
        """Hands them on."""
        self._file.flush()  # what came before this one
        while self._waiting:
            del self._waiting[: self._file.raw.write(self._waiting)]

    def fileno(self) -> int:
        """For `fsync`."""
        return int(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._file.close()


class _Lasting:
    """What tensorboardX's thread writes to, without errors that would end it."""

    def __init__(self, events: Any) -> None:
        self._events = events
        self.error: Exception | None = None

    def write_event(self, event: Any) -> None:
        """Writes an event."""
        self._events.write_event(event)

    def flush(self) -> None:
        """Brings to the disk what was written; keeps the error."""
        try:
            self._events.flush()
        except Exception as error:
            self.error = error


def _spare(writer: Any) -> None:
    """Keeps tensorboardX's thread from dying: its queue holds ten events, and then waits for the thread for ever.

    Raises:
        Exception: What kept the thread from writing since.
    """
    events = _events(writer)
    thread: Any = getattr(events, "_worker", None)
    if not hasattr(thread, "_record_writer"):
        return
    if not thread.is_alive():  # an event of the user's was the end of it
        thread = events._worker = type(thread)(events._event_queue, events._ev_writer, events._flush_secs)
        thread.start()
    if not isinstance(thread._record_writer, _Lasting):
        thread._record_writer = _Lasting(events._ev_writer)
        with events._ev_writer._lock:
            records = events._ev_writer._py_recordio_writer
            if hasattr(records._writer, "raw"):  # on a local disk
                records._writer = _Patient(records._writer)
    error, thread._record_writer.error = thread._record_writer.error, None
    if error is not None:
        raise error
