"""Embeddings in TensorBoard's projector, asked for as its page asks: what is listed, vectors, labels, thumbnails."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pathlib
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from examples.figures import tensorboard_server
from lightning_interp import sinks
from lightning_interp.errors import InterpWarning
from lightning_interp.records import Embedding, Scalar
from lightning_interp.render.strip import FilmStrip
from lightning_interp.sinks import _projector_files as files
from lightning_interp.sinks import projector
from tests.reading import BACK_ENDS, event_files, read

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
TAG = "interp.embedding/03_fc"
POINTS = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
ODD = ["a\tb", "line\nbreak\r\n", "", " \t ", "ünï 猫 🐈", "\x00\ud800", "para\u2029graph"]
READ = ["a b", "line break", "(empty)", "(empty)", "ünï 猫 🐈", "(empty)", "para graph"]


def snapshot(step, points=POINTS, tag=TAG, **more):
    return Embedding(tag=tag, step=step, points=points, **more)


def make_logger(folder, version="run", namespace=NAMESPACES[0], **options):
    module = importlib.import_module(f"{namespace}.loggers")
    return module.TensorBoardLogger(folder, name="", version=version, default_hp_metric=False, **options)


class Plugin:
    """The projector's own reading code, on a log directory, without a server."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.multiplexer = EventMultiplexer()
        provider = MultiplexerDataProvider(self.multiplexer, self.folder)
        self.plugin = ProjectorPlugin(TBContext(logdir=self.folder, data_provider=provider, multiplexer=None))
        self.reload()

    def reload(self):
        """What a server does every few seconds."""
        self.multiplexer.AddRunsFromDirectory(self.folder)
        self.multiplexer.Reload()

    def get(self, route, **query):
        answer = Client(self.plugin.get_plugin_apps()[f"/{route}"]).get("/", query_string=query)
        if answer.status_code != 200:
            raise ConnectionError(f"{answer.status_code}: {answer.text}")
        return answer.data


class Server:
    """The projector in a running TensorBoard."""

    def __init__(self, url):
        self.url = url

    def get(self, route, **query):
        try:
            address = f"{self.url}data/plugin/projector/{route}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(address, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{error.code}: {error.read().decode()}") from error

    def json(self, route):
        with urllib.request.urlopen(f"{self.url}{route}", timeout=60) as answer:
            return json.loads(answer.read())


def runs(reader):
    return sorted(json.loads(reader.get("runs")))


def names(reader, run="run"):
    """What the list in the projector shows of a run, nothing while it doesn't know the run."""
    if run not in runs(reader):
        return []
    return [info["tensorName"] for info in json.loads(reader.get("info", run=run))["embeddings"]]


def vectors(reader, name, run="run"):
    infos = {info["tensorName"]: info for info in json.loads(reader.get("info", run=run))["embeddings"]}
    return np.frombuffer(reader.get("tensor", run=run, name=name), np.float32).reshape(infos[name]["tensorShape"])


def unit(points):
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def steps_of(found, tag="03_fc"):
    return [int(name.split("@step")[1]) for name in found if name.startswith(f"{tag}@")]


# ---------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_write_then_projector_serves_vectors_labels_and_thumbnails(tmp_path, namespace):
    """Beside the events, in the folder that the logger names, also with a sub-directory."""
    sprites = np.random.default_rng(1).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    logger = make_logger(tmp_path, namespace=namespace, sub_dir="inner")
    sinks.write([logger], [snapshot(12, labels=ODD, columns={"index": list("0123456")}, sprites=sprites)])
    reader, run = Plugin(tmp_path), "run/inner"
    assert names(reader, run) == ["03_fc newest", "03_fc@step00000012"]
    for name in names(reader, run):
        np.testing.assert_allclose(vectors(reader, name, run), unit(POINTS), rtol=4e-5)
        lines = reader.get("metadata", run=run, name=name).decode().split("\n")
        assert lines == ["label\tindex", *[f"{label}\t{i}" for i, label in enumerate(READ)], ""]
        sheet = Image.open(io.BytesIO(reader.get("sprite_image", run=run, name=name)))
        assert sheet.size == (90, 90)  # 3 x 3 cells, five times 6 pixels
    logger.finalize("success")


