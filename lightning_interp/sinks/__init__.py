"""From records to loggers: TensorBoard takes all, other loggers what they support.

`write` is called on rank zero only, while a fit runs; a logger that is written to after `fit` has returned would open
a second event file. Everything goes through `logger.experiment` and the logger's own methods, never to a writer of our
own, for the same reason. Only embeddings are files beside the events, for TensorBoard's projector; other loggers don't
get them, and neither does a TensorBoardLogger that writes to a remote folder, which is said in a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lightning_interp.records import Record
from lightning_interp.sinks import generic, tensorboard

__all__ = ["flush", "is_tensorboard", "write"]


def write(loggers: Iterable[Any], records: Sequence[Record]) -> None:
    """Hands records to all loggers, each getting what it supports.

    A logger that fails doesn't keep the others from getting the records: its error is raised at the end.

    Args:
        loggers: Lightning loggers of either namespace; `trainer.loggers`.
        records: In the order in which they are to be written; steps must not fall within a tag.

    Raises:
        Exception: The first error of a logger, after all have been served.
    """
    if records:
        served = [(logger, sink) for logger in loggers if (sink := _sink_of(logger)) is not None]
        _all(partial(sink, logger, records) for logger, sink in served)


def flush(loggers: Iterable[Any]) -> None:
    """Has loggers bring what they hold to the disk; those that can't be asked to are passed over.

    Args:
        loggers: As for `write`.

    Raises:
        Exception: The first error of a logger, after all have been asked.
    """
    _all(partial(tensorboard.flush, logger) for logger in loggers if is_tensorboard(logger))


def _all(calls: Iterable[Callable[[], None]]) -> None:
    """Makes all calls, and raises the first error at the end."""
    errors = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def is_tensorboard(logger: Any) -> bool:
    """Whether a logger is a TensorBoardLogger of either namespace, or derived from one.

    By class name, since this package must not import Lightning below `callbacks/`.
    """
    return _is_a(logger, "TensorBoardLogger")


def _sink_of(logger: Any) -> Callable[[Any, Sequence[Record]], None] | None:
    if _is_a(logger, "DummyLogger"):  # what `fast_dev_run` puts in the place of all loggers
        return None
    return tensorboard.write if is_tensorboard(logger) else generic.write


def _is_a(logger: Any, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(logger).__mro__)
