"""Processes that are told to end, or are killed, and notebooks that run a cell twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightning_interp import Interp
from tests.contract.battery import differences, fit_quietly
from tests.contract.factories import often
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import Capture, Net, loader, pl, quiet_trainer
from tests.contract.odd import LITTLE, MAKERS
from tests.reading import event_files, summaries

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "one_process.py"
TIMEOUT = 200  # seconds, for a machine that is busy
LAST = 15  # step of a whole run


def start(folder, callbacks, *more, **environment):
    """Starts a run; what it says goes to a file, since a full pipe would stop it."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), str(folder), callbacks, *map(str, more)]
    with (folder / f"said.{environment.get('LOCAL_RANK', '0')}").open("a") as said:
        return subprocess.Popen(
            command, env={**os.environ, **shared, **environment}, stdout=subprocess.PIPE, stderr=said, cwd=folder
        )


def end(process):
    """Its exit status; one that does not end in time is killed, and the test fails."""
    try:
        process.stdout.read()  # to its end
        return process.wait(timeout=TIMEOUT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run_until(process, step):
    """Waits for a step, or for the end if that comes first."""
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if line.decode().strip() == f"step {step}":
                return
    finally:
        watchdog.cancel()
    raise AssertionError(f"ended with {process.wait()} before step {step}")


def steps_on_disk(folder, tag="interp/learning_rate"):
    """Steps of a tag in all event files, in the order written."""
    return [event.step for event in summaries(folder) for value in event.summary.value if value.tag == tag]


# ---------------------------------------------------------------------- SIGTERM and kill -9


def terminated(folder, callbacks):
    process = start(folder, callbacks)
    run_until(process, 6)
    process.send_signal(signal.SIGTERM)
    return end(process)


@pytest.mark.slow
def test_sigterm_ends_the_run_as_without_us_and_what_was_measured_is_on_disk(tmp_path):
    """Lightning ends at the next batch; the exit status is what the scheduler of a cluster looks at."""
    expected = terminated(tmp_path / "none", "none")
    for name in MAKERS:
        folder = tmp_path / name
        assert terminated(folder, name) == expected, (folder / "said.0").read_text()
        steps = steps_on_disk(folder)
        assert steps == list(range(len(steps)))
        assert len(steps) >= 6
        (alerts,) = folder.rglob("alerts.jsonl")
        assert all(json.loads(line)["rule"] for line in alerts.read_text().splitlines())
        assert "failed in" not in (folder / "said.0").read_text()


@pytest.mark.slow
def test_run_that_was_killed_in_mid_epoch_goes_on_where_its_checkpoint_ends(tmp_path):
    """`kill -9` and a resume: the weights as without us, and each step on disk once a checkpoint takes it for written.

    The reference is resumed at the same step: in mid-epoch, Lightning begins the order of the data anew.
    """
    folder, reference, at = tmp_path / "killed", tmp_path / "none", 6
    process = start(folder, "Interp")
    run_until(process, at + 1)  # by then the checkpoint of the step before is whole
    process.kill()
    assert end(process) == -signal.SIGKILL
    before, checkpoint = steps_on_disk(folder), f"checkpoints/step={at}.ckpt"
    assert set(range(at)) <= set(before) | _waiting(folder / checkpoint)
    assert end(start(reference, "none")) == 0
    assert end(start(reference, "none", reference / checkpoint)) == 0
    assert end(start(folder, "Interp", folder / checkpoint)) == 0
    expected, actual = (torch.load(each / "weights.pt") for each in (reference, folder))
    assert differences(dict(expected), dict(actual)) == []
    after = steps_on_disk(folder)[len(before) :]
    assert after == sorted(set(after))
    assert set(before) | set(after) == set(range(LAST + 1))
    assert "failed in" not in (folder / "said.0").read_text()
    lines = (folder / "board" / "version_1" / "alerts.jsonl").read_text().splitlines()
    keys = [(a["rule"], a["layer"], a["status"], a["severity"], a["step"]) for a in map(json.loads, lines)]
    assert len(keys) == len(set(keys))


def _waiting(checkpoint):
    """Steps that were measured and not written when the checkpoint was: they lie in it."""
    callbacks = torch.load(checkpoint, weights_only=True)["callbacks"]
    own = next(state for key, state in callbacks.items() if key.startswith(("TrainingDynamics", "Interp")))
    backlog = own.get("TrainingDynamics", own)["backlog"]
    return {item["step"] for item in backlog}


# ---------------------------------------------------------------------- one rank of two


def pair(folder, callbacks, hook, step):
    """Starts two ranks, of which rank one kills itself; the exit status of rank zero and the last it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    shared |= {"KILL": hook, "KILL_STEP": str(step)}
    ranks = [start(folder, callbacks, **shared, LOCAL_RANK=rank) for rank in ("0", "1")]
    watchdog = threading.Timer(TIMEOUT, lambda: [process.kill() for process in ranks])
    watchdog.start()
    try:
        status = [end(process) for process in ranks]
    finally:
        watchdog.cancel()
    assert status[1] == -signal.SIGKILL
    said = [line for line in (folder / "said.0").read_text().splitlines() if line.strip()]
    error = next((line.split(":")[0] for line in reversed(said) if "Error" in line), None)
    return status[0], error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_train_epoch_end", 4), ("on_train_end", 0)],
)
def test_rank_that_loses_the_other_ends_as_without_us(hook, step, tmp_path):
    """Killed in a hook in which ours meet too: in mid-training, and at the end, where nobody but ours does."""
    expected = pair(tmp_path / "none", "none", hook, step)
    assert pair(tmp_path / "often", "often", hook, step)[0] == expected[0]


# ---------------------------------------------------------------------- a notebook


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("same", [True, False], ids=["same callbacks", "new callbacks"])
def test_cell_that_runs_twice(same, make, tmp_path, monkeypatch):
    """A new Trainer with its default logger each time; the second run has a folder and files of its own."""
    monkeypatch.chdir(tmp_path)
    callbacks, contents = make(), []
    for number in range(2):
        torch.manual_seed(0)
        model = Net()
        ours = callbacks if same or number == 0 else make()
        trainer = quiet_trainer(callbacks=ours, logger=True, max_epochs=1)
        assert fit_quietly(trainer, model, loader(**LITTLE), loader(**LITTLE, seed=1, shuffle=False)) == []
        assert_nothing_left(model, trainer.optimizers)
        folder = tmp_path / "lightning_logs" / f"version_{number}"
        contents.append({path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()})
        assert len(event_files(folder)) == 1
        assert steps_on_disk(folder) == [0, 1, 2]
        assert (folder / "alerts.jsonl").is_file()
    first = tmp_path / "lightning_logs" / "version_0"
    assert {path.name: path.stat().st_size for path in first.rglob("*") if path.is_file()} == contents[0]
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 2


def test_cell_that_was_interrupted_runs_again(tmp_path, monkeypatch):
    """The first run ends in mid-epoch, by an error of the user's; the same callbacks then train the same model."""
    monkeypatch.chdir(tmp_path)

    class Broken(Net):
        broken = True

        def training_step(self, batch, batch_idx):
            if self.broken and batch_idx == 1:
                raise ValueError("a slip in the cell")
            return super().training_step(batch, batch_idx)

    model, callbacks, capture = Broken(), [*often(), Interp(name="second", on_error="raise")], Capture()
    with pytest.raises(ValueError, match="a slip in the cell"):
        quiet_trainer(callbacks=callbacks, logger=True).fit(model, loader(**LITTLE))
    model.broken = False
    trainer = quiet_trainer(callbacks=callbacks, logger=[pl.loggers.TensorBoardLogger("."), capture], max_epochs=1)
    assert fit_quietly(trainer, model, loader(**LITTLE), loader(**LITTLE, seed=1, shuffle=False)) == []
    assert [step for step, _ in capture.of_interp()["interp/learning_rate"]] == [0, 1, 2]
    assert_nothing_left(model, trainer.optimizers)
