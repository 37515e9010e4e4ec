"""What watching a training costs, beside what other tools cost, in one run and interleaved. Prints Markdown.

    python -m benchmarks.overhead [start] [steps] [tools] [fits]

`start`: the import, in new processes. `steps`: a training step with a watch on it, ours in each state and those of
other tools, over one without; the *direct share* is the time inside hooks and callbacks over that of a step without
them, and resolves small costs, which the ratio of a noisy machine does not. `tools`: attributions, embeddings and
projections against those of others. `fits`: whole fits with `Interp()`. Times are processor times of this process with
one thread, medians of pairs, unless a table says otherwise. Whatever is measured must have produced output.

The other tools are left out by name where they are missing. To have them all, in an environment of their own:

    pip install --no-deps -r benchmarks/overhead/peers.txt

(without dependencies, since some of them ask for an older torch than they need).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator

import torch

from benchmarks.overhead import fits, gpu_fits, machine, ours, peers, start, steps, table, tools
from benchmarks.overhead.models import runnable

SECTIONS = ("start", "steps", "tools", "fits")
MISSING, FAILED = "missing", "failed"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    made.add_argument("--models", default="", help="only networks whose name contains this")
    made.add_argument("--steps", type=int, default=60, help="most pairs of steps for each watch (default 60)")
    made.add_argument("--seconds", type=float, default=4.0, help="about how long each watch is measured (default 4)")
    made.add_argument("--rounds", type=int, default=5, help="calls of each tool (default 5)")
    made.add_argument("--starts", type=int, default=30, help="new processes of each kind (default 30)")
    made.add_argument("--fits", type=int, default=1, help="pairs of fits for each network (default 1)")
    made.add_argument("--epochs", type=int, default=10, help="epochs of a fit (default 10)")
    made.add_argument("--batches", type=int, default=100, help="training steps of an epoch (default 100)")
    made.add_argument("--gpu-epochs", type=int, default=3, help="the same on a GPU (default 3)")
    made.add_argument("--gpu-batches", type=int, default=300, help="the same on a GPU (default 300)")
    made.add_argument("--require-peers", action="store_true", help="fail where a tool to compare with is missing")
    return made


def report(options: argparse.Namespace) -> Iterator[tuple[str, set[str]]]:
    """The parts of the report, each with what went wrong in it."""
    chosen = options.sections or SECTIONS
    cases = runnable(options.models)
    yield machine.describe(), set()
    if "start" in chosen:
        yield start.text(options.starts), set()
    if "steps" in chosen:
        budget = steps.Budget(options.steps, options.seconds)
        lines = list(steps.rows(cases, [*ours.watches(), *peers.watches()], budget))
        title = "A training step: medians of pairs, with quartiles"
        yield table.markdown(title, steps.HEAD, [line for line, _ in lines]), {problem for _, problem in lines}
        yield steps.baselines(cases), set()
    if "tools" in chosen:
        lines = list(tools.rows(options.rounds))
        title = f"Tools, medians of {options.rounds} calls"
        yield table.markdown(title, tools.HEAD, [line for line, _ in lines]), {problem for _, problem in lines}
    if "fits" in chosen and options.fits:
        trained = [case for case in cases if case.device == "cpu" and case.shape[1] <= 32]
        if trained:
            yield fits.text(trained, options.fits, options.epochs, options.batches), set()
        if on_gpu := [case for case in cases if case.device != "cpu"]:
            yield gpu_fits.text(on_gpu, options.gpu_epochs, options.gpu_batches), set()


def main(arguments: list[str] | None = None) -> int:
    """Prints the report as it grows; 1 if something failed, or is missing and was required."""
    options = parser().parse_args(arguments)
    unknown = [section for section in options.sections if section not in SECTIONS]
    if unknown:
        parser().error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_interp"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    problems: set[str] = set()
    for part, found in report(options):
        print(part, end="\n\n", flush=True)
        problems |= found
    return int(FAILED in problems or (options.require_peers and MISSING in problems))


if __name__ == "__main__":
    raise SystemExit(main())
