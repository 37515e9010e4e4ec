"""The examples run, and show what they promise."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_interp.errors import InterpWarning

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Imports an example by name, in an empty folder; hints of Lightning's are not ours to mend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def by_name(name: str):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", InterpWarning)
        yield by_name
    sys.modules.pop("quickstart", None)


def quantities(log_dir: str) -> set[str]:
    """What the log holds, by quantity."""
    events = EventAccumulator(log_dir)
    events.Reload()
    tags = [tag for kind in ("scalars", "images", "tensors") for tag in events.Tags()[kind]]
    return {tag.split("/")[0].removeprefix("interp.") for tag in tags if tag.startswith("interp.")}


EXPECTED = {"filters", "sparsity", "dead_filters", "dead_fraction", "update_ratio", "gradient_norm"}


def test_quickstart_logs_the_inside_of_the_network(load):
    """Every measurement is there after one epoch."""
    trainer = load("quickstart").main(epochs=1)
    assert quantities(trainer.log_dir) >= EXPECTED
    assert (Path(trainer.log_dir) / "alerts.jsonl").is_file()
    assert "interp/dead_filters" in trainer.callback_metrics


def test_yaml_configures_the_callback(load):
    """LightningCLI resolves `lightning_interp.Interp` and its options."""
    arguments = ["fit", "--config", str(EXAMPLES / "cli_config.yaml"), "--trainer.max_epochs", "1"]
    trainer = load("cli").main(arguments).trainer
    assert trainer.max_epochs == 1
    assert quantities(trainer.log_dir) >= EXPECTED
