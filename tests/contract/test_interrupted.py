"""Ctrl-C, as in a notebook: wherever it comes, the next `fit` of the same callbacks and model is a whole one."""

import copy
import pickle
import signal
from types import SimpleNamespace

import pytest

from tests.contract.battery import differences, fit_quietly
from tests.contract.factories import WHOLE
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import Capture, Net, loader, quiet_trainer, seed_all
from tests.contract.odd import LITTLE


@pytest.fixture(autouse=True)
def _signals_kept():
    """Lightning ignores Ctrl-C for good once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# Who is interrupted, and at which time from now. Not kept by the model: its attributes are put back after our forwards.
CTRL_C = SimpleNamespace(where="", left=0)


def tick(where):
    """Ctrl-C, if it is time."""
    CTRL_C.left -= where == CTRL_C.where
    if where == CTRL_C.where and CTRL_C.left == 0:
        raise KeyboardInterrupt


class Impatient(Net):
    """Is interrupted once, in mid-forward: of a step of its own, or of a forward that a callback makes."""

    stepping = False

    def forward(self, x):
        x = self.net[:4](x)
        tick("step" if self.stepping else "our forward")
        return self.net[4:](x)

    def training_step(self, batch, batch_idx):
        self.stepping = True
        loss = super().training_step(batch, batch_idx)
        self.stepping = False
        return loss

    def validation_step(self, batch, batch_idx):
        self.stepping = True
        super().validation_step(batch, batch_idx)
        self.stepping = False


class Slow(Capture):
    """A logger during whose writing somebody loses patience."""

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("interp") for key in metrics):
            tick("our logger")
        super().log_metrics(metrics, step)


def fit(model, callbacks, logger):
    """From the same seeds each time."""
    seed_all(5)
    trainer = quiet_trainer(callbacks=callbacks, logger=logger, max_epochs=2)
    return trainer, fit_quietly(trainer, model, loader(**LITTLE), loader(**LITTLE, seed=1, shuffle=False))


def modes(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["often", "Interp"])
@pytest.mark.parametrize(("where", "after"), [("step", 3), ("our forward", 1), ("our forward", 9), ("our logger", 4)])
def test_fit_after_ctrl_c_is_that_of_new_callbacks(where, after, name):
    """Numbers, warnings and weights; and nothing is left on the model in between."""
    model, callbacks = Impatient(), WHOLE[name]()
    wanted = modes(model)
    CTRL_C.where, CTRL_C.left = where, after
    with pytest.raises(SystemExit):  # Lightning makes that of it
        fit(model, callbacks, Slow())
    assert CTRL_C.left == 0
    CTRL_C.where = ""
    assert_nothing_left(model)
    if where == "our forward":  # put back, also on that way out
        assert modes(model) == wanted
    model.stepping = False
    twin = copy.deepcopy(model)
    pickle.dumps([callback.state_dict() for callback in callbacks])
    again, fresh = Capture(), Capture()
    trainer, said = fit(model, callbacks, again)
    assert said == fit(twin, WHOLE[name](), fresh)[1]
    assert_nothing_left(model, trainer.optimizers)
    assert differences(fresh.of_interp(), again.of_interp()) == []
    assert [step for step, _ in again.of_interp()["interp/learning_rate"]] == list(range(6))
    assert differences(dict(twin.state_dict()), dict(model.state_dict())) == []
    assert not any(callback.resting for callback in callbacks)
