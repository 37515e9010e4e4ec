"""Records written straight to loggers, without a Trainer, and read back."""

from __future__ import annotations

import csv
import importlib
import io
import math

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp import sinks
from lightning_interp.records import Embedding, Histogram, Image, Record, Scalar, Text
from lightning_interp.sinks.tensorboard import occupied_bins
from tests.reading import BACK_ENDS, event_files, read, summaries

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
EVERY_KIND = [
    Scalar(tag="interp/a", step=3, value=0.5),
    Histogram(tag="interp.h/00_conv", step=3, counts=np.array([1.0, 2.0]), edges=np.array([0.0, 1.0, 2.0])),
    Image(tag="interp.i/00_conv", step=3, pixels=PIXELS, caption="two filters"),
    Embedding(tag="interp.e/fc", step=3, points=np.zeros((2, 3), np.float32)),
    Text(tag="interp.t/alerts", step=3, markdown="**dead**"),
]


@pytest.fixture(params=NAMESPACES)
def loggers(request):
    return importlib.import_module(f"{request.param}.loggers")


@pytest.fixture
def pl_loggers():
    return importlib.import_module("pytorch_lightning.loggers")


def tensorboard_logger(module, folder):
    return module.TensorBoardLogger(folder, name="", version="run", default_hp_metric=False)


def written(loggers, folder, records, back_end="slow"):
    """Writes to a new TensorBoard log, closes it and reads it back."""
    logger = tensorboard_logger(loggers, folder)
    sinks.write([logger], records)
    logger.finalize("success")
    return read(folder / "run", back_end)


# ---------------------------------------------------------------------------------------------------- TensorBoard


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_write_every_kind_to_tensorboard_reads_back(loggers, tmp_path, back_end):
    """All kinds but embeddings come back, pictures pixel by pixel, in both back ends."""
    log = written(loggers, tmp_path, EVERY_KIND, back_end)
    assert log.scalars == {"interp/a": [(3, 0.5)]}
    assert log.text == {"interp.t/alerts/text_summary": [(3, "**dead**")]}
    [(step, bins)] = log.histograms.pop("interp.h/00_conv")
    assert (step, bins.tolist()) == (3, [[0, 1, 1], [1, 2, 2]])
    [(step, pixels)] = log.images.pop("interp.i/00_conv")
    assert step == 3
    np.testing.assert_array_equal(pixels, PIXELS)
    assert not log.histograms
    assert not log.images
    assert len(event_files(tmp_path)) == 1


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_write_scalar_not_finite_survives(pl_loggers, tmp_path, back_end):
    """NaN and infinities are what one looks for; what float32 can't hold becomes infinite."""
    values = [1.0, math.nan, math.inf, -math.inf, 1e300, 2.0]
    log = written(pl_loggers, tmp_path, [Scalar(tag="x", step=s, value=v) for s, v in enumerate(values)], back_end)
    np.testing.assert_array_equal(log.values("x"), [1.0, math.nan, math.inf, -math.inf, math.inf, 2.0])
    assert log.steps("x") == list(range(6))


def test_write_300_tags_of_one_step_costs_one_event(loggers, tmp_path):
    """Scalars of one step share an event, those of another step have their own."""
    records = [Scalar(tag=f"interp.x/{i:03d}", step=step, value=i) for step in (4, 5) for i in range(300)]
    log = written(loggers, tmp_path, records)
    found = summaries(tmp_path)
    assert [(event.step, len(event.summary.value)) for event in found] == [(4, 300), (5, 300)]
    assert all(log.scalars[f"interp.x/{i:03d}"] == [(4, i), (5, i)] for i in range(300))


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_write_histograms_that_cannot_be_shown_loses_nothing_else(pl_loggers, tmp_path, back_end):
    """Empty, all-NaN and all-zero histograms raise nothing and leave the others alone."""
    nothing = [([], []), ([], [0.0]), ([0.0, 0.0], [0.0, 1.0, 2.0]), ([math.nan], [0.0, 1.0])]
    nothing += [([3.0], [math.nan, math.nan]), ([1.0], [-math.inf, math.inf]), ([1.0, 1.0], [0.0, math.nan, 1.0])]
    records = [
        Histogram(tag="h", step=step, counts=np.array(counts), edges=np.array(edges))
        for step, (counts, edges) in enumerate([*nothing, ([2.0], [5.0, 6.0])])
    ]
    log = written(pl_loggers, tmp_path, records, back_end)
    [(step, bins)] = log.histograms["h"]
    assert (step, bins.tolist()) == (len(nothing), [[5, 6, 2]])


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_write_histogram_with_empty_ends_keeps_the_edges(pl_loggers, tmp_path, back_end):
    """An occupied bin isn't widened by the empty ones beside it."""
    record = Histogram(tag="h", step=0, counts=np.array([0, 0, 4.0, 0, 1, 0]), edges=np.arange(7.0))
    [(_, bins)] = written(pl_loggers, tmp_path, [record], back_end).histograms["h"]
    assert bins.tolist() == [[2, 3, 4], [3, 4, 0], [4, 5, 1]]


