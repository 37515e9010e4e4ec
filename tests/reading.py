"""Reads a log directory back through both of TensorBoard's data back ends, as its dashboards do.

`fast` is the data server (a program of its own, the default where its binary exists), `slow` the loader in Python.
They keep and drop different events, so what is promised must hold in both.
"""

from __future__ import annotations

import io
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorboard_data_server
from numpy.typing import NDArray
from PIL import Image
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.data import grpc_provider

BACK_ENDS = ("fast", "slow") if tensorboard_data_server.server_binary() else ("slow",)
WAIT_S = 60.0
_ALL = 100_000
_BY_PLUGIN = {"scalars": "scalars", "histograms": "tensors", "text": "tensors", "images": "blob_sequences"}


@dataclass(frozen=True)
class Log:
    """What the dashboards get to see: tag to the list of (step, value), in the order kept.

    Histograms are (bins, 3): left, right, count. Pictures are (H, W, 3) uint8.
    """

    scalars: dict[str, list[tuple[int, float]]]
    histograms: dict[str, list[tuple[int, NDArray[Any]]]]
    text: dict[str, list[tuple[int, str]]]
    images: dict[str, list[tuple[int, NDArray[np.uint8]]]]

    def steps(self, tag: str) -> list[int]:
        """Steps of a scalar."""
        return [step for step, _ in self.scalars[tag]]

    def values(self, tag: str) -> list[float]:
        """Values of a scalar."""
        return [value for _, value in self.scalars[tag]]


def event_files(folder: Path) -> list[Path]:
    """All event files in a folder and below it, but those by which the projector shows that it has something new."""
    return sorted(path for path in folder.rglob("*tfevents*") if "projector" not in path.relative_to(folder).parts)


def events(folder: Path) -> list[Event]:
    """All events as they were written, in order, file after file."""
    loaders = [RawEventFileLoader(str(path)) for path in event_files(folder)]
    return [Event.FromString(raw) for loader in loaders for raw in loader.Load()]


def summaries(folder: Path) -> list[Event]:
    """The events that hold values."""
    return [event for event in events(folder) if event.HasField("summary")]


def read(folder: Path, back_end: str) -> Log:
    """The log of the one run in a folder, through one back end."""
    with (_fast if back_end == "fast" else _slow)(folder) as provider:
        return Log(**{plugin: _series(provider, plugin) for plugin in _BY_PLUGIN})


@contextmanager
def _slow(folder: Path) -> Iterator[Any]:
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    yield MultiplexerDataProvider(multiplexer, str(folder))


@contextmanager
def _fast(folder: Path) -> Iterator[Any]:
    port_file = folder.parent / f"{folder.name}.port"
    port_file.unlink(missing_ok=True)
    command = [tensorboard_data_server.server_binary(), f"--logdir={folder}", "--reload=once", "--port=0"]
    command += [f"--port-file={port_file}", "--die-after-stdin", "--host=127.0.0.1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # ends when its stdin is closed
        try:
            _wait(lambda: port_file.exists() and port_file.read_text().endswith("\n"), "the data server to start")
            with grpc.insecure_channel(f"127.0.0.1:{int(port_file.read_text())}") as channel:
                provider = grpc_provider.GrpcDataProvider("data server", grpc_provider.make_stub(channel))
                last = _last_steps(folder)
                _wait(lambda: _listed(provider) == last, f"the data server to load {last}")
                yield provider
        finally:
            port_file.unlink(missing_ok=True)


def _wait(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited {WAIT_S:g} s for {what}.")
        time.sleep(0.02)


def _last_steps(folder: Path) -> dict[str, int]:
    """Tag to the step of its last event: the one that both back ends always keep."""
    return {value.tag: event.step for event in summaries(folder) for value in event.summary.value}


def _listed(provider: Any) -> dict[str, int]:
    found = {}
    for plugin, kind in _BY_PLUGIN.items():
        listed = getattr(provider, f"list_{kind}")(**_where(plugin))
        found.update({tag: series.max_step for tags in listed.values() for tag, series in tags.items()})
    return found


def _series(provider: Any, plugin: str) -> Any:
    runs = getattr(provider, f"read_{_BY_PLUGIN[plugin]}")(**_where(plugin), downsample=_ALL)
    if len(runs) > 1:
        raise ValueError(f"Expected one run, but got {sorted(runs)}.")
    tags = next(iter(runs.values()), {})
    return {tag: [(datum.step, _value(provider, plugin, datum)) for datum in data] for tag, data in tags.items()}


def _value(provider: Any, plugin: str, datum: Any) -> Any:
    if plugin == "scalars":
        return datum.value
    if plugin == "histograms":
        return datum.numpy
    if plugin == "text":
        return datum.numpy.reshape(-1)[0].decode()
    png = provider.read_blob(context.RequestContext(), blob_key=datum.values[2].blob_key)  # width, height, picture
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _where(plugin: str) -> dict[str, Any]:
    return {"ctx": context.RequestContext(), "experiment_id": "", "plugin_name": plugin}
