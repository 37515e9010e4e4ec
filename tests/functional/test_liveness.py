"""Evidence of life: against a naive loop, whatever the order, the split into forwards, and the suspect list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.functional import ops
from lightning_interp.functional.layout import Layout
from lightning_interp.functional.liveness import Liveness, _Report, fired
from lightning_interp.functional.units import End

VALUES = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf")])


def naive(channels, activation):
    """(P, C, Q) -> list of bool, one value after the other."""
    alive = []
    for values in channels.transpose(0, 1).flatten(1).tolist():
        if activation in ops.EXACT_ZERO:
            alive.append(any(value != 0 for value in values))
        else:
            alive.append(any(value != values[0] for value in values))
    return alive


@st.composite
def channels(draw, activation=None, width=None):
    """(P, C, Q); never below zero where the non-linearity never is."""
    shape = [draw(st.integers(1, 3)), width or draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    count = shape[0] * shape[1] * shape[2]
    numbers = torch.tensor(draw(st.lists(VALUES, min_size=count, max_size=count))).view(shape)
    return numbers.abs() if activation in ops.NON_NEGATIVE else numbers


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["relu", "relu6", "hardsigmoid", "hardswish", "softshrink", "gelu", "sigmoid", None]))
def test_fired_equals_a_naive_loop(data, activation):
    """Zeros of either sign, NaN and infinities among the values."""
    numbers = data.draw(channels(activation))
    assert fired(numbers, activation).tolist() == naive(numbers, activation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types(dtype):
    """The smallest number that the type can hold is life."""
    numbers = torch.zeros(1, 2, 4, dtype=dtype)
    numbers[0, 1, 3] = torch.finfo(dtype).smallest_normal
    assert fired(numbers, "relu").tolist() == [False, True]
    assert fired(numbers, None).tolist() == [False, True]


def test_strides_do_not_matter():
    """A view of a tensor with channels last."""
    numbers = torch.randn(2, 3, 4, 5).relu().to(memory_format=torch.channels_last)
    numbers[:, 1] = 0
    assert fired(numbers.flatten(2), "relu").tolist() == [True, False, True]


def end(numbers, unit="a", activation="relu"):
    size = numbers.shape[1]
    return End(unit, activation, numbers, Layout(1, 0, size, size))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(["relu", "hardswish", "gelu", None]))
def test_a_window_is_the_union_of_its_forwards_however_often_it_is_narrowed(data, activation):
    """With suspects or without, the same channels are alive as by reading everything."""
    forwards = data.draw(st.lists(channels(activation, width=4), min_size=1, max_size=6))
    liveness = Liveness()
    for numbers in forwards:
        liveness.read(end(numbers, activation=activation))
        if data.draw(st.booleans()):
            liveness.narrow()
    judged = [n for n in forwards if activation in ops.EXACT_ZERO or n.shape[0] * n.shape[2] > 1]
    expected = [any(lives) for lives in zip(*(naive(n, activation) for n in judged), strict=True)]
    if judged:
        assert liveness.alive()["a"].tolist() == expected
        assert liveness.dead()["a"].tolist() == [not lives for lives in expected]
        assert liveness.seen() == {"a"}
    else:
        assert liveness.alive() == liveness.dead() == {}
        assert liveness.seen() == set()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["relu", "hardswish", "gelu", None]))
def test_life_late_in_a_large_batch_is_found(data, activation):
    """Of large batches the first samples are read first, and channels known to be dead as one: no value is missed."""
    size = data.draw(st.integers(16, 33))
    constant = 0.0 if activation in ops.EXACT_ZERO else data.draw(st.sampled_from([0.0, -2.0, float("inf")]))
    liveness, everything = Liveness(), [False] * 3
    for _ in range(data.draw(st.integers(1, 4))):
        numbers = torch.full((size, 3, 2), constant)
        for place in data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in numbers.shape)), max_size=4)):
            value = data.draw(VALUES)
            numbers[place] = abs(value) if activation in ops.NON_NEGATIVE else value
        liveness.read(end(numbers, activation=activation))
        everything = [a or b for a, b in zip(everything, naive(numbers, activation), strict=True)]
        if data.draw(st.booleans()):
            liveness.narrow()
    assert liveness.alive()["a"].tolist() == everything


def test_two_constants_in_one_large_batch_are_life():
    """The first samples have one value and the others another, so that neither part alone tells."""
    numbers = torch.ones(16, 2, 3)
    numbers[2:, 1] = 2
    liveness = Liveness()
    liveness.read(end(numbers, activation=None))
    assert liveness.alive()["a"].tolist() == [False, True]


@pytest.mark.parametrize("activation", ["relu", "hardswish"])
@pytest.mark.parametrize("value", [-0.25, 0.25, float("nan")])
def test_one_value_among_suspects_is_found(value, activation):
    """Also below zero, where a maximum would not show it; whatever was known of the suspects before."""
    liveness = Liveness()
    first = torch.zeros(4, 6, 2)
    first[:, :3] = 1
    for step in range(5):
        numbers = first.clone()
        if step == 3:
            numbers[2, 4, 1] = abs(value) if activation == "relu" else value
        liveness.read(end(numbers, activation=activation))
        liveness.narrow()
    assert liveness.dead()["a"].tolist() == [False, False, False, True, False, True]


def test_suspects_shrink_to_nothing():
    """All are suspects until `narrow`; a layer whose filters have all fired is none."""
    liveness = Liveness()
    liveness.narrow()
    assert liveness.suspects() == set()
    silent = torch.zeros(2, 4, 3)
    silent[:, :3] = 1.0
    liveness.read(end(silent))
    liveness.read(end(torch.ones(2, 2, 3), unit="b"))
    assert liveness.suspects() == {"a", "b"}
    liveness.narrow()
    assert liveness.suspects() == {"a"}
    assert len(liveness) == 2
    liveness.read(end(torch.full((1, 4, 1), float("nan"))))
    liveness.narrow()
    assert liveness.suspects() == set()
    liveness.read(end(torch.zeros(1, 4, 1)))
    assert not liveness.dead()["a"].any()


def test_branches_with_and_without_a_non_linearity_count_together():
    """A filter is dead if all its branches are: constant in one, zero in the other."""
    liveness = Liveness()
    liveness.read(end(torch.zeros(2, 3, 2)))
    varied = torch.full((2, 3, 2), 5.0)
    varied[0, 1, 0] = 4.0
    liveness.read(end(varied, activation=None))
    assert liveness.dead()["a"].tolist() == [True, False, True]


def test_constants_are_compared_within_a_forward_only():
    """A filter may give another constant in each forward, dropout and batch statistics do that: dead all the same."""
    liveness = Liveness()
    for value in (1.0, 2.0, 3.0):
        liveness.read(end(torch.full((2, 1, 2), value), activation="gelu"))
    assert liveness.dead()["a"].tolist() == [True]


def test_evidence_from_elsewhere_is_added():
    """Before a resume or on another rank: alive stays alive, and a layer seen only there is known."""
    liveness = Liveness()
    numbers = torch.zeros(1, 3, 2)
    numbers[0, 0] = 1.0
    liveness.read(end(numbers))
    liveness.narrow()
    foreign = {"a": torch.tensor([False, True, False]), "b": torch.tensor([True, False])}
    liveness.absorb(foreign)
    assert {name: mask.tolist() for name, mask in liveness.dead().items()} == {
        "a": [False, False, True],
        "b": [False, True],
    }
    assert liveness.suspects() == {"a", "b"}
    liveness.narrow()
    last = torch.zeros(1, 3, 2)
    last[0, 2] = 1.0
    liveness.read(end(last))
    assert not liveness.dead()["a"].any()
    assert foreign["b"].tolist() == [True, False]


def test_slices_of_a_concatenation_are_told_apart():
    """Channels 1 and 2 of four belong to the unit."""
    numbers = torch.zeros(2, 4, 3)
    numbers[:, 2] = 1.0
    liveness = Liveness()
    liveness.read(End("a", "relu", numbers, Layout(1, 1, 2, 4)))
    assert liveness.dead()["a"].tolist() == [True, False]


CHANNELS = 8


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sets(st.integers(0, CHANNELS - 1)), st.booleans()), min_size=1, max_size=12))
def test_reports_that_arrive_late_lose_no_life(batches):
    """On a GPU the list of suspects arrives some batches later: one of them may have fired since."""
    liveness, arrived = Liveness(), [False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Report, "arrived", property(lambda report: arrived[0]))
        for firing, arrived[0] in batches:
            tensor = torch.zeros(2, CHANNELS, 3)
            tensor[:, list(firing)] = 1.0
            liveness.read(End("a", "relu", tensor, Layout(1, 0, CHANNELS, CHANNELS)))
            liveness.narrow()
    dead = set(liveness.dead()["a"].nonzero().flatten().tolist())
    assert dead == set(range(CHANNELS)).difference(*(firing for firing, _ in batches))
