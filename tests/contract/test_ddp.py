"""Two processes on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reading import event_files, summaries

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "two_processes.py"
TIMEOUT = 120

UNIONS = {
    "train_union": [[1, 2], [0, 2]],
    "val_union": [[1, 2], [0, 2]],
    "fewer_batches_on_rank_1": [[1, 2], [0, 2]],
    "fewer_batches_on_rank_0": [[1, 2], [0, 2]],
}
FAILURES = [
    f"fails_{hook}_{rank}"
    for hook in (
        "setup",
        "on_train_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
    )
    for rank in (0, 1)
] + [f"sparsity_fails_{hook}_{rank}" for hook in ("on_train_batch_start", "on_train_epoch_end") for rank in (0, 1)]
FAMILIES = [
    f"{family}_{hook}"
    for family in ("alerts", "interp")
    for hook in ("on_train_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end")
]


def run_together(folder, names, *, by_lightning=False):
    """Starts the script in two processes, by hand or by Lightning's own launcher; scenario to the results by rank."""
    waiting = list(names)
    while waiting:
        _start(folder, waiting, by_lightning=by_lightning)
        done = [name for name in waiting if any((folder / f"{name}.{rank}.json").exists() for rank in (0, 1))]
        waiting = [name for name in waiting if name not in (done or waiting)]
    return {name: [_read(folder, name, rank) for rank in (0, 1)] for name in names}


def _read(folder, name, rank):
    path = folder / f"{name}.{rank}.json"
    if path.exists():
        return json.loads(path.read_text())
    return {"error": "\n".join(log.read_text()[-2000:] for log in folder.glob("log.*"))}


def _start(folder, names, *, by_lightning):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), str(folder), *names]
    if not by_lightning:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [None] if by_lightning else [0, 1]
    started = []
    for rank in ranks:
        own = environment if rank is None else {**environment, "LOCAL_RANK": str(rank)}
        log = (folder / f"log.{rank}").open("w")
        started.append((subprocess.Popen(command, env=own, cwd=folder, stdout=log, stderr=subprocess.STDOUT), log))
    try:
        for process, _ in started:
            process.wait(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pass  # what is missing is reported
    finally:
        for process, log in started:
            process.kill()
            process.wait()
            log.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All scenarios in which nothing fails."""
    folder = tmp_path_factory.mktemp("ddp")
    return folder, run_together(
        folder, [*UNIONS, "sparsity", "pictures", "harmless_often", "harmless_Interp", "stops", "dry"]
    )


@pytest.fixture(scope="module")
def undrawable(tmp_path_factory):
    """`TopPatches` fails on rank zero, after the ranks have met."""
    return run_together(tmp_path_factory.mktemp("undrawable"), ["patches_fail"])


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """All scenarios in which `DeadFilters` fails on one rank."""
    return run_together(tmp_path_factory.mktemp("failures"), FAILURES)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """All scenarios in which a callback that holds others fails on one rank."""
    return run_together(tmp_path_factory.mktemp("families"), FAMILIES)


@pytest.mark.parametrize("name", UNIONS)
def test_dead_filters_equal_the_brute_force_union_over_ranks(name, measured):
    """A filter that fires in one pixel on one rank only is alive; both ranks know the same."""
    for result in measured[1][name]:
        assert "error" not in result, result["error"]
        assert result["said"] == []
        assert result["alone"] == UNIONS[name]
        assert result["dead"] == result["union"] == [2]


def test_sparsity_is_the_mean_over_ranks_and_the_same_on_all(measured):
    """Otherwise a monitor would decide differently on each."""
    for result in measured[1]["sparsity"]:
        assert "error" not in result, result["error"]
        first, second = result["zeros"]
        assert first != second
        assert result["metric"] == pytest.approx((first + second) / 2, abs=1e-6)


def test_pictures_and_alerts_are_written_once(measured):
    """By rank zero, into one event file."""
    folder, results = measured
    for result in results["pictures"]:
        assert "error" not in result, result["error"]
        assert len(set(result["directory"])) == 1
        assert result["modes"] == [0, 0]
        assert result["hooks"] == 1
    assert len(event_files(folder / "board")) == 1
    seen = [(value.tag, event.step) for event in summaries(folder / "board") for value in event.summary.value]
    assert any(tag.startswith("interp.filters/") for tag, _ in seen)
    ours = [item for item in seen if item[0].startswith("interp")]
    assert len(ours) == len(set(ours))
    lines = [line for path in folder.glob("board/**/alerts.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("name", ["harmless_often", "harmless_Interp"])
def test_callbacks_leave_both_processes_bit_identical(name, measured):
    """Weights, generators, diary and the user's metrics on each rank."""
    for result in measured[1][name]:
        assert "error" not in result, result["error"]
        assert result["differences"] == []
        assert result["said"] == []


def test_alert_stops_all_processes_after_the_same_batch(measured):
    """Rank zero judges, all act."""
    counts = [result.get("train") for result in measured[1]["stops"]]
    assert None not in counts, measured[1]["stops"]
    assert counts[0] == counts[1] < 60


def test_rank_without_data_takes_part(measured):
    """It knows what the others have seen, and nobody waits for it."""
    for result in measured[1]["dry"]:
        assert "error" not in result, result["error"]
        assert result["alone"] == [True, False]
        assert result["dead"] == [1, 2]
        assert result["train"] == 6
    # What each limit is, once: no indices to gather patches by, and training images of one class on rank zero.
    speakers = [[message.split()[0] for message in result["said"]] for result in measured[1]["dry"]]
    assert speakers == [["TopPatches", "Influence"], ["TopPatches"]]


def test_failure_to_draw_on_rank_zero_hangs_nobody(undrawable):
    """The other rank has nothing to wait for in that hook; the next time that they meet it is told, and rests too."""
    results = undrawable["patches_fail"]
    for result in results:
        assert "error" not in result, result["error"]
        assert result["train"] == result["train_without"] == 4
        assert result["hooks"] == 0
        assert len(result["said"]) == 1
    assert "in _show on rank 0" in results[0]["said"][0]
    assert "another rank failed" in results[1]["said"][0]


@pytest.mark.parametrize("name", FAILURES)
def test_failure_on_one_rank_hangs_nobody(name, failed):
    """The callback rests on all ranks that would wait for it; training goes on to the end."""
    bad_rank = int(name[-1])
    for rank, result in enumerate(failed[name]):
        assert "error" not in result, result["error"]
        assert result["train"] == 6
        assert result["hooks"] == 0
        assert result["modes"] == [0, 0]
        assert len(result["said"]) <= 1
        if rank == bad_rank:
            assert "on rank" in result["said"][0]


@pytest.mark.parametrize("name", FAMILIES)
def test_failure_of_a_family_on_one_rank_hangs_nobody(name, families):
    """`Alerts` fails on rank zero, where it judges; `Interp` on rank one."""
    for result in families[name]:
        assert "error" not in result, result["error"]
        assert result["train"] == 6
        assert result["hooks"] == 0
        assert result["modes"] == [0, 0]


def test_processes_started_by_lightning_agree_too(tmp_path):
    """`strategy="ddp"` starts the second process itself."""
    for result in run_together(tmp_path, ["train_union"], by_lightning=True)["train_union"]:
        assert "error" not in result, result["error"]
        assert result["dead"] == [2]
