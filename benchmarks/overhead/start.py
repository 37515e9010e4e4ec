"""Section `start`: what `import lightning_interp` takes beyond Python itself, each time in a new process."""

from __future__ import annotations

import resource
import subprocess
import sys

from benchmarks.overhead import goals, table
from benchmarks.overhead.timing import Pairs, take_turns
from benchmarks.overhead.watch import require

HEAD = ("new process", "Python alone", "with the import", "beyond Python", "goal")
_PLAIN = "import sys; print(sorted(sys.modules))"
_IMPORT = "import sys, lightning_interp; print(sorted(sys.modules))"


def python(code: str) -> tuple[float, str]:
    """Processor seconds of a new Python that runs the code, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def beyond(pairs: Pairs) -> float:
    """Median over the pairs of what the import takes, in seconds."""
    return Pairs([1.0] * len(pairs.plain), [b - a for a, b in zip(pairs.plain, pairs.other, strict=True)]).ratio


def measure(rounds: int) -> Pairs:
    """Seconds without the import and with it.

    Raises:
        NothingMeasuredError: If the package was not imported, or was there without being imported.
    """
    require("'lightning_interp'" in python(_IMPORT)[1], "the import")
    require("'lightning_interp'" not in python(_PLAIN)[1], "the Python without the import, which has the package too,")
    return take_turns(lambda: python(_PLAIN)[0], lambda: python(_IMPORT)[0], most=rounds)


def text(rounds: int) -> str:
    """The whole section."""
    pairs = measure(rounds)
    taken = beyond(pairs)
    line = ["`import lightning_interp`", table.duration(pairs.median_plain), table.duration(pairs.median_other),
            table.duration(max(0.0, taken)), goals.IMPORT.verdict(taken)]  # fmt: skip
    return table.markdown(f"Import, processor time, median of {rounds}", HEAD, [line])
