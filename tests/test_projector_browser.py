"""The projector's page itself, in a browser: what it makes of odd vectors, labels and thumbnails."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest

from examples.figures import BROWSERS, _wait, fetch, tensorboard_server
from lightning_interp.records import Embedding
from lightning_interp.sinks import projector
from tests.test_projector import ODD, READ, make_logger

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# The page draws with WebGL, which a headless browser without a graphics card has to do in software.
OPTIONS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
OPTIONS += ["--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
RANDOM = np.random.default_rng(0)
NORMAL = RANDOM.standard_normal((7, 5)).astype(np.float32)
SPOILED = np.where(np.eye(7, 5) > 0, np.float32(np.nan), NORMAL)
CASES = {
    "normal": {"points": NORMAL, "labels": ODD, "sprites": RANDOM.integers(0, 256, (7, 3, 9, 3), dtype=np.uint8)},
    "columns": {"points": NORMAL, "labels": ODD, "columns": {"index": list("0123456"), "odd": ODD[::-1]}},
    "zeros": {"points": 0 * NORMAL},
    "not_finite": {"points": SPOILED},
    "infinite": {"points": NORMAL * np.float32(np.inf)},
    "one_dimension": {"points": NORMAL[:, :1]},
    "two_dimensions": {"points": NORMAL[:, :2]},
    "two_points": {"points": NORMAL[:2]},
    "one_pixel": {"points": NORMAL, "sprites": np.full((7, 1, 1, 3), 255, np.uint8)},
}
# The points that have a place in space, once the page has the thumbnails and labels of this run too.
SHOWN = """(app, run) => {
  const data = app.dataSet;
  const about = data && data.spriteAndMetadataInfo;
  if (app.dataPanel.selectedRun !== run || !about || about.seen) return null;
  if (!data.points.every(p => 'pca-2' in p.projections)) return null;
  about.seen = true;
  const placed = data.points.filter(p => ['pca-0', 'pca-1', 'pca-2'].every(c => Number.isFinite(p.projections[c])));
  const cells = data.points.map(p => Object.values(p.metadata).map(String));
  return {count: data.points.length, placed: placed.length, cells, sheet: (about.spriteImage || {}).width || 0};
}"""


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None, reason="needs a Chromium and the extra `figures`"
)
def test_page_gives_every_point_a_place_and_its_own_label(tmp_path):
    """NaN or fewer than three dimensions would leave none a place; a stray tab or line break would move the labels."""
    from playwright.sync_api import sync_playwright

    for run, case in CASES.items():
        logger = make_logger(tmp_path, run)
        logger.log_metrics({"loss": 0.0}, step=0)
        logger.finalize("success")
        projector.write(logger.log_dir, [Embedding(tag="interp.embedding/03_fc", step=0, **case)])
    with tensorboard_server(tmp_path) as url, sync_playwright() as playwright:
        _wait(lambda: fetch(f"{url}data/plugins_listing")["projector"]["enabled"], "the projector's tab", pause=0.5)
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        page = chromium.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}data/plugin/projector/projector_binary.html")
        app = page.locator("vz-projector")
        found = {}
        for run in CASES:
            page.locator("vz-projector-data-panel").evaluate("(panel, run) => { panel.selectedRun = run; }", run)
            found[run] = _wait(lambda run=run: page.wait_for_timeout(100) or app.evaluate(SHOWN, run), f"run {run}")
        chromium.close()
    assert not errors
    for run, case in CASES.items():
        assert found[run]["placed"] == found[run]["count"] == len(case["points"])
    assert found["normal"]["cells"] == [[label] for label in READ]
    assert found["columns"]["cells"] == [list(row) for row in zip(READ, map(str, range(7)), READ[::-1], strict=True)]
    assert [cells[0] for cells in found["not_finite"]["cells"]][4:] == ["4 (not finite)", "5", "6"]
    assert [found[run]["sheet"] for run in ("normal", "one_pixel", "zeros")] == [81, 96, 0]
