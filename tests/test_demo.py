"""`lightning-interp demo`: what it promises to a newcomer."""

import json
import logging
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_interp.cli import main
from lightning_interp.demo import MARKER, RUNS, DigitsNet, load_digits, mislabeled, prepare, run_demo

NAMES = [run.name for run in RUNS]


def alerts_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]


def rules_of(run: Path, *severities: str) -> set[str]:
    return {alert["rule"] for alert in alerts_of(run) if alert["severity"] in severities}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_digits_are_split_alike_whatever_the_generator():
    """1,400 and 397 images of zero mean and unit variance, all ten classes in both."""
    train, validation = load_digits()
    torch.rand(3)
    again, _ = load_digits()
    images, labels = train.tensors
    assert images.shape == (1400, 1, 8, 8)
    assert len(validation) == 397
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    assert labels.unique().tolist() == validation.tensors[1].unique().tolist() == list(range(10))
    assert torch.equal(images, again.tensors[0])


def test_network_scores_ten_classes():
    """(N, 1, 8, 8) -> (N, 10)."""
    assert DigitsNet(0.1)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_epochs_of_the_short_run_are_a_fifteenth_but_at_least_one():
    """`--epochs 1` still trains all of them."""
    assert [run.epochs(30) for run in RUNS] == [30, 30, 2, 30]
    assert [run.epochs(1) for run in RUNS] == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo of one epoch, in a process of its own, in a terminal of 80 columns."""
    folder = tmp_path_factory.mktemp("demo")
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "lightning_interp", "demo", "--epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "80"}
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_demo_is_quiet_and_exits_with_0(short):
    """Nothing but the table and the line that comes next; a warning of the package's own would show."""
    _, done = short
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("tensorboard --logdir runs")
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert all(name in done.stdout for name in (*NAMES, "accuracy", "alerts"))


def test_demo_writes_one_folder_a_run(short):
    """Events and alerts.jsonl in each, and nothing else beside them."""
    folder, _ = short
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert (folder / "runs" / name / "alerts.jsonl").is_file()
        assert len(list((folder / "runs" / name).glob("events.out.tfevents.*"))) == 1


def test_demo_replaces_its_own_runs_only(short):
    """What another demo wrote goes; all else in the folder stays."""
    folder, _ = short
    out = folder / "runs"
    (out / "mine").mkdir()
    (out / "mine" / "alerts.jsonl").write_text("mine")
    prepare(out)
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "mine"])
    assert (out / "mine" / "alerts.jsonl").read_text() == "mine"
    assert [path.name for path in (out / "healthy").iterdir()] == [MARKER]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("marked", [False, True])
def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path, capsys, name, marked):
    """A file of the user's stops the demo before anything is removed, also in a folder that the demo made."""
    for run in NAMES:
        (tmp_path / run).mkdir()
        (tmp_path / run / MARKER).touch()
        (tmp_path / run / "hparams.yaml").write_text("{}")
    (tmp_path / name / "thesis.txt").write_text("three years of work")
    if not marked:
        (tmp_path / name / MARKER).unlink()
    before = tree(tmp_path)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert before == tree(tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / name) in error
    assert "--out" in error


@pytest.mark.parametrize("kind", ["file", "link"])
def test_demo_refuses_what_is_no_folder(tmp_path, kind):
    """A file or a link of that name stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARKER).touch()
    out = tmp_path / "runs"
    out.mkdir()
    if kind == "file":
        (out / "healthy").touch()
    else:
        (out / "healthy").symlink_to(tmp_path / "elsewhere")
    assert main(["demo", "--out", str(out)]) == 2
    assert (out / "healthy").exists()
    assert (tmp_path / "elsewhere" / MARKER).exists()


def test_unwritable_folder_is_one_line_and_exit_2(tmp_path, capsys):
    """A path below a file can't be made, not even by root."""
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "runs"
    assert main(["demo", "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"lightning-interp demo: can't write to {str(out)!r}: Not a directory\n"


def test_demo_leaves_the_process_as_it_was(tmp_path, capsys):
    """Generators, log levels and warning filters are the caller's."""

    def state():
        generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        return generators, logging.root.manager.disable, list(warnings.filters), torch.get_num_threads()

    before = state()
    run_demo(tmp_path, epochs=1)
    capsys.readouterr()
    assert before == state()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_names_each_run_for_what_it_is(tmp_path, capsys, seed):
    """No warning for the healthy run; the others by their rule; the table says what alerts.jsonl says."""
    healthy, too_high, too_short, mislabeled = run_demo(tmp_path, seed=seed)
    printed = capsys.readouterr().out
    assert rules_of(tmp_path / "healthy", "warning", "critical") == set()
    assert "learning_rate_too_high" in rules_of(tmp_path / "learning-rate-too-high", "warning", "critical")
    assert "undertrained" in rules_of(tmp_path / "stopped-too-soon", "warning", "critical")
    assert "undertrained" not in rules_of(tmp_path / "learning-rate-too-high", "warning", "critical")
    assert "learning_rate_too_high" not in rules_of(tmp_path / "stopped-too-soon", "info", "warning", "critical")
    assert rules_of(tmp_path / "wrong-labels", "warning", "critical") == {"suspect_labels"}
    assert not any("suspect_labels" in rules_of(tmp_path / name, "warning") for name in NAMES[:3])
    assert healthy.accuracy > 0.9
    assert too_high.accuracy < 0.5
    assert too_short.accuracy < healthy.accuracy
    for outcome in (healthy, too_high, too_short, mislabeled):
        assert f"{outcome.accuracy:.1%}" in printed
        assert {alert.rule for alert in outcome.alerts} == {a["rule"] for a in alerts_of(tmp_path / outcome.name)}
        for alert in outcome.alerts:
            assert alert.rule in printed
            assert alert.advice
            assert alert.evidence


def test_wrong_labels_are_those_of_a_tenth_of_the_images():
    """Each of them another one than before; the images are the same."""
    train, _ = load_digits()
    wrong = mislabeled(train, 0.1)
    assert torch.equal(wrong.tensors[0], train.tensors[0])
    assert int((wrong.tensors[1] != train.tensors[1]).sum()) == 140
    assert torch.equal(mislabeled(train, 0.0).tensors[1], train.tensors[1])
    assert torch.equal(mislabeled(train, 0.1).tensors[1], wrong.tensors[1])


@pytest.mark.slow
def test_demo_with_the_same_seed_gives_the_same_alerts(tmp_path, capsys):
    """Twice the same run, to the last digit; another seed differs."""
    first = run_demo(tmp_path / "a", epochs=3, seed=5)
    second = run_demo(tmp_path / "b", epochs=3, seed=5)
    other = run_demo(tmp_path / "c", epochs=3, seed=6)
    capsys.readouterr()
    for name in NAMES:
        assert (tmp_path / "a" / name / "alerts.jsonl").read_bytes() == (
            tmp_path / "b" / name / "alerts.jsonl"
        ).read_bytes()
    assert [run.accuracy for run in first] == [run.accuracy for run in second]
    assert [run.accuracy for run in first] != [run.accuracy for run in other]
