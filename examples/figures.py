"""Makes the pictures of the documentation: trains the demo, opens its log in TensorBoard, takes screenshots.

Run it with `make figures`, or `python examples/figures.py [--out docs/figures]`. It needs the extra `figures`
(`pip install "lightning-interp[figures]"`) and a Chromium: the system's, else the one of `playwright install chromium`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The projector draws with WebGL, here in software.
BROWSER_OPTIONS = [
    "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Figure(NamedTuple):
    """What a picture shows: as many rows of cards as its height lets in whole.

    Attributes:
        dashboard: `timeseries` or `images`.
        tags: Regular expression.
        runs: Likewise; the projector's runs have longer names.
        height: Of the window, in pixels.
    """

    dashboard: str
    tags: str
    runs: str
    height: int


SOME = "(healthy|too-high|too-soon)$"  # a fourth run would not fit
FIGURES = {
    "timeseries": Figure(
        "timeseries",
        "^interp/(alerts_(active|critical|warning)|dead_f|sparsity|step_r|update_ratio_median|learning)",
        SOME,
        1480,
    ),
    "pictures": Figure("images", "filters/00|activation_maps_0/02", SOME, 1050),
    "classes": Figure("images", "images/strip", SOME, 1020),
    "attribution": Figure("images", "saliency/grad_cam$|top_patches/02", SOME, 1380),
    "labels": Figure("images", "embedding/|influence/images|suspect_labels/images", "wrong-labels$", 1010),
}
WIDTH = 1600
PROJECTOR_SIZE = (1200, 800)
PROJECTOR_RUN, PROJECTOR_STEPS = "healthy", 250  # of its t-SNE
WAIT_S, PATIENT_S = 60.0, 300.0
MAX_BYTES = 300_000


@contextmanager
def tensorboard_server(logdir: Path, *, load_fast: bool | None = None) -> Iterator[str]:
    """Runs TensorBoard on the loopback interface, on a free port, for the length of the block.

    Args:
        logdir: Folder with one run or many.
        load_fast: Which data back end reads the log: True the data server, False the loader in Python, None whichever
            TensorBoard chooses.

    Yields:
        The address, `http://127.0.0.1:<port>/`.

    Raises:
        RuntimeError: If the server ends at once; the message holds what it printed.
        TimeoutError: If it doesn't answer.
    """
    choice = {None: "auto", True: "true", False: "false"}[load_fast]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        logdir.resolve().name,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    command += ["--load_fast", choice, "--reload_interval", "1", "--samples_per_plugin", "images=1000"]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=output, cwd=logdir.resolve().parent) as server,
    ):
        try:
            yield _address(server, output)
        finally:
            server.terminate()


def _address(server: subprocess.Popen[bytes], output: Any) -> str:
    """Waits for the line in which TensorBoard says where it is."""
    printed = ""

    def found() -> re.Match[str] | None:
        nonlocal printed
        output.seek(0)
        printed = output.read()
        if server.poll() is not None:
            raise RuntimeError(f"TensorBoard ended with status {server.returncode}: {printed}")
        return re.search(r"at (http://127\.0\.0\.1:\d+/)", printed)

    return str(_wait(found, "TensorBoard to start")[1])


def _wait(condition: Callable[[], Any], what: str, *, pause: float = 0.1, patience: float = WAIT_S) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited {patience:g} s for {what}.")
        time.sleep(pause)
    return value


def fetch(url: str) -> Any:
    """The JSON behind an address of the server."""
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return json.loads(answer.read())


def wait_for_tag(url: str, tag: str) -> None:
    """Waits until a scalar, picture or histogram of this tag can be shown.

    Args:
        url: Of the server.
        tag: Name of a record, or its beginning.

    Raises:
        TimeoutError: If it doesn't come.
    """
    _wait(lambda: f'"{tag}' in json.dumps(fetch(f"{url}data/plugin/timeseries/tags")), f"the tag {tag!r}", pause=0.3)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium for the length of the block."""
    from playwright.sync_api import sync_playwright

    found = (shutil.which(name) for name in BROWSERS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=next(filter(None, found), None), args=BROWSER_OPTIONS)
        try:
            yield chromium
        finally:
            chromium.close()


