import pytest

from lightning_interp.errors import ArgumentError
from lightning_interp.rules import DeadFiltersRule, DormantUnitsRule, History
from tests.rules.writing import check, falling, healthy, run_of, write

KINDS = [(DeadFiltersRule, "dead_fraction", "dead_filters"), (DormantUnitsRule, "dormant_fraction", "dormant_units")]


def shares(quantity, values, *, layer="conv1", jump=False):
    history = run_of(falling(200, end=0.5))
    if jump:
        write(history, "loss_before", [2.3] * 5)
        write(history, "loss_after", [20.0] * 5)
    history.note("num_filters", 16, layer=layer)
    return write(history, quantity, values, layer=layer, every=50)


@pytest.mark.parametrize(("rule", "quantity", "name"), KINDS)
class TestBoth:
    def test_healthy_and_empty_runs_are_silent(self, rule, quantity, name):
        assert check(rule(), healthy()) == []
        assert check(rule(), History()) == []

    @pytest.mark.parametrize(
        ("share", "severity"),
        [(0.05, "info"), (0.249, "info"), (0.25, "warning"), (0.5, "critical"), (1.0, "critical")],
    )
    def test_severity_follows_the_share(self, rule, quantity, name, share, severity):
        (alert,) = check(rule(), shares(quantity, [0.0, share, share]))
        assert (alert.rule, alert.layer, alert.severity, alert.value) == (name, "conv1", severity, share)

    def test_one_window_is_not_enough(self, rule, quantity, name):
        assert check(rule(), shares(quantity, [0.8])) == []
        assert check(rule(), shares(quantity, [0.0, 0.8])) == []
        assert check(rule(), shares(quantity, [0.0, 0.8, 0.0])) == []

    def test_dead_at_the_start_is_blamed_on_the_initialisation(self, rule, quantity, name):
        (alert,) = check(rule(), shares(quantity, [0.5, 0.5, 0.5], jump=True))
        assert alert.cause == "initialisation"
        assert "learning rate" in alert.alternatives

    def test_inputs_that_are_off_come_first(self, rule, quantity, name):
        history = shares(quantity, [0.5, 0.5, 0.5])
        history.note("input_mean", 100.0)
        history.note("input_std", 50.0)
        (alert,) = check(rule(), history)
        assert (alert.cause, alert.alternatives[-1]) == ("inputs", "initialisation")

    def test_killed_after_a_jump_is_blamed_on_the_rate(self, rule, quantity, name):
        (alert,) = check(rule(), shares(quantity, [0.1, 0.5, 0.5], jump=True))
        assert alert.cause == "learning rate"

    def test_killed_without_a_jump_is_unknown(self, rule, quantity, name):
        (alert,) = check(rule(), shares(quantity, [0.1, 0.5, 0.5]))
        assert alert.cause is None
        assert alert.alternatives[0] == "learning rate"

    def test_inputs_that_are_off_but_small_are_not_blamed(self, rule, quantity, name):
        """The root mean square of these is 0.85, that of normalised ones 1."""
        history = shares(quantity, [0.5, 0.5, 0.5])
        history.note("input_mean", -0.388)
        history.note("input_std", 0.753)
        (alert,) = check(rule(), history)
        assert alert.cause == "initialisation"

    def test_an_alert_is_held_by_the_relaxed_thresholds_up_to_its_severity(self, rule, quantity, name):
        history = shares(quantity, [0.0, 0.22, 0.22])
        assert check(rule(), history)[0].severity == "info"
        assert check(rule(), history, {(name, "conv1"): "warning"})[0].severity == "warning"
        assert check(rule(), history, {(name, "conv1"): "info"})[0].severity == "info"
        low = shares(quantity, [0.0, 0.045, 0.045])
        assert check(rule(), low) == []
        assert check(rule(), low, [(name, "conv1")])[0].severity == "info"

    def test_layers_are_judged_one_by_one(self, rule, quantity, name):
        history = shares(quantity, [0.0, 0.6, 0.6])
        write(history, quantity, [0.0, 0.3, 0.3], layer="conv2", every=50)
        write(history, quantity, [0.0, 0.0, 0.0], layer="conv3", every=50)
        assert [(alert.layer, alert.severity) for alert in check(rule(), history)] == [
            ("conv1", "critical"),
            ("conv2", "warning"),
        ]

    def test_wrong_thresholds_are_refused(self, rule, quantity, name):
        with pytest.raises(ArgumentError, match="`info` <= `warning`"):
            rule(info=0.5, warning=0.2)
        with pytest.raises(ArgumentError, match="`critical`"):
            rule(critical=50)


def test_the_message_has_the_numbers_and_the_step():
    (alert,) = check(DeadFiltersRule(), shares("dead_fraction", [0.0, 0.0, 0.5, 0.5]))
    assert alert.message == (
        "8 of 16 filters (50 %) of conv1 are dead, 5 % or more since step 100 or earlier; 0 % since before the first "
        "update."
    )
    assert alert.evidence == {"dead_fraction": 0.5, "since_step": 100.0, "born_dead_fraction": 0.0}


