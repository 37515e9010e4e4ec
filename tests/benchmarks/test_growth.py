"""The benchmark of growth fails where something grows faster than promised, and says what; by costs made up."""

import pytest

from benchmarks import growth


def run(monkeypatch, capsys, power):
    """The exit status and what was said of two callbacks whose cost grows with such a power of the size."""

    def cost(name, dimension, size):
        return 0.01 * size ** (power if (name, dimension) == ("FilterGrid", "filters") else 0.5)

    monkeypatch.setattr(growth, "cost", cost)
    monkeypatch.setattr(growth, "look_cost", lambda layers, epochs: 0.01 * layers)
    monkeypatch.setattr(growth, "fit", lambda *args, **options: None)
    monkeypatch.setattr(growth, "epoch_rows", lambda *args: ["| an epoch |"])
    monkeypatch.setattr(growth.InterpCallback, "clock", growth.InterpCallback.clock)  # `main` puts another there
    monkeypatch.setattr(growth.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["growth", "--only", "FilterGrid", "SaliencyMaps"])
    return growth.main(), capsys.readouterr()


@pytest.mark.parametrize("power", [0.0, 1.0, 1.2])
def test_linear_or_better_is_what_is_promised(power, monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, power)
    assert status == 0
    assert said.err == ""
    assert said.out.count("| FilterGrid |") == 2
    assert "| an epoch |" in said.out


@pytest.mark.parametrize("power", [1.3, 2.0])
def test_more_is_named_and_fails(power, monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, power)
    assert status == 1
    assert said.err == f"FilterGrid grows with the filters to the power of {power}, where at most 1.25 is promised\n"
    assert "| an epoch |" in said.out, "the rest is measured all the same"


def test_what_is_below_the_floor_promises_nothing():
    """Of less than 5 ms most is not growth."""
    assert growth.broken_promise("FilterGrid", "filters", {1: 1e-6, 10: 1e-4, 100: 4e-3}) is None
