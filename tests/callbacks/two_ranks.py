"""Runs a script of this folder as two processes that train together on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_two_ranks(script, folder, *, timeout=200):
    """What each rank has written into `<folder>/<rank>.json`. Processes that don't end in time are ended.

    Args:
        script: Name of a file beside this one; it is called with the folder.
        folder: Of the results.
        timeout: Seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, str(HERE / script), str(folder)]
    started = [subprocess.Popen(command, env={**os.environ, **shared, "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=timeout) for process in started] == [0, 0]
    finally:
        for process in started:  # those that have ended are not touched
            process.kill()
            process.wait()
    return tuple(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
