import json
import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import Alert, AlertBook, History, Rule, default_rules
from tests.rules.writing import healthy, write


@dataclass(frozen=True)
class Script(Rule):
    """Says at each check what its script says: (layer, severity) pairs."""

    name: ClassVar[str] = "script"
    needs: ClassVar[tuple[str, ...]] = ()
    lines: list = field(default_factory=list)
    seen: list = field(default_factory=list)

    def check(self, history, active):
        self.seen.append(dict(active))
        for layer, severity in self.lines[len(self.seen) - 1]:
            yield Alert(rule="whatever", severity=severity, layer=layer, value=1.0)


@dataclass(frozen=True)
class Broken(Rule):
    name: ClassVar[str] = "broken"
    needs: ClassVar[tuple[str, ...]] = ()
    result: object = None

    def check(self, history, active):
        if self.result is None:
            raise KeyError("oops")
        return self.result


def play(book, checks, *, step=0):
    """What each of so many checks changes, as (status, layer, severity)."""
    history, told = History(step=step, epoch=3), []
    for _ in range(checks):
        history.step += 10
        told.append([(alert.status, alert.layer, alert.severity) for alert in book.update(history)])
    return told


UP, DOWN = ("raised", "a", "warning"), ("cleared", "a", "warning")
W = [("a", "warning")]


def test_raised_once_and_cleared_once():
    book = AlertBook([Script([[], W, W, W, [], [], W])])
    assert play(book, 7) == [[], [UP], [], [], [DOWN], [], [UP]]
    assert [(alert.rule, alert.step, alert.epoch) for alert in book.history] == [
        ("script", 20, 3),
        ("script", 50, 3),
        ("script", 70, 3),
    ]


def test_patience_holds_for_raising_and_clearing():
    book = AlertBook([Script([W, W, [], W, W, W, [], [], W, [], [], []])], patience=3)
    assert play(book, 12) == [[], [], [], [], [], [UP], [], [], [], [], [], [DOWN]]


def test_the_patience_of_a_rule_counts_too():
    @dataclass(frozen=True)
    class Patient(Script):
        patience: ClassVar[int] = 2

    assert play(AlertBook([Patient([W, W])]), 2) == [[], [UP]]


def test_at_the_end_there_is_no_time_for_patience():
    book = AlertBook([Script([W])], patience=5)
    assert [alert.status for alert in book.update(History(finished=True))] == ["raised"]


def test_a_change_of_severity_is_told_once():
    info, critical = [("a", "info")], [("a", "critical")]
    book = AlertBook([Script([info, W, W, critical, critical, info, []])])
    assert play(book, 7) == [
        [("raised", "a", "info")],
        [UP],
        [],
        [("raised", "a", "critical")],
        [],
        [("raised", "a", "info")],
        [("cleared", "a", "info")],
    ]


def test_rules_see_the_severities_of_the_active_alerts():
    script = Script([W, W])
    play(AlertBook([script]), 2)
    assert script.seen == [{}, {("script", "a"): "warning"}]


def test_of_two_findings_for_one_layer_the_graver_counts():
    assert play(AlertBook([Script([[("a", "info"), ("a", "warning"), ("a", "info")]])]), 1) == [[UP]]


def test_a_broken_rule_stops_nobody_and_its_alerts_stay():
    book = AlertBook([Broken(), Script([W, W])])
    assert play(book, 2) == [[UP], []]
    assert [(rule.name, type(error)) for rule, error in book.errors] == [("broken", KeyError)]


@pytest.mark.parametrize("result", [["text"], 5, [Alert(rule="x", severity="fatal")]])
def test_a_rule_that_returns_nonsense_is_reported(result):
    book = AlertBook([Broken(result)])
    assert book.update(History()) == []
    assert isinstance(book.errors[0][1], TypeError)


