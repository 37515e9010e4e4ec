"""Checkpoints that an earlier state of this package has written, as files: made by it, and not by the code of today.

`checkpoints/schema_1_<name>.ckpt` was written after six of twelve steps of `steady()` of `test_checkpoints.py`, in the
middle of the second epoch, with the callbacks `<name>` of `factories.py`, before a state had a schema number. Where
these files can no longer be read as they are, the reader is wrong, not the file.
"""

import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lightning_interp import Alerts, DeadFilters, SaliencyMaps
from lightning_interp.callbacks._family import with_children
from lightning_interp.callbacks._guarding import SCHEMA
from tests.contract.battery import differences, fit_quietly
from tests.contract.conftest import CHATTER
from tests.contract.factories import WHOLE
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import Capture, quiet_trainer
from tests.contract.test_checkpoints import steady

FOLDER = Path(__file__).parent / "checkpoints"
NAMES = ["often", "Interp"]
STEP, END = 6, 12

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
)


def states(name):
    """State key to state, of the callbacks that stand alone or in `Interp`."""
    callbacks = torch.load(FOLDER / f"schema_1_{name}.ckpt", weights_only=True)["callbacks"]
    return callbacks.get("Interp", callbacks)


def resumed(callbacks, path):
    """Trains to the end: the numbers, what was said and the model."""
    model, loaders = steady()
    logger = Capture()
    trainer = quiet_trainer(callbacks=callbacks, logger=logger, max_epochs=3)
    said = fit_quietly(trainer, model, *loaders, ckpt_path=path)
    assert trainer.global_step == END
    assert_nothing_left(model, trainer.optimizers)
    return logger.of_interp(), said, model


def only(kind, callbacks):
    (found,) = [each for each in with_children(callbacks) if isinstance(each, kind)]
    return found


@pytest.fixture(scope="module", params=NAMES)
def went_on(request):
    """The run of each file to its end, with callbacks that raise their errors."""
    callbacks = WHOLE[request.param]()
    with warnings.catch_warnings():  # this runs in a fixture of the module, before those of each test
        for message in (*CHATTER, "You're resuming from a checkpoint that ended before the epoch ended"):
            warnings.filterwarnings("ignore", message=message)
        return request.param, callbacks, *resumed(callbacks, FOLDER / f"schema_1_{request.param}.ckpt")


def test_nothing_has_to_be_said(went_on):
    assert went_on[3] == []


def test_numbers_follow_on(went_on):
    """What waited in the file is written too, and no step twice."""
    name, _, rows, *_ = went_on
    waited = {item["step"] for item in states(name)["TrainingDynamics"]["backlog"]}
    assert waited
    steps = [step for step, _ in rows["interp/learning_rate"]]
    assert steps == [*sorted(waited), *range(STEP, END)]
    for tag, points in rows.items():
        assert [step for step, _ in points] == sorted({step for step, _ in points}), tag
        assert min(step for step, _ in points) >= min(waited), tag


def test_history_of_dead_filters_goes_on(went_on):
    """Who was born dead is known from the file alone."""
    name, callbacks, rows, *_ = went_on
    before = [tuple(event) for event in states(name)["DeadFilters"]["lifelines"]["events"]]
    after = [tuple(asdict(event).values()) for event in only(DeadFilters, callbacks).events]
    assert before
    assert after[: len(before)] == before
    assert 0 in only(DeadFilters, callbacks).dead["net.0"]
    assert max(step for step, _ in rows["interp/dead_filters"]) == END - 1


def test_alerts_are_not_raised_again(went_on):
    name, callbacks, *_ = went_on
    before = [(each["rule"], each["layer"], each["step"]) for each in states(name)["Alerts"]["book"]["active"]]
    raised = [a for a in only(Alerts, callbacks).history if a.status == "raised"]
    keys = [(alert.rule, alert.layer, alert.step) for alert in raised]
    assert before
    assert set(before) <= set(keys)
    assert len({(alert.rule, alert.layer, alert.severity) for alert in raised}) == len(raised)


def test_film_strips_keep_their_first_picture(went_on):
    name, callbacks, *_ = went_on
    before = states(name)["SaliencyMaps"]["strips"]
    after = only(SaliencyMaps, callbacks).state_dict()["strips"]
    assert before
    for key, strip in before.items():
        assert strip["steps"][0] == after[key]["steps"][0] == 0
        assert after[key]["steps"][-1] == END - 1


def test_weights_are_those_of_a_resume_without_callbacks(went_on):
    name, model = went_on[0], went_on[4]
    without = resumed([], FOLDER / f"schema_1_{name}.ckpt")[2]
    assert differences(dict(without.state_dict()), dict(model.state_dict())) == []


@pytest.mark.parametrize("name", NAMES)
def test_newer_schema_of_one_callback_costs_that_one_its_memory_and_the_others_nothing(name, tmp_path):
    """With contents that nobody here can know."""
    checkpoint = torch.load(FOLDER / f"schema_1_{name}.ckpt", weights_only=True)
    inner = checkpoint["callbacks"].get("Interp", checkpoint["callbacks"])
    inner["DeadFilters"] = {"schema": SCHEMA + 1, "lives": [[1, 2], "unheard of"]}
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    callbacks = WHOLE[name]()
    rows, said, _ = resumed(callbacks, tmp_path / "newer.ckpt")
    newer = [message for message in said if "newer version of lightning-interp" in message]
    assert len(newer) == 1
    assert "DeadFilters begins anew" in newer[0]
    assert all("failed in" not in message for message in said)
    assert min(event.until for event in only(DeadFilters, callbacks).events) >= STEP - 1
    assert rows["interp/dead_filters"][-1][0] == rows["interp/learning_rate"][-1][0] == END - 1
    assert {alert.step for alert in only(Alerts, callbacks).history} & {3}