def screenshot(  # noqa: PLR0913 - a camera has many knobs
    chromium: Browser,
    url: str,
    path: Path,
    *,
    dashboard: str = "timeseries",
    tag_filter: str = "",
    run_filter: str = "",
    size: tuple[int, int] = (1400, 900),
    dark: bool = False,
    prepare: Callable[[Page], None] | None = None,
) -> None:
    """Opens a dashboard, waits until its charts and pictures are drawn, and writes what is seen.

    Args:
        chromium: From `browser`.
        url: From `tensorboard_server`; the log must be loaded (`wait_for_tag`).
        path: PNG to write, at most 300 kB.
        dashboard: `timeseries`, `scalars`, `images`, `histograms`, `text` or the name of a plugin.
        tag_filter: Regular expression; only tags that match are shown.
        run_filter: Likewise for runs.
        size: Width and height of the window, in pixels.
        dark: Whether to use the dark theme.
        prepare: What to click before the picture is taken.

    Raises:
        TimeoutError: If the dashboard stays empty.
    """
    page = chromium.new_page(viewport={"width": size[0], "height": size[1]})
    try:
        page.set_default_timeout(1000 * WAIT_S)
        page.goto(address(url, dashboard, tag_filter, run_filter, dark=dark))
        wait_until_drawn(page)
        if prepare is not None:
            prepare(page)
            wait_until_drawn(page)
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path)
    finally:
        page.close()
    shrink(path)


def projector_screenshot(chromium: Browser, url: str, path: Path, run: str) -> None:
    """Opens the projector on the newest points of a run, colours them by label, lets its t-SNE run, takes the picture.

    Args:
        chromium: From `browser`.
        url: From `tensorboard_server`.
        path: PNG to write, at most 300 kB.
        run: Whose points.

    Raises:
        TimeoutError: If the points don't come.
    """
    _wait(lambda: fetch(f"{url}data/plugins_listing")["projector"]["enabled"], "the projector", pause=0.5)
    page = chromium.new_page(viewport={"width": PROJECTOR_SIZE[0], "height": PROJECTOR_SIZE[1]})
    try:
        page.set_default_timeout(1000 * WAIT_S)
        page.goto(f"{url}#projector")

        def frame() -> Any:
            page.wait_for_timeout(200)  # lets the page work
            return next((each for each in page.frames if "projector_binary" in each.url), None)

        inside = _wait(frame, "the frame of the projector")
        panel, app = inside.locator("vz-projector-data-panel"), inside.locator("vz-projector")
        panel.evaluate("(panel, run) => { if (panel.selectedRun !== run) panel.selectedRun = run; }", run)

        def placed() -> bool:
            page.wait_for_timeout(200)
            return bool(app.evaluate(_PLACED))

        _wait(placed, "the points")
        panel.evaluate("panel => { panel.selectedColorOptionName = 'label'; }")
        inside.locator("vz-projector-projections-panel").evaluate("p => p.$$('.ink-tab[data-tab=tsne]').click()")

        def turned() -> bool:
            page.wait_for_timeout(500)
            return bool(app.evaluate("app => app.dataSet.tSNEIteration") >= PROJECTOR_STEPS)

        _wait(turned, "the t-SNE of the projector", patience=PATIENT_S)
        app.evaluate("app => { app.dataSet.tSNEShouldPause = true; }")
        page.wait_for_timeout(1500)
        page.screenshot(path=path)
    finally:
        page.close()
    shrink(path)


# The points of the projector have places, and their thumbnails are there.
_PLACED = """app => !!app.dataSet && app.dataSet.points[0].projections['pca-0'] !== undefined
  && !!app.dataSet.spriteAndMetadataInfo"""


