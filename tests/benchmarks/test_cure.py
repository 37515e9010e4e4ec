"""The cure rate: a cured run is judged strictly, by its cell, its twin and brute force, and two rounds are counted."""

import json
import math
from dataclasses import asdict, replace

import pytest

from benchmarks.diagnosis import labels, runner
from benchmarks.diagnosis.cure import CURES, Judge, cure
from benchmarks.diagnosis.remedies import factor
from benchmarks.diagnosis.replay import write_history
from benchmarks.diagnosis.spec import Spec
from lightning_interp.rules import History

LN10 = math.log(10)
SPEC = Spec("plain", "digits", "sgd", rate=0.03, epochs=4)


def record(spec, final=0.1, **values):
    """A line as a run writes it."""
    base = {
        "key": spec.key, "spec": asdict(spec), "guess": LN10, "steps": 200, "final": final, "early": [LN10, 2.0],
        "finite": True, "val_losses": [1.0, 0.5, 0.4, 0.4], "counts": [[0.0, 0.0]] * 3, "born": [0.0, 0.0], "still": [],
        "watched_labels": False, "alerts": [], "seconds": 1.0, "wrong_labels": 0.0,
    }  # fmt: skip
    return base | values


def judged(spec, before, after, finals=((0.03, 0.1), (0.003, 2.0)), longs=None):
    """What is wrong with `after`, the cured version of the run `before` of `spec`, among the runs of a cell."""
    lines = [record(replace(SPEC, rate=rate), final) for rate, final in finals if replace(SPEC, rate=rate) != spec]
    lines += [record(replace(SPEC, rate=rate, long=True), final) for rate, final in longs or finals]
    lines.append(record(spec, **before))
    runs = labels.label_all(lines)
    ill = next(each for each in runs if each.spec == spec)
    judge = Judge(lines, runs)
    return ill.faulty, judge.ills(ill, record(replace(spec, remedy="rate:2"), **after))


def test_a_rate_is_cured_where_it_reaches_what_others_of_its_cell_reach():
    """Within 0.2 of the best; the best has a loss of 0.1, a guess 2.3; a loss that is no number is no progress."""
    slow = replace(SPEC, rate=0.003)
    for final, ills in ((0.4, []), (0.7, ["progress"]), (None, ["progress"])):
        assert judged(slow, {"final": 2.0}, {"final": final}) == (True, ills)


def test_a_run_that_was_too_short_is_cured_if_it_comes_near_its_long_version():
    """As good as the others is not enough if the longer one was better still."""
    finals, longs = ((0.03, 1.0), (0.003, 2.0)), ((0.03, 0.1), (0.003, 1.5))
    for final, ills in ((0.2, []), (0.9, ["still undertrained"])):
        assert judged(SPEC, {"final": 1.0}, {"final": final}, finals, longs) == (True, ills)


@pytest.mark.parametrize(
    ("after", "ills"),
    [
        ({}, []),
        ({"counts": [[0.9, 0.0], [0.1, 0.0], [0.19, 0.0]]}, []),
        ({"counts": [[0.0, 0.0], [0.0, 0.0], [0.21, 0.3]]}, ["dead", "dormant"]),
        ({"finite": False, "final": None}, ["not finite", "progress"]),
        ({"still": ["0"]}, ["untrained layer"]),
        ({"early": [9.0]}, ["bad start"]),
        ({"val_losses": [1.0, 0.2, 0.5, 0.6]}, ["overfitting"]),
    ],
)
def test_whatever_brute_force_finds_is_no_cure(after, ills):
    """A run with dead filters, by what its cured version has."""
    assert judged(SPEC, {"final": 0.1, "counts": [[0.5, 0.0]] * 3}, after) == (True, ills)


