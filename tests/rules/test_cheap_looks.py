"""A look reads little of a long run, and says the same as one that reads all. Counts, no times."""

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.rules import Alert, AlertBook, History, Point, Rule, Series, UntrainedLayerRule, default_rules
from lightning_interp.rules._curve import BLOCKS, _blocks
from lightning_interp.rules._gradients import layer_gradients
from tests.rules.writing import check, falling, run_of, write


class Counted(list):
    """Points that count how often they are read one by one."""

    reads = 0

    def __iter__(self):
        return self._counting(super().__iter__())

    def __reversed__(self):
        return self._counting(super().__reversed__())

    def _counting(self, points):
        for point in points:
            self.reads += 1
            yield point


def _long_run(layers, steps=4000, *, moving=True):
    """A healthy run, probed every fourth step, with 1000 windows of dead filters."""
    history = run_of(falling(steps, end=0.5, tau=800), planned=steps)
    probes = steps // 4
    for quantity, value in (("loss_before", 1.0), ("loss_after", 0.97), ("step_ratio", 0.8), ("gradient_norm", 1.0)):
        write(history, quantity, [value] * probes, every=4)
    write(history, "learning_rate", [0.1] * probes, every=4)
    for number in range(layers):
        layer = f"conv{number}"
        write(history, "update_norm", [0.01 if moving else 0.0] * probes, layer=layer, every=4)
        write(history, "update_ratio", [0.001] * probes, layer=layer, every=4)
        write(history, "gradient_norm", [0.1] * probes, layer=layer, every=4)
        write(history, "dead_fraction", [0.0] * probes, layer=layer, every=4)
        history.note("trainable", 1, layer=layer)
    return history


def _reads_of_a_look(history):
    """Points read of series with a layer, and of those without."""
    for series in history.series.values():
        series.points = Counted(series.points)
    book = AlertBook(default_rules())
    book.update(history)
    assert book.errors == []
    reads = [0, 0]
    for (_, layer), series in history.series.items():
        reads[layer is None] += series.points.reads
    return reads


def test_a_look_reads_only_the_ends_of_what_each_layer_has():
    """Of the 4000 points of a layer, a few dozen; five times the layers, five times that."""
    few, _ = _reads_of_a_look(_long_run(10))
    many, _ = _reads_of_a_look(_long_run(50))
    assert 0 < few <= 10 * 40
    assert many <= 5 * few


def test_a_look_reads_each_series_of_the_run_a_few_times():
    """However many rules ask for it, and whatever the number of layers."""
    history = _long_run(10)
    points = sum(len(series) for (_, layer), series in history.series.items() if layer is None)
    _, few = _reads_of_a_look(history)
    _, many = _reads_of_a_look(_long_run(50))
    assert 0 < few <= 4 * points
    assert many == few


def test_a_layer_that_stands_still_is_compared_with_one_that_moves():
    """Not with all of them: what is read grows by the points of two layers."""
    history = _long_run(20)
    write(history, "update_norm", [0.0] * 1000, layer="still", every=4)
    history.note("trainable", 1, layer="still")
    few, _ = _reads_of_a_look(_long_run(20))
    more, _ = _reads_of_a_look(history)
    assert more <= few + 4 * 1100


# ---------------------------------------------------------------------- the same is said


def _still_by_brute_force(history, rule):
    """Layer to probes, as the rule defines it: all values in dictionaries."""
    updates = {
        layer: {p.step: p.value for p in history.get("update_norm", layer) if math.isfinite(p.value)}
        for layer in history.layers("update_norm")
    }
    moving = {step for values in updates.values() for step, value in values.items() if value > 0}
    found = {}
    for layer, values in updates.items():
        probes = [values[step] for step in moving if step in values]
        if history.fact("trainable", 1.0, layer) and len(probes) >= rule.min_probes and not any(probes):
            found[layer] = len(probes)
    return found if moving else {}


