"""Records to a TensorBoardLogger."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary

from lightning_interp.errors import InterpWarning
from lightning_interp.records import Embedding, Histogram, Image, Record, Scalar, Text
from lightning_interp.sinks import projector
from lightning_interp.sinks._event_thread import keeping_alive
from lightning_interp.sinks.grouping import by_step
from lightning_interp.sinks.png import encode_png

_METHODS = ("add_scalar", "add_histogram_raw", "add_image", "add_text", "flush")


def write(logger: Any, records: Sequence[Record]) -> None:
    """Writes scalars, histograms, pictures and text through the logger's own writer, embeddings to the projector.

    A logger without a SummaryWriter is passed over.

    Args:
        logger: A TensorBoardLogger; its `prefix` is not applied, the tags are a promise.
        records: Any records.

    Raises:
        ValueError: If a histogram has not one edge more than it has counts, or the labels, columns or thumbnails of an
            embedding don't fit its points.
        OSError: If embeddings can't be written; all else has been by then.
    """
    writer = logger.experiment
    if not all(hasattr(writer, method) for method in _METHODS):
        return
    with keeping_alive(writer):
        _write_events(writer, records)
    embeddings = [record for record in records if isinstance(record, Embedding)]
    if embeddings:
        _write_embeddings(writer, str(logger.log_dir), embeddings)


def flush(logger: Any) -> None:
    """Brings to the disk what the writer holds; it keeps scalars for up to two minutes otherwise.

    Args:
        logger: A TensorBoardLogger; one whose writer has no `flush` is passed over.

    Raises:
        Exception: What went wrong while something was written, now or since the last time.
    """
    writer = logger.experiment
    if callable(getattr(writer, "flush", None)):
        with keeping_alive(writer):
            writer.flush()


def _write_events(writer: Any, records: Sequence[Record]) -> None:
    _write_scalars(writer, [record for record in records if isinstance(record, Scalar)])
    others = [record for record in records if isinstance(record, Histogram | Image | Text)]
    for record in others:
        if isinstance(record, Histogram):
            _write_histogram(writer, record)
        elif isinstance(record, Image):
            _write_image(writer, record)
        else:
            writer.add_text(record.tag, record.markdown, record.step)
    if others:
        writer.flush()  # else they may show up two minutes late; scalars come with the flushes of `self.log`


def _write_scalars(writer: Any, scalars: Sequence[Scalar]) -> None:
    """All scalars of one step in one event: 600 tags cost 1 ms in place of 50."""
    file_writer = _file_writer(writer)
    for step, group in by_step(scalars).items():
        if file_writer is None:
            for record in group:
                writer.add_scalar(record.tag, record.value, step)
        else:
            values = [Summary.Value(tag=record.tag, simple_value=record.value) for record in group]
            file_writer.add_summary(Summary(value=values), step)


def _write_embeddings(writer: Any, log_dir: str, embeddings: Sequence[Embedding]) -> None:
    """Writes beside the events. Not into remote folders: the projector reads raw numbers from local files only."""
    log_dir = log_dir.removeprefix("file://")
    if "://" in log_dir:
        message = f"TensorBoard's projector can't read from {log_dir}, so embeddings are not written for it."
        warnings.warn(f"{message} Log to a local folder to see them there.", InterpWarning, stacklevel=2)
        return
    config = projector.write(log_dir, embeddings)
    if config is not None and type(writer).__module__.startswith("torch."):
        # What `add_embedding` of this writer adds to and writes as a whole: without it, the user's next call would
        # take ours off the list until we write again, and one after a resume would take off the user's own.
        writer._projector_config = config


def _file_writer(writer: Any) -> Any:
    """What takes whole protocol buffers, or None: tensorboardX has classes of its own for them."""
    get = getattr(writer, "_get_file_writer", None)
    file_writer = get() if get is not None else None
    return file_writer if type(file_writer).__module__.startswith("torch.") else None


def _write_image(writer: Any, record: Image) -> None:
    """As `add_image`, which resizes every picture to its own size and takes up to three times as long."""
    file_writer = _file_writer(writer)
    if file_writer is None:
        writer.add_image(record.tag, record.pixels, record.step, dataformats="HWC")
        return
    height, width, channels = record.pixels.shape
    encoded = encode_png(record.pixels)
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)
    file_writer.add_summary(Summary(value=[Summary.Value(tag=record.tag, image=image)]), record.step)


def _write_histogram(writer: Any, record: Histogram) -> None:
    """Writes the occupied bins; a histogram of nothing is not written, since TensorBoard can't show one."""
    counts, edges = occupied_bins(record.counts, record.edges)
    if not counts.size:
        return
    centres = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        record.tag,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=float(counts.sum()),
        sum=float(counts @ centres),
        sum_squares=float(counts @ centres**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=record.step,
    )


def occupied_bins(
    counts: NDArray[np.float64], edges: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Closes open bins and cuts empty ones off both ends.

    TensorBoard takes the smallest value for the left edge of the first occupied bin, so empty bins before it would
    widen it.

    Args:
        counts: (B,), number of values in each bin; NaN and negative ones count as 0.
        edges: (B + 1,), increasing. An infinite outer edge is moved to where its bin is as wide as its neighbour.

    Returns:
        (b,) and (b + 1,) with b <= B, finite; both empty when no bin is occupied, or an edge is NaN.

    Raises:
        ValueError: If there is not one edge more than there are counts.

    Example:
        >>> occupied_bins(np.array([0.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, np.inf]))
        (array([2., 3.]), array([1., 2., 3.]))
    """
    counts = np.asarray(counts, dtype=np.float64)
    edges = np.array(edges, dtype=np.float64)
    if counts.size and edges.size != counts.size + 1:
        raise ValueError(f"Expected {counts.size + 1} `edges` for {counts.size} `counts`, but got {edges.size}.")
    counts = np.where(np.isfinite(counts) & (counts > 0), counts, 0.0)
    occupied = np.flatnonzero(counts)
    if counts.size > 1 and np.isneginf(edges[0]):
        edges[0] = 2 * edges[1] - edges[2]
    if counts.size > 1 and np.isposinf(edges[-1]):
        edges[-1] = 2 * edges[-2] - edges[-3]
    if not occupied.size or not np.isfinite(edges).all():
        return np.empty(0), np.empty(0)
    first, end = int(occupied[0]), int(occupied[-1]) + 1
    return counts[first:end], edges[first : end + 1]