def test_write_histogram_open_bins_are_as_wide_as_their_neighbours():
    """Infinite outer edges are what `numpy.histogram` gets for "everything beyond"."""
    counts, edges = occupied_bins(np.array([1.0, 2.0, 3.0]), np.array([-np.inf, 1.0, 2.0, np.inf]))
    assert counts.tolist() == [1, 2, 3]
    assert edges.tolist() == [0, 1, 2, 3]


@given(counts=st.lists(st.integers(0, 5), max_size=20), start=st.floats(-1e6, 1e6))
def test_occupied_bins_keep_every_value(counts, start):
    """What is left holds all counts, begins and ends with an occupied bin, and is a slice of the input."""
    edges = start + np.arange(len(counts) + 1)
    kept, kept_edges = occupied_bins(np.array(counts), edges)
    assert kept.sum() == sum(counts)
    if kept.size:
        assert kept[0] > 0
        assert kept[-1] > 0
        assert kept_edges.size == kept.size + 1
        first = int(np.flatnonzero(edges == kept_edges[0])[0])
        assert kept.tolist() == counts[first : first + kept.size]
    else:
        assert not any(counts)


def test_write_histogram_of_unequal_lengths_raises(pl_loggers, tmp_path):
    """A mistake in the caller is named."""
    record = Histogram(tag="h", step=0, counts=np.ones(3), edges=np.arange(3.0))
    with pytest.raises(ValueError, match=r"Expected 4 `edges` for 3 `counts`, but got 3\."):
        sinks.write([tensorboard_logger(pl_loggers, tmp_path)], [record])


@pytest.mark.parametrize("record", [EVERY_KIND[1], EVERY_KIND[2], EVERY_KIND[4]], ids=lambda r: type(r).__name__)
def test_write_anything_but_scalars_is_on_disk_at_once(pl_loggers, tmp_path, record):
    """Pictures and alerts don't wait two minutes for the writer's own flush; the log is still open here."""
    logger = tensorboard_logger(pl_loggers, tmp_path)
    sinks.write([logger], [Scalar(tag="x", step=3, value=1.0), record])
    tags = [value.tag for event in summaries(tmp_path) for value in event.summary.value]
    logger.finalize("success")
    assert len(tags) == 2


def test_write_shares_the_event_file_of_the_logger(loggers, tmp_path):
    """A second open event file would stop TensorBoard from reading the first."""
    logger = tensorboard_logger(loggers, tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step=step)
        sinks.write([logger], [Scalar(tag="interp/a", step=step, value=1.0)])
    logger.finalize("success")
    log = read(tmp_path / "run", "slow")
    assert len(event_files(tmp_path)) == 1
    assert log.steps("loss") == log.steps("interp/a") == [0, 1, 2]


class Writer:
    """A SummaryWriter that hands out no file writer, like that of tensorboardX does no known one."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith("add_") and name != "flush":
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, *args))


def test_write_without_file_writer_falls_back_to_add_scalar(pl_loggers, tmp_path):
    """Each scalar goes by itself, and scalars alone are not flushed."""

    class Logger(pl_loggers.TensorBoardLogger):
        experiment = Writer()

    sinks.write([Logger(tmp_path)], [Scalar(tag="a", step=1, value=2.0), Scalar(tag="b", step=1, value=3.0)])
    assert Logger.experiment.calls == [("add_scalar", "a", 2.0, 1), ("add_scalar", "b", 3.0, 1)]


def test_write_falls_back_to_add_image(pl_loggers, tmp_path):
    """Pictures too go by the writer's own method where there is no other way."""

    class Logger(pl_loggers.TensorBoardLogger):
        experiment = Writer()

    sinks.write([Logger(tmp_path)], [Image(tag="i", step=1, pixels=PIXELS)])
    assert Logger.experiment.calls[0][:2] == ("add_image", "i")
    assert Logger.experiment.calls[0][2] is PIXELS


def test_pictures_are_what_add_image_writes(pl_loggers, tmp_path):
    """The same protocol buffer but for the compression, at the same step."""
    logger = tensorboard_logger(pl_loggers, tmp_path)
    sinks.write([logger], [Image(tag="ours", step=2**40, pixels=PIXELS)])
    logger.experiment.add_image("theirs", PIXELS, 2**40, dataformats="HWC")
    logger.finalize("success")
    values = [(event.step, value) for event in summaries(tmp_path) for value in event.summary.value]
    found = {value.tag: (step, value.image) for step, value in values}
    (step, ours), (their_step, theirs) = found["ours"], found["theirs"]
    assert step == their_step == 2**40
    assert (ours.height, ours.width, ours.colorspace) == (theirs.height, theirs.width, theirs.colorspace) == (7, 11, 3)
    for image in (ours, theirs):
        with PIL.Image.open(io.BytesIO(image.encoded_image_string)) as opened:
            assert opened.format == "PNG"
            np.testing.assert_array_equal(np.asarray(opened), PIXELS)


