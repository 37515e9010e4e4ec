"""All ranks stop together, also when the callback fails on one of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ddp_alerts.py")
ROOT = SCRIPT.parents[2]


def run(mode, failing):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), mode, str(failing)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "steps"), [(-1, 61), (1, 61), (0, 120)], ids=["none fails", "rank one fails", "the judge fails"]
)
def test_ranks_stop_together(failing, steps):
    result = run("stop", failing)
    ended = re.findall(r"rank (\d) ended at (\d+)", result.stdout)
    assert sorted(ended) == [("0", str(steps)), ("1", str(steps))], result.stderr[-2000:]


@pytest.mark.slow
def test_ranks_raise_together():
    result = run("raise", -1)
    assert result.returncode != 0
    assert "AlertRaised" in result.stderr
    assert "ended" not in result.stdout