def address(  # noqa: PLR0913 - what a link to TensorBoard can hold
    url: str, dashboard: str, tag_filter: str = "", run_filter: str = "", *, dark: bool = False, smoothing: float = 0.0
) -> str:
    """Link to a dashboard: Time Series reads the filter from the query, the older ones from behind the hash.

    Example:
        >>> address("http://127.0.0.1:6006/", "images", "interp")
        'http://127.0.0.1:6006/?darkMode=false&smoothing=0.0&tagFilter=interp#images&tagFilter=interp'
    """
    chosen = f"&tagFilter={quote(tag_filter)}" if tag_filter else ""
    chosen += f"&runFilter={quote(run_filter)}&regexInput={quote(run_filter)}" if run_filter else ""
    return f"{url}?darkMode={str(dark).lower()}&smoothing={smoothing}{chosen}#{dashboard}{chosen}"


def wait_until_drawn(page: Page) -> None:
    """Waits until something is drawn, nothing is loading, and the picture stands still."""
    page.wait_for_function(_DRAWN)
    before = b""
    while (now := page.screenshot()) != before:
        before = now
        page.wait_for_timeout(500)


def close_settings(page: Page) -> None:
    """Closes the pane on the right of Time Series, which takes a fifth of the window. For `prepare`."""
    page.get_by_role("button", name="Settings").last.click()


# The elements that hold a chart, a picture or a text, in the old dashboards inside nested shadow roots.
_DRAWN = """() => {
  const shown = 'line-chart, histogram-component, vz-line-chart2, vz-histogram-timeseries, tf-markdown-view, iframe';
  const find = (root, selector) => {
    const inner = [...root.querySelectorAll('*')].filter(e => e.shadowRoot).map(e => find(e.shadowRoot, selector));
    return [...root.querySelectorAll(selector), ...inner.flat()].filter(e => e.getClientRects().length);
  };
  const pictures = find(document, 'img');
  const waiting = find(document, 'mat-spinner, .loading').length + pictures.filter(e => !e.complete).length;
  return find(document, shown).length + pictures.length > 0 && waiting === 0;
}"""


def shrink(path: Path, limit: int = MAX_BYTES) -> None:
    """Rewrites a PNG with as many colours of its own palette as fit into `limit` bytes, all of them if they do.

    Raises:
        ValueError: If not even 16 colours fit.
    """
    if path.stat().st_size <= limit:
        return
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    for colours in (256, 128, 64, 32, 16):
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= limit:
            return
    raise ValueError(f"{path} takes more than {limit} bytes even with 16 colours. Take a smaller window.")


def train(folder: Path, seed: int) -> None:
    """Trains the networks of the demo, with logs in `folder`."""
    from lightning_interp.demo import run_demo

    run_demo(folder, seed=seed)


def main(out: Path = Path("docs/figures"), logs: Path | None = None, seed: int = 0) -> None:
    """Writes the pictures of `FIGURES`.

    Args:
        out: Folder of the pictures.
        logs: A log directory to open; None trains the demo first.
        seed: Of the demo.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if logs is None:
            logs = Path(scratch) / "runs"
            train(logs, seed)
        with tensorboard_server(logs) as url, browser() as chromium:
            wait_for_tag(url, "interp")
            for name, figure in FIGURES.items():
                tidy = close_settings if figure.dashboard == "timeseries" else None
                screenshot(
                    chromium,
                    url,
                    out / f"{name}.png",
                    dashboard=figure.dashboard,
                    tag_filter=figure.tags,
                    run_filter=figure.runs,
                    size=(WIDTH, figure.height),
                    prepare=tidy,
                )
            projector_screenshot(chromium, url, out / "projector.png", PROJECTOR_RUN)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    parser.add_argument("--logs", type=Path, help="open these logs, in place of training the demo")
    parser.add_argument("--seed", type=int, default=0, help="of the demo")
    arguments = parser.parse_args()
    main(arguments.out, arguments.logs, arguments.seed)
