"""Command line: `python -m benchmarks.diagnosis run --out DIR`, then `python -m benchmarks.diagnosis score DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.diagnosis.cells import suite
from benchmarks.diagnosis.cure import cure
from benchmarks.diagnosis.peers.compare import compare
from benchmarks.diagnosis.replay import replay
from benchmarks.diagnosis.runner import read_plan, read_records, run_all
from benchmarks.diagnosis.tables import report
from benchmarks.diagnosis.tune import tune


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagnosis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing in DIR, then print the tables")
    run.add_argument("--out", type=Path, required=True, metavar="DIR")
    run.add_argument("--reduced", action="store_true", help="a few cells: under 5 minutes on one idle core")
    run.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    run.add_argument("--hours", type=float, default=4.0, help="start no further run after so long")
    for name, text in (
        ("score", "tables in Markdown"),
        ("tune", "thresholds chosen on all architectures but one, figures from that one"),
    ):
        commands.add_parser(name, help=text).add_argument("directory", type=Path, metavar="DIR")
    anew = commands.add_parser("replay", help="the same, judged anew by the rules as they are now")
    anew.add_argument("directory", type=Path, metavar="DIR")
    anew.add_argument(
        "--dense-steps", type=int, metavar="N", help="as if the first N steps had all been probed, in place of 50"
    )
    peers = commands.add_parser("peers", help="what other tools say of a sample of the finished runs in DIR")
    peers.add_argument("directory", type=Path, metavar="DIR")
    peers.add_argument("--runs", type=int, default=200, help="how many to train anew")
    peers.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    peers.add_argument("--hours", type=float, default=4.0, help="start no further run after so long")
    cures = commands.add_parser("cure", help="train the faulty runs in DIR anew with the advice of their alerts")
    cures.add_argument("directory", type=Path, metavar="DIR")
    cures.add_argument("--runs", type=int, default=None, metavar="N", help="so many of them, chosen by their keys")
    cures.add_argument("--rounds", type=int, default=2, help="how often the advice of what is still ill is followed")
    cures.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    cures.add_argument("--hours", type=float, default=4.0, help="start no further run after so long")
    return parser


def main() -> int:
    """Runs, or scores what has been run; returns 1 if a run failed."""
    options = _parser().parse_args()
    if options.command == "run":
        failed = run_all(suite(reduced=options.reduced), options.out, jobs=options.jobs, hours=options.hours)
        print(report(read_records(options.out), read_plan(options.out)))
        return int(failed > 0)
    if options.command == "peers":
        tables, failed = compare(options.directory, count=options.runs, jobs=options.jobs, hours=options.hours)
        print(tables)
        return int(failed > 0)
    if options.command == "cure":
        tables, failed = cure(
            options.directory, rounds=options.rounds, jobs=options.jobs, hours=options.hours, count=options.runs
        )
        print(tables)
        return int(failed > 0)
    if options.command == "tune":
        print(tune(options.directory))
        return 0
    records = read_records(options.directory)
    if options.command == "replay":
        records = replay(records, options.directory, jobs=2, dense_steps=options.dense_steps)
    print(report(records, read_plan(options.directory)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
