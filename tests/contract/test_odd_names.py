"""Layers may be called almost anything: the names reach every place whole, and harm none."""

import csv
import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_interp import Interp
from lightning_interp.alert_table import alert_table
from lightning_interp.callbacks._alert_text import log_lines
from lightning_interp.cli import main
from lightning_interp.rules.alert import Alert
from tests.contract.battery import differences, fit_quietly
from tests.contract.conftest import CHATTER
from tests.contract.factories import often
from tests.contract.nets import CLASSES, Capture, Net, loader, pl, quiet_trainer, seed_all
from tests.contract.odd import LITTLE
from tests.reading import BACK_ENDS, read

NAMES = [
    "größe/Ünïcode", "<script>alert(1)<", "//etc/passwd", "слой 1", "层🔥", "a|b`c*[d](e)\\", "new\nline", "x" * 300,
    "C:\\con", "%s {0} $HOME", "[bold red]x[/]", "[a-z]*?", " ", "\x1b[31m",
    'say "cheese"',
]  # fmt: skip
HEAD = "</td>head/é"
# TensorBoard's fast back end shows no picture under a tag with one of these; the rest stays as it is.
IN_TAGS = {"\\": "%5C", "\n": "%0A", "\x1b": "%1B", '"': "%22"}


class Odd(nn.Module):
    """A convolution of each name, the head too; most filters are dead, so that alerts name the layers."""

    def __init__(self):
        super().__init__()
        channels = 1
        for name in NAMES:
            self.add_module(name, nn.Conv2d(channels, 4, 3, padding=1))
            channels = 4
            with torch.no_grad():
                self._modules[name].bias[:3] = -9.0
        self.add_module(HEAD, nn.Linear(4, CLASSES))

    def forward(self, x):
        for name in NAMES:
            x = torch.relu(self._modules[name](x))
        return self._modules[HEAD](x.mean((2, 3)))


def run(callbacks, folder):
    """The weights, the folder of the run, its numbers and what was said."""
    seed_all(0)
    model, capture, board = Net(Odd()), Capture(), pl.loggers.TensorBoardLogger(folder)
    trainer = quiet_trainer(callbacks=callbacks, logger=[capture, board], max_epochs=1)
    with warnings.catch_warnings():  # this runs in a fixture of the module, before those of each test
        for message in CHATTER:
            warnings.filterwarnings("ignore", message=message)
        said = fit_quietly(trainer, model, loader(**LITTLE), loader(**LITTLE, seed=1, shuffle=False))
    return model.state_dict(), Path(board.log_dir), capture.of_interp(), said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run of all callbacks, in a folder that has a neighbour."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "runs").mkdir()
    return folder, *run([*often(), Interp(name="second", on_error="raise")], folder / "runs")


def test_weights_are_those_of_a_run_without_callbacks(trained, tmp_path):
    assert differences(run([], tmp_path)[0], trained[1]) == []
    assert trained[4] == []


def in_tags(name):
    return "".join(IN_TAGS.get(mark, mark) for mark in name)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_layer_has_its_tags(back_end, trained):
    """In both of TensorBoard's back ends, with its pictures."""
    log = read(trained[2], back_end)
    layers = {f"{number:02d}_net.{in_tags(name)}" for number, name in enumerate(NAMES)}
    for tags in (log.scalars, trained[3]):
        assert {
            tag.removeprefix("interp.dead_filters/") for tag in tags if tag.startswith("interp.dead_filters/")
        } == layers
    assert {f"interp.filters/{layer}" for layer in layers} <= set(log.images)
    assert f"interp.dead_fraction/00_net.{NAMES[0]}" in log.scalars


def test_no_file_is_written_outside_the_folder_of_the_run_or_named_after_a_layer(trained):
    """Slashes lead nowhere; the projector's files have names of their own."""
    folder, run_folder = trained[0], trained[2]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert all(run_folder in path.parents for path in files)
    own = {"alerts.jsonl", "suspect_labels.csv", "projector_config.pbtxt", "hparams.yaml", "projector"}
    first = {path.relative_to(run_folder).parts[0] for path in files}
    assert {name for name in first if "tfevents" not in name and not name.startswith("alerts")} <= own
    assert all(part.isascii() and "<" not in part for path in files for part in path.relative_to(folder).parts)


def test_projector_finds_what_it_lists(trained):
    """Names are made safe for an address there; each file that is listed exists."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    folder = trained[2]
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(encoding="utf-8"), ProjectorConfig())
    assert config.embeddings
    for info in config.embeddings:
        assert (folder / info.tensor_path).is_file()
        assert (folder / info.metadata_path).is_file()
        assert not set("<>\n\x1b") & set(info.tensor_name)


def test_alert_file_is_one_object_a_line_with_the_names_as_they_are(trained):
    lines = (trained[2] / "alerts.jsonl").read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line]
    assert {f"net.{name}" for name in NAMES} <= {alert["layer"] for alert in found}


def test_table_of_suspects_keeps_its_columns(trained):
    rows = list(csv.reader(io.StringIO((trained[2] / "suspect_labels.csv").read_text())))
    assert len(rows) > 1
    assert len({len(row) for row in rows}) == 1


def test_log_has_one_line_an_alert_and_no_control_characters():
    """A name with a line break must not look like another alert, nor one with an escape colour the terminal."""
    alerts = [Alert(rule="dead_filters", severity="warning", layer=name, step=1, message=f"{name}.") for name in NAMES]
    for _, line in [*log_lines(alerts), *(line for alert in alerts for line in log_lines([alert]))]:
        assert line.isprintable(), repr(line)
    assert "net" not in log_lines(alerts[:1])[0][1]


def test_terminal_table_shows_names_as_text(trained, capsys):
    """Neither markup nor escapes of a layer's name are obeyed."""
    alert = Alert(rule="dead_filters", severity="warning", layer="[bold red]x[/]\x1b[31m", step=1, message="Dead.")
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(alert_table([(["run"], [alert])], columns=["run"]))
    assert "[bold red]x[/]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert main(["alerts", str(trained[0])]) == 1  # a critical one is active
    printed = capsys.readouterr().out
    assert "<script>alert(1)<" in printed
    assert "\x1b[31m" not in printed
