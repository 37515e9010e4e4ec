"""On what was measured: machine, date and versions."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

PEERS = Path(__file__).with_name("peers.txt")
_OWN = ("lightning-interp", "torch", "torchvision", "pytorch-lightning", "numpy", "scikit-learn", "tensorboard")
# The tools themselves; the rest of `peers.txt` is what they need.
TOOLS = ("captum", "delve", "fastai", "mosaicml", "umap-learn", "wandb")


def describe() -> str:
    """A few lines of Markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        gpu = f"GPU: {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}."
    else:
        gpu = "No GPU here, so nothing was measured on one."
    versions = ", ".join(f"{name} {version(name)}" for name in _OWN)
    others = ", ".join(f"{name} {version(name)}" for name in TOOLS)
    return (
        f"{datetime.date.today():%Y-%m-%d}, {processor()}, {cores} cores, one thread; "
        f"Python {platform.python_version()}, {versions}. {gpu}\n\nOther tools: {others}."
    )


def processor() -> str:
    """The model of the CPU, as the system names it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def version(package: str) -> str:
    """The installed version, and the one in `peers.txt` where they differ."""
    wanted = pinned().get(package)
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
    return found if wanted in {None, found} else f"{found} (not {wanted} as in peers.txt)"


def pinned() -> dict[str, str]:
    """Package to version, from `peers.txt`."""
    lines = PEERS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name: number for name, number in pairs}