def test_the_message_does_not_say_from_the_start_of_what_came_later():
    """A quarter was dead in the first window, and half is now; the other quarter died in between."""
    history = shares("dead_fraction", [0.25, 0.5, 0.5])
    write(history, "born_dead_fraction", [0.25, 0.125, 0.125], layer="conv1", every=50)
    (alert,) = check(DeadFiltersRule(), history)
    assert alert.message == "8 of 16 filters (50 %) of conv1 are dead; 12 % since before the first update."


@pytest.mark.parametrize(("since_birth", "cause"), [(0.25, "initialisation"), (0.2, None)])
def test_what_is_silent_in_the_first_batch_and_fires_later_is_not_born_dead(since_birth, cause):
    """Half of the dead or more must have been dead in every window."""
    history = shares("dead_fraction", [0.5, 0.5, 0.5])
    write(history, "born_dead_fraction", [0.5, since_birth, since_birth], layer="conv1", every=50)
    (alert,) = check(DeadFiltersRule(), history)
    assert alert.cause == cause
    assert alert.evidence["born_dead_fraction"] == since_birth


def test_without_a_window_before_the_first_update_nothing_is_said_of_birth():
    history = write(run_of(falling(400)), "dead_fraction", [0.5, 0.5], layer="conv1", start=200, every=50)
    (alert,) = check(DeadFiltersRule(), history)
    assert "before the first update" not in alert.message
    assert alert.cause is None


def test_pruned_filters_are_not_told_off():
    """Half of them are dead on purpose; of the rest a third died."""
    history = write(History(), "dead_fraction", [0.5, 0.65, 0.65], layer="conv1", every=100)
    history.note("num_filters", 20, layer="conv1")
    assert check(DeadFiltersRule(), history)[0].severity == "critical"
    history.note("pruned_dead", 10, layer="conv1")
    (alert,) = check(DeadFiltersRule(), history)
    assert (alert.severity, alert.value) == ("warning", pytest.approx(0.3))
    assert alert.message.startswith("3 of 10 filters (30 %) of conv1")
    assert alert.evidence["born_dead_fraction"] == 0
    write(history, "born_dead_fraction", [0.1, 0.1], layer="conv1", every=100)
    assert check(DeadFiltersRule(), history)[0].evidence["born_dead_fraction"] == pytest.approx(0.2)
    history.note("pruned_dead", 20, layer="conv1")
    assert check(DeadFiltersRule(), history) == []


def test_at_the_end_one_window_is_enough():
    """No second one will come."""
    history = write(History(), "dead_fraction", [0.0, 0.6], layer="conv1", every=100)
    assert check(DeadFiltersRule(), history) == []
    history.finished = True
    assert check(DeadFiltersRule(), history)[0].severity == "critical"


def test_after_a_bad_start_that_is_to_blame_and_not_the_rate():
    """The loss leapt because it began far too high."""

    def died(first):
        history = run_of([first, 4 * first, 9.0, 2.3])
        return write(history, "dead_fraction", [0.0, 0.6, 0.6], layer="conv1")

    assert check(DeadFiltersRule(), died(2.3))[0].cause == "learning rate"
    history = died(40.0)
    assert check(DeadFiltersRule(), history)[0].cause == "initialisation"
    history.note("input_mean", 120.0)
    (alert,) = check(DeadFiltersRule(), history)
    assert (alert.cause, "subtract 120" in alert.advice) == ("inputs", True)
    assert "learning rate" not in alert.alternatives


def test_a_loss_that_wavers_about_a_tenth_does_not_change_the_severity_again_and_again():
    """0.11 of ln 10 holds what 0.09 has made a warning."""
    history = run_of(falling(400, end=0.11 * 2.303, tau=20.0))
    write(history, "dead_fraction", [0.0, 0.53, 0.53], layer="fc", every=50)
    assert check(DeadFiltersRule(), history)[0].severity == "critical"
    assert check(DeadFiltersRule(), history, {("dead_filters", "fc"): "warning"})[0].severity == "warning"


@pytest.mark.parametrize(
    ("end", "share", "jump", "severity"),
    [(0.2, 0.53, False, "warning"), (0.5, 0.53, False, "critical"), (0.2, 1.0, False, "critical"),
     (0.2, 0.53, True, "critical")],
    ids=["does without", "high loss", "whole layer", "known cause"],
)  # fmt: skip
def test_a_network_that_has_learned_without_them_is_not_told_to_start_anew(end, share, jump, severity):
    """Of 64 filters 34 were dead, and each remedy tried made the network worse."""
    history = run_of(falling(400, end=end, tau=20.0))
    if jump:
        write(history, "loss_before", [2.3] * 5)
        write(history, "loss_after", [20.0] * 5)
    write(history, "dead_fraction", [0.0, share, share], layer="fc", every=50)
    (alert,) = check(DeadFiltersRule(), history)
    assert alert.severity == severity
    assert ("narrower" in alert.advice) is (severity == "warning")
    assert alert.threshold == (0.25 if severity == "warning" else 0.5)