def test_write_zeros_loads_as_zeros(tmp_path):
    """The features of a dead layer; as plain bytes they would stop the projector for all runs."""
    zeros = np.zeros((6, 4), np.float32)
    projector.write(tmp_path, [snapshot(0, zeros)])
    np.testing.assert_array_equal(vectors(Plugin(tmp_path), "03_fc newest", "."), zeros)
    [path] = tmp_path.rglob("*.bytes")
    path.write_bytes(zeros.tobytes())
    with pytest.raises(ValueError, match="could not convert"):
        runs(Plugin(tmp_path))


def test_write_without_labels_numbers_the_points(tmp_path):
    """A projector without metadata has nothing to search by."""
    projector.write(tmp_path, [snapshot(0)])
    assert Plugin(tmp_path).get("metadata", run=".", name="03_fc newest") == b"0\n1\n2\n3\n4\n5\n6\n"


def test_write_rows_that_are_not_finite_stay_in_their_place(tmp_path):
    """As zeros, and their label says so; one of them would otherwise leave every point without coordinates."""
    points = POINTS.copy()
    points[2, 1], points[4] = np.inf, np.nan
    projector.write(tmp_path, [snapshot(0, points, labels=list("abcdefg"))])
    reader = Plugin(tmp_path)
    expected = unit(POINTS)
    expected[[2, 4]] = 0
    np.testing.assert_allclose(vectors(reader, "03_fc newest", "."), expected, rtol=4e-5)
    labels = reader.get("metadata", run=".", name="03_fc newest").decode().split()
    assert " ".join(labels) == "a b c (not finite) d e (not finite) f g"


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (4, 0), (0, 0)])
def test_write_fewer_than_two_points_writes_nothing(tmp_path, shape):
    """The projector doesn't list them."""
    assert projector.write(tmp_path, [snapshot(0, np.ones(shape, np.float32))]) is None
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- arrays to bytes

FLOATS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(width=32))


@given(points=FLOATS)
def test_vectors_have_length_one_or_zero_and_raw_bytes_are_no_text(points):
    """Whatever comes, also what overflows when squared; the direction stays."""
    before = points.copy()
    found, finite = files.vectors(points)
    np.testing.assert_array_equal(points, before)
    np.testing.assert_array_equal(finite, np.isfinite(points).all(axis=1))
    clean = np.where(finite[:, None], points, 0).astype(np.float64)
    if points.shape[1] <= 3:
        np.testing.assert_array_equal(found, np.pad(clean, ((0, 0), (0, 3 - points.shape[1]))).astype(np.float32))
    else:
        lengths = np.linalg.norm(clean, axis=1, keepdims=True)
        expected = np.divide(clean, lengths, out=np.zeros_like(clean), where=lengths > 0)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    kept = found.copy()
    content = bytes(files.raw(found))
    with pytest.raises(UnicodeDecodeError):
        content.decode()
    np.testing.assert_allclose(np.frombuffer(content, np.float32).reshape(kept.shape), kept, rtol=4e-5, atol=4e-43)


TEXTS = st.text(max_size=6) | st.sampled_from(ODD)


@given(labels=st.lists(TEXTS, min_size=1, max_size=8), columns=st.integers(0, 2), data=st.data())
def test_table_never_shifts_a_row(labels, columns, data):
    """As many lines with something on them as there are points, with as many cells as columns; a header if several."""
    extra = {f"c{i}": data.draw(st.lists(TEXTS, min_size=len(labels), max_size=len(labels))) for i in range(columns)}
    content = files.table(labels, extra, np.ones(len(labels), bool)).decode()
    assert content.endswith("\n")
    lines = [line for line in content.splitlines() if line.strip()]
    rows = [line.split("\t") for line in lines]
    if columns:
        assert rows.pop(0) == ["label", *extra]
    assert len(rows) == len(labels)
    assert all(len(row) == 1 + columns and all(cell.strip() for cell in row) for row in rows)
    for row, label in zip(rows, labels, strict=True):
        assert row[0] == " ".join(label.split()) or not label.isprintable() or row[0] == "(empty)"


