"""Processes that Lightning starts out of a running one: `ddp_spawn` pickles the callbacks, `ddp_notebook` forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.battery import differences
from tests.reading import event_files, summaries

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "launched.py"
STEPS = 2  # of an epoch: 24 samples, 6 in a batch, over two processes
FORKS = hasattr(os, "fork")


def launch(folder, strategy, callbacks):
    """Runs the script to its end; what it said, if it failed, is the message."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder), strategy, callbacks]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed in" not in done.stderr
    return [torch.load(folder / f"weights.{number}.pt") for number in range(2)]


@pytest.mark.parametrize(
    "strategy", ["ddp_spawn", pytest.param("ddp_notebook", marks=pytest.mark.skipif(not FORKS, reason="needs fork"))]
)
def test_fit_in_processes_that_lightning_launches(strategy, tmp_path):
    """The weights as without us, twice; one event file a fit, written by rank zero, with numbers of all steps."""
    expected = launch(tmp_path / "none", strategy, "none")
    found = launch(tmp_path / "Interp", strategy, "Interp")
    assert differences([dict(each) for each in expected], [dict(each) for each in found]) == []
    assert json.loads((tmp_path / "Interp" / "hooks.json").read_text()) == 0
    for rank in range(2):
        told = json.loads((tmp_path / "Interp" / f"rank.{rank}.json").read_text())
        assert told == {"batches": STEPS, "hooks": 0, "world": 2}
    for number in range(2):
        run = tmp_path / "Interp" / "lightning_logs" / f"version_{number}"
        assert len(event_files(run)) == 1
        values = [(value.tag, event.step) for event in summaries(run) for value in event.summary.value]
        ours = [each for each in values if each[0].startswith("interp")]
        assert len(ours) == len(set(ours))
        assert [step for tag, step in ours if tag == "interp/learning_rate"] == list(range(STEPS))
        tags = {tag.split("/")[0] for tag, _ in ours}
        assert {"interp.filters", "interp.saliency", "interp.dead_filters", "interp.top_patches"} <= tags
        assert (run / "alerts.jsonl").is_file()
