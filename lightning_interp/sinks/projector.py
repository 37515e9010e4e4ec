"""Embeddings to TensorBoard's projector, while TensorBoard runs.

The projector reads no events but files: a `projector_config.pbtxt` in the folder of a run, and what it names. Three
things need care. It reads that file again only when a run has come or gone, so each write moves an empty run,
`projector/update_<n>`, on by one. It then reads every vector that is named, so at most 16 snapshots of a tag are kept.
And one name of a missing file ends the whole tab, so files are written first, then the config, in one move, and old
files are deleted at the write after that: whenever the process is killed, what stands there can be read.

    <log_dir>/projector_config.pbtxt            what TensorBoard reads: ours, and the user's own `add_embedding`
    <log_dir>/projector/snapshots.pb            ours alone, since `add_embedding` in a new writer forgets the rest
    <log_dir>/projector/step00000123-4-0.bytes  float32, (N, D)
    <log_dir>/projector/labels-<hash>.tsv       shared by the snapshots that have the same
    <log_dir>/projector/sprites-<hash>.png      likewise
    <log_dir>/projector/update_4/events...      without data; the only sign by which TensorBoard notices
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_interp.records import Embedding
from lightning_interp.sinks import _projector_files as files

FOLDER = "projector"
CONFIG = "projector_config.pbtxt"
INDEX = "snapshots.pb"
MAX_SNAPSHOTS = 16
_POINTS = re.compile(r"step\d+-(\d+)-\d+\.bytes")
_FILE = re.compile(rf"({_POINTS.pattern}|labels-[0-9a-f]{{16}}\.tsv|sprites-[0-9a-f]{{16}}\.png)(\.tmp)?")
_UPDATE = re.compile(r"update_(\d+)")
_NAME = re.compile(r"(.*)@step(\d+)")


def write(log_dir: str | os.PathLike[str], records: Sequence[Embedding]) -> ProjectorConfig | None:
    """Adds snapshots to the projector of a run, or replaces them.

    A snapshot is named `<layer>@step<step>` after its tag; the newest of a tag also stands first, as `<layer> newest`,
    since the projector opens with the first. Snapshots of the same tag at this step or later go: a run that was resumed
    takes them again. Of more than 16, the one goes whose neighbours lie closest together in log(step + 1).

    Args:
        log_dir: Folder of the run, on a file system of this machine; made if it is missing.
        records: Embeddings; those of fewer than two points are left out, since the projector doesn't list them.

    Returns:
        The config as it was written, None if there was nothing to write.

    Raises:
        ValueError: If labels, columns or thumbnails don't fit the points; nothing is written then.
        OSError: If the files can't be written.
    """
    for record in records:
        _check(record)
    records = [record for record in records if record.points.shape[0] > 1 and record.points.size]
    if not records:
        return None
    root = Path(log_dir)
    folder = root / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _update(root, folder, records)
    except OSError as error:
        raise OSError(f"Embeddings for TensorBoard's projector can't be written to {folder}: {error}") from error


def _update(root: Path, folder: Path, records: Sequence[Embedding]) -> ProjectorConfig:
    before = _existing(_read(folder / INDEX, ProjectorConfig.FromString), root)
    listed = _read(root / CONFIG, lambda content: text_format.Parse(content.decode(), ProjectorConfig()))
    theirs = [info for info in _existing(listed, root) if not _is_ours(info)]
    number = _last_update(folder) + 1
    kept = before
    for i, record in enumerate(records):
        kept = keep(kept, _write_files(folder, record, f"{number}-{i}"))
    _replace(folder / INDEX, ProjectorConfig(embeddings=kept).SerializeToString())
    config = ProjectorConfig(embeddings=[*_newest(kept), *kept, *theirs])
    _replace(root / CONFIG, text_format.MessageToString(config).encode())
    _mark(folder, number)
    _sweep(folder, [*before, *kept])
    return config


# ---------------------------------------------------------------------------------------------------- what is kept


def snapshot_name(tag: str, step: int) -> str:
    """What the list in the projector shows; it is sorted by character and goes into an address as it is.

    Example:
        >>> snapshot_name("interp.embedding/07_fc", 123), snapshot_name("interp.embedding.b/a&b:0", 0)
        ('07_fc@step00000123', 'b/a_b_0@step00000000')
    """
    short = re.sub(r"^interp\.(embedding[./])?", "", tag)
    safe = re.sub(r"[^-\w./]+", "_", short)
    return f"{safe}@step{step:08d}"


def keep(infos: Sequence[EmbeddingInfo], new: EmbeddingInfo) -> list[EmbeddingInfo]:
    """Adds a snapshot; see `write` for which ones go. The first and the last of a tag never do.

    Args:
        infos: Snapshots of any tags, those of a tag in the order of their steps.
        new: The one that comes.
    """
    tag, step = _tag_and_step(new)
    same = [info for info in infos if _tag_and_step(info)[0] == tag and _tag_and_step(info)[1] < step]
    same.append(new)
    if len(same) > MAX_SNAPSHOTS:
        times = [math.log1p(_tag_and_step(info)[1]) for info in same]
        del same[min(range(1, len(times) - 1), key=lambda i: times[i + 1] - times[i - 1])]
    return [info for info in infos if _tag_and_step(info)[0] != tag] + same


def _newest(infos: Iterable[EmbeddingInfo]) -> list[EmbeddingInfo]:
    """The newest of each tag under a name of its own that stays: a page that is open finds later ones under it.

    They stand first in the config: the projector remembers the last tensor that it read, by name, and forgets it at the
    next one in the list. So what is replaced under the same name is read afresh.
    """
    last = {_tag_and_step(info)[0]: info for info in infos}
    named = []
    for tag, info in last.items():
        named.append(EmbeddingInfo())
        named[-1].CopyFrom(info)
        named[-1].tensor_name = f"{tag} newest"  # a space sorts before the @ of the others
    return named


def _tag_and_step(info: EmbeddingInfo) -> tuple[str, int]:
    found = _NAME.fullmatch(info.tensor_name)
    return (found[1], int(found[2])) if found else (info.tensor_name, -1)


def _is_ours(info: EmbeddingInfo) -> bool:
    folder, _, name = info.tensor_path.partition("/")
    return folder == FOLDER and _FILE.fullmatch(name) is not None


# ---------------------------------------------------------------------------------------------------- files


def _check(record: Embedding) -> None:
    if record.points.ndim != 2:
        raise ValueError(f"Expected `points` to have shape (N, D), but got {record.points.shape}.")
    count = len(record.points)
    given = {"labels": record.labels} if record.labels else {}
    for name, values in (given | {f"columns[{name!r}]": values for name, values in record.columns.items()}).items():
        if len(values) != count:
            raise ValueError(f"Expected `{name}` to have {count} values, one for each point, but got {len(values)}.")
    names = ["label"] * bool(record.labels) + [files.clean(name) for name in record.columns]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected the names in `columns` to differ, also from 'label', but got {names}.")
    sprites = record.sprites
    if sprites is not None and (sprites.ndim != 4 or sprites.shape[0] != count or sprites.shape[3] != 3):
        raise ValueError(f"Expected `sprites` to have shape ({count}, H, W, 3), but got {sprites.shape}.")


def _write_files(folder: Path, record: Embedding, number: str) -> EmbeddingInfo:
    """Writes the vectors, and the labels and thumbnails unless an earlier snapshot has the same."""
    matrix, finite = files.vectors(record.points)
    info = EmbeddingInfo(tensor_name=snapshot_name(record.tag, record.step), tensor_shape=matrix.shape)
    name = f"step{record.step:08d}-{number}.bytes"
    info.tensor_path = f"{FOLDER}/{name}"
    (folder / name).write_bytes(files.raw(matrix))  # nobody knows of it yet
    table = files.table(record.labels, record.columns, finite)
    name = f"labels-{_hash(table)}.tsv"
    info.metadata_path = f"{FOLDER}/{name}"
    if not (folder / name).exists():
        _replace(folder / name, table)
    if record.sprites is not None and record.sprites.size:
        _write_sprites(folder, info, np.ascontiguousarray(record.sprites, dtype=np.uint8))
    return info


def _write_sprites(folder: Path, info: EmbeddingInfo, sprites: NDArray[np.uint8]) -> None:
    count, height, width, _ = sprites.shape
    name = f"sprites-{_hash(sprites.data, str(sprites.shape))}.png"
    info.sprite.image_path = f"{FOLDER}/{name}"
    info.sprite.single_image_dim.extend([files.thumbnail_size(count, height, width)[1]] * 2)
    if not (folder / name).exists():
        _replace(folder / name, files.sprite_sheet(sprites))


def _hash(content: bytes | memoryview, more: str = "") -> str:
    return hashlib.blake2b(content, digest_size=8, person=more.encode()[:16]).hexdigest()


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that nobody ever sees half of it."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _read(path: Path, parse: Callable[[bytes], ProjectorConfig]) -> list[EmbeddingInfo]:
    """What a config lists; nothing if there is none. One that can't be read, also not by TensorBoard, is set aside."""
    try:
        return list(parse(path.read_bytes()).embeddings)
    except FileNotFoundError:
        return []
    except (text_format.ParseError, DecodeError, UnicodeDecodeError):
        path.replace(path.with_name(f"{path.name}.unreadable"))
        return []