@pytest.mark.parametrize(
    ("count", "height", "width"), [(7, 8, 8), (2, 3, 5), (5, 5, 3), (1, 1, 1), (10, 1, 1), (3, 40, 20)]
)
def test_sprite_sheet_shows_each_thumbnail_in_its_cell(count, height, width):
    """In reading order, upright, in its own proportions, on a square sheet with as many rows as columns."""
    sprites = np.random.default_rng(2).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    a_row, side, high, wide = files.thumbnail_size(count, height, width)
    sheet = np.asarray(Image.open(io.BytesIO(files.sprite_sheet(sprites))))
    assert sheet.shape[:2] == (a_row * side, a_row * side)
    assert (a_row - 1) ** 2 < count <= a_row**2
    factor, top, left = side // max(height, width), (side - high) // 2, (side - wide) // 2
    for i, sprite in enumerate(sprites):
        y, x = i // a_row * side, i % a_row * side
        cell = sheet[y : y + side, x : x + side]
        shown = cell[top : top + high, left : left + wide]
        np.testing.assert_array_equal(shown[factor // 2 :: factor, factor // 2 :: factor, :3], sprite)
        if high != wide:
            assert (cell[..., 3] > 0).sum() == high * wide


@given(count=st.integers(1, 10**6), height=st.integers(1, 500), width=st.integers(1, 500))
def test_thumbnails_keep_their_proportions_and_the_sheet_its_limit(count, height, width):
    """The projector shows an error in place of a sheet of more than 8192 pixels."""
    a_row, side, high, wide = files.thumbnail_size(count, height, width)
    assert a_row * side <= 4096
    assert max(high, wide) == side
    assert abs(high / side - height / max(height, width)) <= 1 / side
    assert abs(wide / side - width / max(height, width)) <= 1 / side


def test_large_thumbnails_are_shrunk_by_averaging():
    """A picture of two halves stays one."""
    sprites = np.zeros((1, 256, 256, 3), np.uint8)
    sprites[:, :128] = 200
    sheet = np.asarray(Image.open(io.BytesIO(files.sprite_sheet(sprites))))
    assert sheet.shape == (64, 64, 3)
    assert (sheet[:32] == 200).all()
    assert (sheet[32:] == 0).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"labels": ["a"]}, "Expected `labels` to have 7 values, one for each point, but got 1."),
        (
            {"columns": {"index": ["a"] * 8}},
            "Expected `columns['index']` to have 7 values, one for each point, but got 8.",
        ),
        ({"labels": ["a"] * 7, "columns": {"label": ["b"] * 7}}, "to differ, also from 'label'"),
        ({"sprites": np.zeros((6, 2, 2, 3), np.uint8)}, "shape (7, H, W, 3), but got (6, 2, 2, 3)."),
        ({"sprites": np.zeros((7, 2, 2), np.uint8)}, "shape (7, H, W, 3), but got (7, 2, 2)."),
        ({"points": np.zeros(7, np.float32)}, "Expected `points` to have shape (N, D), but got (7,)."),
    ],
)
def test_write_what_does_not_fit_raises_and_writes_nothing(tmp_path, more, message):
    """A mistake in the caller is named."""
    with pytest.raises(ValueError, match=r"Expected") as caught:
        projector.write(tmp_path, [snapshot(0), Embedding(tag=TAG, step=1, **({"points": POINTS} | more))])
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- what is kept