def test_write_flushes_once(pl_loggers, tmp_path):
    """One flush for all records of one call, after the last of them."""

    class Logger(pl_loggers.TensorBoardLogger):
        experiment = Writer()

    sinks.write([Logger(tmp_path)], EVERY_KIND)
    names = [call[0] for call in Logger.experiment.calls]
    assert names == ["add_scalar", "add_histogram_raw", "add_image", "add_text", "flush"]


def test_write_to_logger_whose_experiment_is_no_writer_does_nothing(pl_loggers, tmp_path):
    """A logger that only derives from TensorBoardLogger is passed over."""

    class Logger(pl_loggers.TensorBoardLogger):
        experiment = object()

    sinks.write([Logger(tmp_path)], EVERY_KIND)
    assert not list(tmp_path.rglob("*"))


# ---------------------------------------------------------------------------------------------------- other loggers


def test_write_to_csv_logger_takes_scalars_by_step(loggers, tmp_path):
    """One row a step; the rest is left out without a word."""
    logger = loggers.CSVLogger(tmp_path, name="", version="run")
    sinks.write([logger], [*EVERY_KIND, Scalar(tag="b", step=3, value=2.0), Scalar(tag="b", step=4, value=3.0)])
    logger.finalize("success")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"interp/a": "0.5", "b": "2.0", "step": "3"}, {"interp/a": "", "b": "3.0", "step": "4"}]


def recording(loggers, log_image):
    """A logger in the style of WandbLogger, with the given `log_image`."""

    class Logger(loggers.logger.Logger):
        name = version = "recording"

        def __init__(self):
            super().__init__()
            self.metrics, self.pictures = [], []

        def log_metrics(self, metrics, step=None):
            self.metrics.append((metrics, step))

        def log_hyperparams(self, params, *args, **kwargs):
            raise NotImplementedError

    Logger.log_image = log_image
    return Logger()


def test_write_to_logger_with_log_image_passes_pictures_and_captions(loggers):
    """WandbLogger takes lists of pictures and of captions."""

    def log_image(self, key, images, step=None, **kwargs):
        self.pictures.append((key, images[0].tolist(), step, kwargs))

    logger = recording(loggers, log_image)
    sinks.write([logger], [*EVERY_KIND, Image(tag="bare", step=4, pixels=PIXELS)])
    assert logger.metrics == [({"interp/a": 0.5}, 3)]
    shown = PIXELS.tolist()
    assert logger.pictures == [
        ("interp.i/00_conv", shown, 3, {"caption": ["two filters"]}),
        ("bare", shown, 4, {}),
    ]


def test_write_to_logger_without_captions_drops_them(loggers):
    """`caption` is passed only where it is taken."""

    def log_image(self, key, images, step):
        self.pictures.append((key, step))

    logger = recording(loggers, log_image)
    sinks.write([logger], EVERY_KIND)
    assert logger.pictures == [("interp.i/00_conv", 3)]


def test_write_to_dummy_logger_does_nothing(loggers):
    """`fast_dev_run` writes nothing."""

    class Watched(loggers.logger.DummyLogger):
        def log_metrics(self, *args, **kwargs):
            raise AssertionError("was called")

    sinks.write([Watched()], EVERY_KIND)


def test_write_unknown_kind_of_record_is_left_out(loggers, tmp_path):
    """A record of a kind that no sink knows is no error."""
    log = written(loggers, tmp_path, [Record(tag="new", step=0), Scalar(tag="x", step=0, value=1.0)])
    assert log.scalars == {"x": [(0, 1.0)]}


# ---------------------------------------------------------------------------------------------------- several loggers


class Failing:
    """A logger that can't be reached."""

    def __init__(self, message):
        self.message = message

    def log_metrics(self, metrics, step):
        raise ConnectionError(self.message)


def test_write_with_a_failing_logger_serves_the_others_and_raises_the_first_error(loggers, tmp_path):
    """The error comes at the end, so that the calling callback can report it."""
    logger = tensorboard_logger(loggers, tmp_path)
    with pytest.raises(ConnectionError, match="first"):
        sinks.write([Failing("first"), logger, Failing("second")], EVERY_KIND)
    logger.finalize("success")
    assert read(tmp_path / "run", "slow").scalars == {"interp/a": [(3, 0.5)]}


@pytest.mark.parametrize(("given", "records"), [([], EVERY_KIND), ([Failing("never")], [])])
def test_write_nothing_or_to_nobody_does_nothing(given, records):
    """`logger=False` gives an empty list; without records no logger is touched."""
    sinks.write(given, records)


def test_is_tensorboard_knows_both_namespaces_and_subclasses(loggers, tmp_path):
    """By class name along the inheritance; other loggers are not."""

    class Mine(loggers.TensorBoardLogger):
        pass

    assert sinks.is_tensorboard(loggers.TensorBoardLogger(tmp_path))
    assert sinks.is_tensorboard(Mine(tmp_path))
    assert not sinks.is_tensorboard(loggers.CSVLogger(tmp_path))
    assert not sinks.is_tensorboard(object())