def _existing(infos: Iterable[EmbeddingInfo], root: Path) -> list[EmbeddingInfo]:
    """Without those whose tensor somebody has deleted: a single one would end the projector, for all runs."""
    return [info for info in infos if not info.tensor_path or (root / info.tensor_path).exists()]


def _last_update(folder: Path) -> int:
    """The largest number in use: of an update, or of a file, in case somebody has deleted the update."""
    found = [_UPDATE.fullmatch(path.name) or _POINTS.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in found if match), default=0)


def _mark(folder: Path, number: int) -> None:
    """Moves the empty run on, which makes TensorBoard look again."""
    run = folder / f"update_{number}"
    run.mkdir(exist_ok=True)
    with (run / "events.out.tfevents.0.projector").open("wb") as events:  # without one the data server sees no run
        RecordWriter(events).write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    for path in folder.iterdir():
        if _UPDATE.fullmatch(path.name) and path != run:
            with contextlib.suppress(OSError):
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()


def _sweep(folder: Path, infos: Iterable[EmbeddingInfo]) -> None:
    """Deletes our files that are not named, neither now nor before: a server may be reading the config of before."""
    named = {path for info in infos for path in (info.tensor_path, info.metadata_path, info.sprite.image_path)}
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name) and f"{FOLDER}/{path.name}" not in named:
            with contextlib.suppress(OSError):  # in use, on Windows: goes next time
                path.unlink()
