"""The life of each filter from window to window."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.functional import lifelines
from lightning_interp.functional.lifelines import FilterEvent, Lifelines

WINDOWS = st.lists(st.frozensets(st.integers(0, 4)), min_size=1, max_size=8)


def test_a_life():
    """Born dead, died, revived, died again: each with the steps between which it happened."""
    lines = Lifelines()
    assert lines.update("a", [1], step=0, first=True) == [FilterEvent("a", 1, "born_dead", -1, 0)]
    assert lines.update("a", [1], step=9) == []
    assert lines.update("a", [2, 1], step=19) == [FilterEvent("a", 2, "died", 9, 19)]
    assert lines.update("a", [2], step=29) == [FilterEvent("a", 1, "revived", 19, 29)]
    assert lines.update("a", [1, 2], step=39) == [FilterEvent("a", 1, "died", 29, 39)]
    assert lines.dead("a") == [1, 2]
    assert lines.born_dead("a") == [1]
    assert lines.died_between("a") == {1: (29, 39), 2: (9, 19)}
    assert lines.revived("a") == [1]
    assert lines.layers == ["a"]
    assert [event.kind for event in lines.events] == ["born_dead", "died", "revived", "died"]


def test_layer_that_is_seen_late_died_some_time_before():
    """Nobody saw its birth."""
    lines = Lifelines()
    lines.update("a", [], step=0, first=True)
    assert lines.update("b", [3], step=7) == [FilterEvent("b", 3, "died", -1, 7)]
    assert lines.born_dead("b") == []


@given(WINDOWS)
def test_events_tell_the_whole_story(windows):
    """Played back, they give the dead filters of every window; each happened between two neighbours."""
    lines = Lifelines()
    steps = [10 * index for index in range(len(windows))]
    for step, dead in zip(steps, windows, strict=True):
        lines.update("a", sorted(dead), step=step, first=step == 0)
    for step, dead in zip(steps, windows, strict=True):
        alive_again = {}
        for event in lines.events:
            if event.until <= step:
                alive_again[event.filter] = event.kind == "revived"
        assert {index for index, alive in alive_again.items() if not alive} == dead
    for event in lines.events:
        assert event.after == (-1 if event.kind == "born_dead" else event.until - 10)
        assert (event.kind == "born_dead") == (event.until == 0)
    assert lines.dead("a") == sorted(windows[-1])
    assert set(lines.died_between("a")) <= windows[-1]
    assert set(lines.died_between("a")) | set(lines.born_dead("a")) >= windows[-1]


@given(WINDOWS)
def test_dead_since_birth_is_dead_in_every_window(windows):
    """By brute force; not so for what is silent in the first window by chance."""
    lines = Lifelines()
    for step, dead in enumerate(windows):
        lines.update("a", sorted(dead), step=step, first=step == 0)
        assert lines.dead_since_birth("a") == sorted(frozenset.intersection(*windows[: step + 1]))
        assert lines.saw_birth("a")


@given(WINDOWS, WINDOWS)
def test_state_goes_on_as_if_nothing_had_been(before, after):
    """Through JSON, since it is plain Python; then both go on the same way."""
    one, other = Lifelines(), Lifelines()
    for step, dead in enumerate(before):
        one.update("a", sorted(dead), step=step, first=step == 0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step, dead in enumerate(after, start=len(before)):
        assert one.update("a", sorted(dead), step=step) == other.update("a", sorted(dead), step=step)
    assert one.state_dict() == other.state_dict()
    assert one.events == other.events


def test_memory_is_bounded(monkeypatch):
    """The newest events are kept."""
    monkeypatch.setattr(lifelines, "MAX_EVENTS", 3)
    lines = Lifelines()
    for step in range(10):
        lines.update("a", [0] if step % 2 else [], step=step)
    assert [event.until for event in lines.events] == [7, 8, 9]
    assert lines.dead("a") == [0]
