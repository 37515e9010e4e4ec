"""The command line: `lightning-interp demo` and `lightning-interp alerts LOGDIR`.

Exit status: 0 when all is well, 1 when `alerts` finds a critical alert that is active, 2 when the command can't do its
work; then one line on standard error says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_interp._version import __version__

# torch, Lightning and rich are imported by the commands that need them: `--help` answers at once.


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: As on the command line; None takes them from there.

    Returns:
        The exit status.

    Raises:
        SystemExit: If the arguments are wrong (2), or after `--help` and `--version` (0).
    """
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        return _demo(options.out, epochs=options.epochs, seed=options.seed)
    return _alerts(options.logdir)


def _parser() -> _Parser:
    parser = _Parser(prog="lightning-interp", description="See inside a CNN while PyTorch Lightning trains it.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,alerts}")

    text = "train a small CNN four times (once well, three times not) and show the alerts of each run"
    demo = commands.add_parser("demo", help=text, description=f"{text[0].upper()}{text[1:]}.")
    demo.add_argument("--out", type=Path, default=Path("runs"), help="folder for the logs (default: %(default)s)")
    demo.add_argument("--epochs", type=_whole(1), default=30, help="epochs of the longer runs (default: %(default)s)")
    demo.add_argument("--seed", type=_whole(0), default=0, help="seed of weights and batches (default: %(default)s)")

    text = "show the alerts of all runs below a folder; exit status 1 if a critical one is active"
    alerts = commands.add_parser("alerts", help=text, description=f"{text[0].upper()}{text[1:]}.")
    alerts.add_argument("logdir", type=Path, metavar="LOGDIR", help="folder with runs, as for tensorboard --logdir")
    return parser


def _whole(low: int) -> Callable[[str], int]:
    """A converter for argparse: an integer of at least `low`."""

    def convert(text: str) -> int:
        if not text.strip().lstrip("+").isdecimal() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {low}, but got {text!r}")
        return int(text)

    return convert


def _demo(out: Path, *, epochs: int, seed: int) -> int:
    from lightning_interp.demo import DemoError, run_demo

    try:
        run_demo(out, epochs=epochs, seed=seed)
    except DemoError as error:
        return _fail("demo", str(error))
    except OSError as error:
        return _fail("demo", f"can't write to {str(out)!r}: {error.strerror or error}")
    return 0


def _alerts(folder: Path) -> int:
    from rich.console import Console

    from lightning_interp.alert_log import FILE_NAME, read_alerts
    from lightning_interp.alert_table import alert_table

    if not folder.is_dir():
        return _fail("alerts", f"{str(folder)!r} is not a folder")
    try:
        logs = read_alerts(folder)
    except OSError as error:
        return _fail("alerts", f"can't read {error.filename!r}: {error.strerror}")
    if not logs:
        return _fail("alerts", f"there is no {FILE_NAME} in or below {str(folder)!r}")
    Console().print(alert_table([([log.run], log.latest) for log in logs], columns=["run"]))
    for log in logs:
        if log.unreadable:
            print(f"{log.run}: {log.unreadable} lines of {FILE_NAME} are no alerts; left out", file=sys.stderr)
    return int(any(alert.severity == "critical" for log in logs for alert in log.active))


def _fail(command: str, message: str) -> int:
    print(f"lightning-interp {command}: {message}", file=sys.stderr)
    return 2
