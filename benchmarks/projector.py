"""Time of writing embeddings for TensorBoard's projector: ours against torch's `add_embedding`, as ratios.

    python benchmarks/projector.py [--points 2000] [--dimensions 512] [--rounds 5]

Both write the same matrix of normal numbers with ten labels, in turn, each into a log of its own that grows by a
snapshot a round (ours keeps 16), then once more with thumbnails of grey noise. The line "a plain file" is what the disk
takes for the same bytes. The first request is the one for which TensorBoard's projector reads all snapshots. A ratio of
less than 1 is faster than torch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from lightning_interp.records import Embedding
from lightning_interp.sinks import projector

SIDE = 28


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Logs:
    """The same points into two logs: our own projector's, and that of torch's SummaryWriter.

    Args:
        folder: Gets `ours` and `torch`.
        points: (N, D), float32; the labels are ten.
    """

    def __init__(self, folder: Path, points: NDArray[np.float32]) -> None:
        self.mine, self.theirs = folder / "ours", folder / "torch"
        self._points, self._tensor = points, torch.from_numpy(points)
        self._labels = [str(i % 10) for i in range(len(points))]
        self._writer = SummaryWriter(self.theirs)

    def ours(self, step: int, sprites: Any = None) -> float:
        """Writes a snapshot, with (N, H, W, 3) thumbnails where they are given; wall time in seconds."""
        record = Embedding(
            tag="interp.embedding/fc", step=step, points=self._points, labels=self._labels, sprites=sprites
        )
        return seconds(lambda: projector.write(self.mine, [record]))

    def torchs(self, step: int, images: Any = None) -> float:
        """Likewise, with (N, 3, H, W)."""
        return seconds(
            lambda: self._writer.add_embedding(self._tensor, self._labels, label_img=images, global_step=step)
        )

    def close(self) -> None:
        """Ends the writer."""
        self._writer.close()


def normal_points(count: int, dimensions: int) -> NDArray[np.float32]:
    """(count, dimensions) normal numbers."""
    return np.random.default_rng(0).standard_normal((count, dimensions)).astype(np.float32)


def first_request(folder: Path) -> None:
    """What the projector does when its tab is opened."""
    multiplexer = EventMultiplexer()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    plugin = ProjectorPlugin(TBContext(logdir=str(folder), data_provider=provider, multiplexer=None))
    answer = Client(plugin.get_plugin_apps()["/runs"]).get("/")
    if answer.json != ["."]:
        raise RuntimeError(f"the projector lists {answer.text}")


def megabytes(folder: Path) -> float:
    """Of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2000, help="rows (default 2000)")
    parser.add_argument("--dimensions", type=int, default=512, help="columns (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="snapshots of each (default 5)")
    options = parser.parse_args()
    points = normal_points(options.points, options.dimensions)
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (options.points, SIDE, SIDE, 1), dtype=np.uint8).repeat(3, axis=3)
    pictures = torch.from_numpy(grey).permute(0, 3, 1, 2) / 255
    with tempfile.TemporaryDirectory() as scratch:
        logs = Logs(Path(scratch), points)
        plain = [(logs.ours(step), logs.torchs(step)) for step in range(options.rounds)]
        files = [seconds(lambda: points.tofile(f"{scratch}/plain")) for _ in range(options.rounds)]
        requests = seconds(lambda: first_request(logs.mine)), seconds(lambda: first_request(logs.theirs))
        sizes = megabytes(logs.mine), megabytes(logs.theirs)
        first, following = (logs.ours(options.rounds + i, grey) for i in range(2))
        pictured = logs.torchs(options.rounds, pictures)
        logs.close()
    table = Table(title=f"{options.points} x {options.dimensions} for the projector")
    for heading in ("what", "ours", "torch", "ratio"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, a, b, unit in (
        ("a snapshot, median", *(1e3 * statistics.median(times) for times in zip(*plain, strict=True)), "ms"),
        ("a snapshot, fastest", *(1e3 * min(times) for times in zip(*plain, strict=True)), "ms"),
        ("a plain file, median", 1e3 * statistics.median(files), None, "ms"),
        (f"the first with {SIDE} x {SIDE} thumbnails", 1e3 * first, 1e3 * pictured, "ms"),
        ("the next with the same thumbnails", 1e3 * following, 1e3 * pictured, "ms"),
        (f"first request after {options.rounds} snapshots", 1e3 * requests[0], 1e3 * requests[1], "ms"),
        (f"disk after {options.rounds} snapshots", *sizes, "MB"),
    ):
        table.add_row(what, f"{a:.1f} {unit}", *(("", "") if b is None else (f"{b:.1f} {unit}", f"{a / b:.4f}")))
    Console().print(table)


if __name__ == "__main__":
    main()