def test_overfitting_is_cured_by_a_better_validation_loss_alone():
    """The training loss of one who stops earlier is higher, and that is right."""
    before = {"final": 0.1, "val_losses": [1.0, 0.4, 0.8, 0.9]}
    assert judged(SPEC, before, {"final": 0.9, "val_losses": [1.0, 0.4]}) == (True, [])
    assert judged(SPEC, before, {"final": 1.2, "val_losses": [1.0]}) == (True, ["validation no better"])


@pytest.mark.parametrize(
    ("fault", "before", "after", "ills"),
    [
        ("init_small", {"final": 2.0}, {"final": 0.5}, []),
        ("init_small", {"final": 2.0}, {"final": 0.7}, ["progress"]),
        ("labels_20", {"final": 1.2}, {"wrong_labels": 0.019}, []),
        ("labels_20", {"final": 1.2}, {"wrong_labels": 0.021}, ["2.1 % wrong labels"]),
        ("corrupt_batch", {"final": 0.1}, {}, ["bad batch"]),
        ("frozen_layer", {"final": 0.1, "still": ["2"]}, {"still": ["2"]}, ["untrained layer"]),
        ("few_images", {"final": 0.01, "val_losses": [2.0] * 4}, {"val_losses": [1.0, 0.5, 0.4, 0.4]}, []),
        ("few_images", {"final": 0.01, "val_losses": [2.0] * 4}, {"val_losses": [1.5] * 4}, ["overfitting"]),
    ],
)
def test_the_measure_of_an_injected_fault_is_its_twin(fault, before, after, ills):
    """And the fault itself must be gone."""
    assert judged(replace(SPEC, fault=fault), before, after) == (True, ills)


def test_what_the_twin_suffers_from_too_is_forgiven():
    """The rate kills as many without the fault."""
    spec = replace(SPEC, fault="init_small")
    lines = [record(SPEC, counts=[[0.3, 0.0]] * 3), record(replace(SPEC, long=True)), record(spec, 2.0)]
    runs = labels.label_all(lines)
    assert Judge(lines, runs).ills(runs[-1], record(spec, counts=[[0.3, 0.0]] * 3)) == []


def test_two_rounds_from_kept_runs_to_tables(tmp_path):
    """The first remedy is not enough, the second one is; what is silent is not cured; nothing is trained twice."""
    rates = {0.003: 2.0, 0.0003: 2.2, 0.03: 0.1}
    lines = [
        record(replace(SPEC, rate=rate, long=long), final) for rate, final in rates.items() for long in (False, True)
    ]
    with (tmp_path / runner.RECORDS).open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (tmp_path / runner.PLAN).write_text(json.dumps({line["key"]: Spec.from_dict(line["spec"]).cell for line in lines}))
    for line in lines:
        write_history(_history(slow=line["spec"]["rate"] == 0.003), tmp_path, line["key"])
    trained = []

    def train(spec):
        trained.append(spec.remedy)
        done = factor(spec.remedy, "rate") > 50
        return record(spec, 0.1 if done else 1.9) | {"history": _history(slow=not done)}

    tables, failed = cure(tmp_path, jobs=0, train=train)
    assert failed == 0
    assert trained == ["rate:10", "rate:100"]
    assert "| all | 2 | 1 | 0 % (0/2" in tables
    assert "| 50 % (1/2" in tables
    assert "Not cured: 1" in tables
    assert cure(tmp_path, jobs=0, train=train)[0] == tables
    assert len(runner.read_records(tmp_path, CURES)) == len(trained) == 2
    (tmp_path / CURES).unlink()
    assert "1 not trained yet" in cure(tmp_path, jobs=0, hours=0, train=train)[0]


def _history(*, slow):
    """Of a run whose rate is too low, or of one of which nothing can be said."""
    history = History(step=199, finished=True)
    history.note("num_classes", 10)
    for step in range(200):
        history.record("loss", (2.2 if slow else 2.3), step=step)
        history.record("learning_rate", 0.003, step=step)
        if slow:
            history.record("step_ratio", 0.999, step=step)
    return history.state_dict()
