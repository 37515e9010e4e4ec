"""The command line: what it prints, and its exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_interp import __version__
from lightning_interp.alert_log import AlertLog, read_alerts
from lightning_interp.cli import main
from lightning_interp.rules.alert import Alert

DEAD = Alert(
    rule="dead_filters",
    severity="critical",
    layer="features.conv3",
    epoch=1,
    step=40,
    value=0.75,
    threshold=0.5,
    cause="learning rate",
    message="24 of 32 filters are dead.",
    advice="Divide the learning rate by ten.",
    evidence={"dead_filters": 24.0},
)
NOISY = Alert(rule="noisy_filters", severity="info", layer="features.conv1", step=60, message="The filters are noise.")


def cleared(alert: Alert) -> Alert:
    return Alert.from_dict({**vars(alert), "status": "cleared", "step": alert.step + 10})


def write(folder: Path, *alerts: Alert) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alerts.jsonl").write_text("".join(f"{alert.to_json()}\n" for alert in alerts))


@pytest.mark.parametrize("command", [[], ["demo"], ["alerts"]])
def test_help_names_the_program_and_exits_with_0(command, capsys):
    """`--help` works at every level."""
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert " ".join(["usage: lightning-interp", *command]) in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    """`--version` prints the one version there is."""
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-interp {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "demo,alerts"),
        (["train"], "train"),
        (["demo", "--epochs", "0"], "--epochs: expected an integer of at least 1, but got '0'"),
        (["demo", "--epochs", "two"], "--epochs: expected an integer of at least 1, but got 'two'"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seed", "1.5"], "--seed: expected an integer of at least 0, but got '1.5'"),
        (["alerts"], "LOGDIR"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_with_2(arguments, named, capsys):
    """The line names the argument, what was expected and what came."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert named in printed.err


def test_python_m_is_the_same_program():
    """`python -m lightning_interp` passes the exit status on."""
    command = [sys.executable, "-m", "lightning_interp", "alerts", "no such folder"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "lightning-interp alerts: 'no such folder' is not a folder\n"


def test_alerts_without_a_file_says_so(tmp_path, capsys):
    """A folder without runs is a mistake of the user's, not a run without alerts."""
    assert main(["alerts", str(tmp_path)]) == 2
    assert "there is no alerts.jsonl" in capsys.readouterr().err


def test_alerts_of_a_run_without_any_exits_with_0(tmp_path, capsys):
    """An empty file is a run without alerts."""
    write(tmp_path / "good")
    assert main(["alerts", str(tmp_path)]) == 0
    assert "none" in capsys.readouterr().out


def test_alerts_exits_with_1_if_a_critical_one_is_active(tmp_path, capsys):
    """All parts of an alert are in the table."""
    write(tmp_path / "good", NOISY)
    write(tmp_path / "bad" / "version_3", NOISY, DEAD)
    assert main(["alerts", str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("bad/version_3", "critical, layer features.conv3, step 40", "24 of 32 filters are dead."):
        assert part in out
    for part in ("evidence: dead_filters 24", "cause: learning rate", "advice: Divide the learning rate by ten."):
        assert part in out
    assert out.index("dead_filters") < out.rindex("noisy_filters")


def test_alerts_exits_with_0_when_the_critical_one_was_cleared(tmp_path, capsys):
    """Only what is active counts."""
    write(tmp_path, DEAD, cleared(DEAD))
    assert main(["alerts", str(tmp_path)]) == 0
    assert "cleared, layer features.conv3, step 50" in capsys.readouterr().out


def test_alerts_leaves_unreadable_lines_out(tmp_path, capsys):
    """A run that goes on may have half a line in its file."""
    write(tmp_path, DEAD)
    with (tmp_path / "alerts.jsonl").open("a") as file:
        file.write('[]\n{"rule": "dead_filters"}\n{"rule": "dead_fi')
    assert main(["alerts", str(tmp_path)]) == 1
    assert "3 lines of alerts.jsonl are no alerts" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_alerts_fit_the_terminal(tmp_path, capsys, monkeypatch, columns):
    """No line is wider than the terminal, and no word of the advice is lost."""
    monkeypatch.setenv("COLUMNS", str(columns))
    write(tmp_path / "a-rather-long-name-of-an-experiment" / "version_12", DEAD)
    main(["alerts", str(tmp_path)])
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= columns
    assert all(word in out for word in DEAD.advice.split())


def test_read_alerts_keeps_the_newest_state_of_each_rule_and_layer(tmp_path):
    """Raised, cleared and raised again is active once, with the last step."""
    again = Alert.from_dict({**vars(DEAD), "step": 90})
    write(tmp_path / "run", NOISY, DEAD, cleared(DEAD), again)
    write(tmp_path / "other")
    other, run = read_alerts(tmp_path)
    assert other == AlertLog("other", [])
    assert run.run == "run"
    assert [(alert.rule, alert.step) for alert in run.latest] == [("dead_filters", 90), ("noisy_filters", 60)]
    assert run.active == run.latest


def test_read_alerts_names_the_folder_itself(tmp_path):
    """A run given directly is named after its folder."""
    write(tmp_path / "run", DEAD)
    (log,) = read_alerts(tmp_path / "run")
    assert log.run == "run"