@given(steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
@settings(max_examples=50)
def test_snapshots_are_thinned_like_film_strips(steps):
    """At most 16, the first and the last among them; a step that comes again, or an earlier one, replaces the later."""
    strip, kept = FilmStrip(16), [EmbeddingInfo(tensor_name="other@step00000007")]
    for step in steps:
        strip.push(step, np.zeros((1, 1, 3), np.uint8))
        kept = projector.keep(kept, EmbeddingInfo(tensor_name=projector.snapshot_name(TAG, step)))
    found = [info.tensor_name for info in kept]
    assert steps_of(found) == strip.steps
    assert steps_of(found, "other") == [7]


def test_files_of_snapshots_that_went_are_deleted(tmp_path):
    """Those of the config before stay for one more write; labels and thumbnails are stored once."""
    sprites = np.zeros((7, 8, 8, 3), np.uint8)
    for step in range(40):
        projector.write(tmp_path, [snapshot(step, labels=list("abcdefg"), sprites=sprites)])
        assert len(list(tmp_path.rglob("*.bytes"))) <= 17
    assert [len(list(tmp_path.rglob(kind))) for kind in ("*.tsv", "*.png", "*.tmp", "update_*")] == [1, 1, 0, 1]
    found = names(Plugin(tmp_path), ".")
    assert len(found) == 17
    assert steps_of(found)[0] == 0
    assert steps_of(found)[-1] == 39


def test_same_step_again_is_replaced_and_read_afresh(tmp_path):
    """Also where TensorBoard still holds the old vectors."""
    reader = Plugin(tmp_path)
    for points in (POINTS, -POINTS, POINTS[::-1]):
        projector.write(tmp_path, [snapshot(3, points)])
        reader.reload()
        for name in ("03_fc@step00000003", "03_fc newest", "03_fc@step00000003"):
            np.testing.assert_allclose(vectors(reader, name, "."), unit(points), rtol=4e-5)
        assert steps_of(names(reader, ".")) == [3]


def test_tags_are_kept_apart(tmp_path):
    """Each with its own newest, also when written at once."""
    for step in (0, 5):
        projector.write(tmp_path, [snapshot(step, tag=f"{TAG}{i}", points=POINTS + i) for i in range(2)])
    reader = Plugin(tmp_path)
    newest = ["03_fc0 newest", "03_fc1 newest"]
    assert names(reader, ".")[:2] == newest
    assert sorted(names(reader, "."))[0] == "03_fc0 newest"
    for i, name in enumerate(newest):
        np.testing.assert_allclose(vectors(reader, name, "."), unit(POINTS + i), rtol=4e-5)


# ---------------------------------------------------------------------------------------------------- live


@pytest.mark.parametrize("started", ["before", "between"])
def test_new_snapshots_appear_while_running(tmp_path, started):
    """Also if TensorBoard was there first; there is one run more than the user's, never two."""
    logger = make_logger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    if started == "between":
        sinks.write([logger], [snapshot(0)])
    reader = Plugin(tmp_path)
    names(reader)
    for step in (1, 2, 3):
        sinks.write([logger], [snapshot(step)])
        reader.reload()
        assert steps_of(names(reader))[-1] == step
        assert len(reader.multiplexer.Runs()) == 2
    logger.finalize("success")


def test_without_the_extra_run_nothing_new_appears(tmp_path):
    """What that run is for."""
    logger = make_logger(tmp_path)
    sinks.write([logger], [snapshot(0)])
    reader = Plugin(tmp_path)
    assert steps_of(names(reader)) == [0]
    [marker] = (tmp_path / "run" / "projector").glob("update_*")
    sinks.write([logger], [snapshot(1)])
    next((tmp_path / "run" / "projector").glob("update_*")).rename(marker)
    reader.reload()
    assert steps_of(names(reader)) == [0]
    logger.finalize("success")


def test_two_runs_of_one_folder_do_not_disturb_each_other(tmp_path):
    """Nor does their extra run have the other's name."""
    loggers = [make_logger(tmp_path, version) for version in ("a", "b")]
    reader = Plugin(tmp_path)
    for step in (0, 1):
        sinks.write(loggers, [snapshot(step)])
        reader.reload()
        assert runs(reader) == ["a", "b"]
        assert [steps_of(names(reader, run))[-1] for run in ("a", "b")] == [step, step]
        assert len(reader.multiplexer.Runs()) == 4
    for logger in loggers:
        logger.finalize("success")


# ---------------------------------------------------------------------------------------------------- resume


def test_resume_keeps_what_was_there_and_replaces_what_comes_again(tmp_path):
    """With a new logger on the same folder; snapshots of an abandoned future go."""
    for steps in ([0, 10, 20], [10, 15]):
        logger = make_logger(tmp_path)
        for step in steps:
            sinks.write([logger], [snapshot(step)])
        logger.finalize("success")
    assert steps_of(names(Plugin(tmp_path))) == [0, 10, 15]


def test_add_embedding_of_the_user_and_ours_live_together(tmp_path):
    """Whoever comes first, and after a resume; torch alone would drop all earlier entries there."""
    for step in (0, 10):
        logger = make_logger(tmp_path)
        sinks.write([logger], [snapshot(step)])
        logger.experiment.add_embedding(torch.ones(3, 2), global_step=step, tag="mine")
        assert [steps_of(names(Plugin(tmp_path)))[-1], names(Plugin(tmp_path))[-1]] == [step, f"mine:{step:05d}"]
        sinks.write([logger], [snapshot(step + 1)])
        logger.finalize("success")
    found = names(Plugin(tmp_path))
    assert found == ["03_fc newest", *[f"03_fc@step{s:08d}" for s in (0, 1, 10, 11)], "mine:00000", "mine:00010"]


def test_ours_come_back_when_add_embedding_of_another_writer_dropped_them(tmp_path):
    """At our next write."""
    logger = make_logger(tmp_path)
    sinks.write([logger], [snapshot(0)])
    with torch.utils.tensorboard.SummaryWriter(tmp_path / "run") as other:
        other.add_embedding(torch.ones(3, 2), tag="mine")
    assert names(Plugin(tmp_path)) == ["mine:00000"]
    sinks.write([logger], [snapshot(1)])
    logger.finalize("success")
    assert names(Plugin(tmp_path)) == ["03_fc newest", "03_fc@step00000000", "03_fc@step00000001", "mine:00000"]


# ---------------------------------------------------------------------------------------------------- what goes wrong


class Killed(BaseException):
    """The process ends here."""


@contextlib.contextmanager
def killed_at(monkeypatch, change):
    """Lets that many changes of the file system happen, and no more."""
    done = 0

    def counted(method):
        def call(self, *args, **kwargs):
            nonlocal done
            if done == change:
                raise Killed
            done += 1
            return method(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "replace", "unlink", "rmdir", "mkdir", "open"):
            patch.setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
        yield


def test_killed_at_any_point_leaves_a_projector_that_can_be_read(tmp_path, monkeypatch):
    """With all that was there before, or all and the new one; the next write mends what is left lying about."""
    sprites = np.zeros((7, 8, 8, 3), np.uint8)
    killed = True
    change = 0
    for step in range(17):
        projector.write(tmp_path / "start", [snapshot(step)])
    before = steps_of(names(Plugin(tmp_path / "start"), "."))
    while killed:
        folder = shutil.copytree(tmp_path / "start", tmp_path / str(change))
        killed = False
        try:
            with killed_at(monkeypatch, change):
                projector.write(folder, [snapshot(17, labels=ODD, sprites=sprites)])
        except Killed:
            killed = True
        found = names(Plugin(folder), ".")
        reader = Plugin(folder)
        assert all(vectors(reader, name, ".").shape == (7, 5) for name in found)
        assert steps_of(found) == before or steps_of(found)[-1] == 17
        projector.write(folder, [snapshot(18)])
        projector.write(folder, [snapshot(19)])
        assert steps_of(names(Plugin(folder), "."))[-1] == 19
        assert len(list(folder.rglob("update_*"))) == 1
        assert not list(folder.rglob("*.tmp"))
        change += 1
    assert change > 10


def test_entry_whose_file_somebody_deleted_is_dropped(tmp_path):
    """One such entry stops the projector for all runs; the next write mends it."""
    for step in (0, 1):
        projector.write(tmp_path, [snapshot(step)])
    (tmp_path / "projector" / "step00000000-1-0.bytes").unlink()
    with torch.utils.tensorboard.SummaryWriter(tmp_path) as other:
        other.add_embedding(torch.ones(3, 2), tag="mine")
    (tmp_path / "00000" / "mine" / "tensors.tsv").unlink()
    projector.write(tmp_path, [snapshot(2)])
    assert names(Plugin(tmp_path), ".") == ["03_fc newest", "03_fc@step00000001", "03_fc@step00000002"]


@pytest.mark.parametrize("name", ["projector_config.pbtxt", "projector/snapshots.pb"])
@pytest.mark.parametrize("content", [b"embeddings {", b"\xff\xfe"])
def test_list_that_cannot_be_read_is_set_aside(tmp_path, name, content):
    """TensorBoard can't read it either; nobody's words are lost."""
    projector.write(tmp_path, [snapshot(0)])
    (tmp_path / name).write_bytes(content)
    projector.write(tmp_path, [snapshot(1)])
    assert steps_of(names(Plugin(tmp_path), "."))[-1] == 1
    assert (tmp_path / f"{name}.unreadable").read_bytes() == content


def test_folder_deleted_in_mid_run_is_made_again(tmp_path):
    """With what comes from then on."""
    folder = tmp_path / "run"
    projector.write(folder, [snapshot(0)])
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    projector.write(folder, [snapshot(1)])
    assert steps_of(names(Plugin(folder), ".")) == [1]


def test_folder_that_cannot_be_written_is_said_after_all_else_was_logged(tmp_path):
    """One clear error, which the callback reports."""
    logger = make_logger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    (tmp_path / "run" / "projector").write_text("in the way")
    with pytest.raises(OSError, match=r"projector can't be written to .*run/projector: "):
        sinks.write([logger], [snapshot(1), Scalar(tag="x", step=1, value=2.0)])
    logger.finalize("success")
    assert read(tmp_path / "run", "slow").scalars["x"] == [(1, 2.0)]


def test_remote_folder_is_left_out_with_a_warning(tmp_path, monkeypatch):
    """The projector can't read raw numbers from there; all else is written."""
    monkeypatch.chdir(tmp_path)
    logger = make_logger("memory://bucket")
    with pytest.warns(InterpWarning, match=r"can't read from memory://bucket/run.* local folder"):
        sinks.write([logger], [snapshot(0), Scalar(tag="x", step=0, value=2.0)])
    logger.finalize("success")
    assert not list(tmp_path.iterdir())
    assert "/bucket/run/projector_config.pbtxt" not in fsspec.filesystem("memory").find("/bucket")


def test_file_address_is_a_local_folder(tmp_path, monkeypatch):
    """`file://` is how some write the root directory."""
    logger = make_logger(tmp_path)
    assert logger.experiment
    monkeypatch.setattr(type(logger), "log_dir", f"file://{tmp_path / 'run'}")
    sinks.write([logger], [snapshot(0)])
    logger.finalize("success")
    assert steps_of(names(Plugin(tmp_path))) == [0]


# ---------------------------------------------------------------------------------------------------- the server


def wait(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited a minute for {what}.")
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", [back_end == "fast" for back_end in BACK_ENDS])
def test_running_server_shows_each_snapshot_as_it_comes(tmp_path, load_fast):
    """Started on an empty folder; two runs, dead features first, odd labels, a resume in between, the user's own."""
    with tensorboard_server(tmp_path, load_fast=load_fast) as url:
        server = Server(url)
        assert not server.json("data/plugins_listing")["projector"]["enabled"]
        for steps in ([0, 5, 10], [5, 20]):
            loggers = [make_logger(tmp_path, version) for version in ("a", "b")]
            for step in steps:
                points = POINTS * np.float32(step)
                sinks.write(loggers, [snapshot(step, points, labels=ODD, sprites=np.zeros((7, 2, 3, 3), np.uint8))])
                wait(lambda: server.json("data/plugins_listing")["projector"]["enabled"], "the tab")
                for run in ("a", "b"):
                    wait(lambda run=run, step=step: steps_of(names(server, run))[-1:] == [step], f"step {step}")
                    found = vectors(server, "03_fc newest", run)
                    np.testing.assert_allclose(found, unit(POINTS) if step else 0 * POINTS, rtol=4e-5)
                    assert server.get("metadata", run=run, name="03_fc newest").decode().split("\n") == [*READ, ""]
                    assert server.get("sprite_image", run=run, name="03_fc newest").startswith(b"\x89PNG")
                    assert runs(server) == ["a", "b"]
            for logger in loggers:
                logger.experiment.add_embedding(torch.ones(3, 2), global_step=steps[0], tag="mine")
                logger.finalize("success")
        sinks.write([make_logger(tmp_path, "a")], [snapshot(30)])
        wait(lambda: steps_of(names(server, "a"))[-1:] == [30], "step 30")
        assert steps_of(names(server, "a")) == [0, 5, 20, 30]
        assert names(server, "a")[-2:] == ["mine:00000", "mine:00005"]
        wait(lambda: len(server.json("data/runs")) == 4, "the earlier extra runs to go")
    assert len(list(tmp_path.rglob("*tfevents*"))) == 7  # five writers, and an extra run each
    assert len(event_files(tmp_path)) == 5