def test_mute_by_rule_and_by_layer():
    lines = [[("conv1", "info"), ("conv2", "info"), (None, "info")]]
    told = {mute: play(AlertBook([Script(lines)], mute=[mute]), 1)[0] for mute in ("script", "script:conv*", "script:")}
    assert told["script"] == []
    assert [layer for _, layer, _ in told["script:conv*"]] == [None]
    assert told["script:"] == []


def test_a_misspelt_mute_is_refused_with_a_suggestion():
    with pytest.raises(ArgumentError, match="Did you mean 'dead_filters'"):
        AlertBook(default_rules(), mute=["dead_filter:conv1"])


@pytest.mark.parametrize("rules", ["dead_filters", 3, [1], [Script(), Script()]])
def test_wrong_rules_are_refused(rules):
    with pytest.raises(ArgumentError, match="`rules`"):
        AlertBook(rules)


def test_a_rule_that_was_not_called_is_refused_with_what_to_do():
    with pytest.raises(ArgumentError, match=r"Call Script\(\)\.$"):
        AlertBook([Script])


def test_wrong_patience_is_refused():
    with pytest.raises(ArgumentError, match="`patience`"):
        AlertBook([], patience=0)


@given(cut=st.integers(0, 6), patience=st.integers(1, 3))
def test_a_restored_book_goes_on_as_if_nothing_had_happened(cut, patience):
    lines = [W, W, W, [], [], [], W]
    whole = AlertBook([Script(lines)], patience=patience)
    expected = play(whole, 7)
    first = AlertBook([Script(lines)], patience=patience)
    told = play(first, cut)
    second = AlertBook([Script(lines[cut:])], patience=patience)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert told + play(second, 7 - cut, step=10 * cut) == expected
    assert second.history == whole.history or any(math.isnan(alert.threshold) for alert in whole.history)
    assert [alert.to_json() for alert in second.history] == [alert.to_json() for alert in whole.history]


def test_alerts_of_rules_that_are_gone_are_not_active_after_a_load():
    book = AlertBook([Script([W])])
    play(book, 1)
    other = AlertBook([])
    other.load_state_dict(book.state_dict())
    assert (other.active, len(other.history)) == ([], 1)


def test_the_history_is_bounded():
    book = AlertBook([Script([W if i % 2 else [] for i in range(3001)])])
    play(book, 3001)
    assert len(book.history) == 1000


@given(
    value=st.floats(),
    evidence=st.dictionaries(st.text(), st.floats()),
    message=st.text(),
    layer=st.none() | st.text(),
)
def test_an_alert_survives_json(value, evidence, message, layer):
    alert = Alert(rule="r", severity="info", value=value, evidence=evidence, message=message, layer=layer)
    line = alert.to_json()
    assert "\n" not in line
    again = Alert.from_dict(json.loads(line, parse_constant=pytest.fail))
    assert again.to_json() == line
    assert again.key == alert.key


def test_all_rules_are_silent_on_a_healthy_run_at_each_step_of_it():
    whole, book = healthy(), AlertBook(default_rules())
    for end in (20, 60, 100, 300, 600):
        history = History(facts=dict(whole.facts))
        for (quantity, layer), series in whole.series.items():
            values = [value for step, value in zip(series.steps, series.values, strict=True) if step < end]
            steps = [step for step in series.steps if step < end]
            for step, value in zip(steps, values, strict=True):
                history.record(quantity, value, step=step, layer=layer)
        history.finished = end == 600
        assert book.update(history) == []
    assert (book.errors, book.active) == ([], [])


def test_all_rules_survive_histories_full_of_nan():
    history = History(finished=True)
    quantities = {quantity for rule in default_rules() for quantity in rule.needs}
    for quantity in sorted(quantities):
        for layer in (None, "conv1"):
            write(history, quantity, [math.nan, math.inf, -math.inf, math.nan] * 20, layer=layer)
            history.note(quantity, math.nan, layer=layer)
    book = AlertBook(default_rules())
    book.update(history)
    assert book.errors == []