norms = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, math.nan, math.inf]), max_size=12)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(norms, st.integers(0, 5), st.booleans()), max_size=4))
def test_untrained_layers_are_those_of_the_definition(layers):
    """With layers that were probed at different steps, that never moved, or that are frozen."""
    rule, history = UntrainedLayerRule(min_probes=2, min_probes_all=1000), History()
    for layer, (values, start, trainable) in layers.items():
        write(history, "update_norm", values, layer=layer, start=start)
        history.note("trainable", trainable, layer=layer)
    said = {alert.layer: alert.evidence["probes"] for alert in check(rule, history) if alert.severity == "warning"}
    assert said == _still_by_brute_force(history, rule)


@settings(max_examples=50)
@given(
    st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), min_size=1, max_size=30),
    st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), min_size=1, max_size=30),
    st.integers(0, 5),
    st.integers(1, 12),
)
def test_gradient_shares_are_those_of_the_definition(total, own, start, probes):
    """Medians over the steps that both series have among the newest probes of the whole."""
    history = write(write(History(), "gradient_norm", total), "gradient_norm", own, layer="a", start=start)
    newest = [(step, value) for step, value in enumerate(total) if math.isfinite(value)][-probes:]
    mine = {start + i: value for i, value in enumerate(own) if math.isfinite(value)}
    shares = [mine[step] / value for step, value in newest if step in mine and value > 0]
    expected = [statistics.median(shares)] if shares and statistics.median(shares) > 0 else []
    assert [layer.share for layer in layer_gradients(history, probes)] == expected


@pytest.mark.parametrize("count", [8, 63, 64, 65, 127, 128, 500, 1023])
def test_blocks_are_those_of_array_split(count):
    """Bit for bit."""
    random = np.random.default_rng(count)
    steps, losses = np.cumsum(random.random(count)), random.lognormal(size=count)
    times, values = _blocks(steps, losses)
    number = min(BLOCKS, count)
    assert times.tolist() == [float(np.mean(part)) for part in np.array_split(steps, number)]
    assert values.tolist() == [float(np.median(part)) for part in np.array_split(losses, number)]


# ---------------------------------------------------------------------- what a look keeps


def test_within_a_look_work_is_done_once_and_outside_each_time():
    """And the next look does it anew."""
    calls, history = [], History()

    def work():
        calls.append(1)
        return len(calls)

    look = history.look()
    assert [look.once("key", work), look.once("key", work), history.once("key", work)] == [1, 1, 2]
    assert history.look().once("key", work) == 3


def test_a_look_sees_what_the_history_holds():
    """The same series and facts, and the place in the run."""
    history = write(History(epoch=3, finished=True), "loss", [1.0, math.nan, 2.0])
    history.note("num_classes", 10)
    look = history.look()
    assert look == history
    assert look.finite("loss") == [Point(0, 1.0), Point(2, 2.0)]


def test_what_is_recorded_between_two_looks_is_seen_by_the_second():
    """Also by a rule of a user's, which gets the look."""

    @dataclass(frozen=True)
    class Counts(Rule):
        name: ClassVar[str] = "counts"

        def check(self, history, active):
            count = len(history.finite("loss"))
            assert count == len(history.finite("loss"))
            yield Alert(rule=self.name, severity="info", value=float(count), message="", advice="", layer=str(count))

    book, history = AlertBook([Counts()]), History()
    for step in range(3):
        history.record("loss", 1.0, step=step)
        changed = book.update(history)
        assert [alert.value for alert in changed if alert.status == "raised"] == [step + 1.0]


@given(st.lists(st.one_of(st.floats(-5, 5), st.just(math.nan), st.just(math.inf)), max_size=40), st.integers(2, 12))
def test_a_series_reads_the_same_from_both_ends(values, capacity):
    """Merged points, and those that wait."""
    series = Series(head=1, capacity=capacity)
    for step, value in enumerate(values):
        series.append(step, value)
    whole = list(zip(series.steps, series.values, strict=True))
    assert repr([tuple(point) for point in series]) == repr(whole)
    finite = [pair for pair in whole if math.isfinite(pair[1])]
    assert [tuple(point) for point in series.finite()] == finite
    assert [tuple(point) for point in series.finite(newest_first=True)] == finite[::-1]
    assert repr(series.first) == repr(Point(*whole[0]) if whole else None)
