"""Very many layers, and all of them asked for: what is written stays within bounds, which is said; training goes on."""

import torch
from torch import nn

from lightning_interp import Interp
from lightning_interp.callbacks._output import MOST_LAYERS
from lightning_interp.callbacks.session import Session
from tests.contract.battery import differences, fit_quietly
from tests.contract.nets import CLASSES, Capture, Net, loader, quiet_trainer, seed_all

LAYERS = 1500


class Wide(nn.Module):
    """Layers of two units side by side; one of each is dead, and one alive."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 2) for _ in range(LAYERS))
        self.head = nn.Linear(2, CLASSES)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight[:] = 0.0
                layer.bias[:] = torch.tensor([-1.0, 1.0])

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(sum(torch.relu(layer(x)) for layer in self.layers) / LAYERS)


class Brief(Net):
    """Without the diary, which looks at each module in each step."""

    def note(self, *args, **more):
        """Nothing."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        """Nothing."""


def run(callbacks):
    seed_all(2)
    model, capture = Brief(Wide()), Capture()
    trainer = quiet_trainer(callbacks=callbacks, logger=capture, max_epochs=1)
    said = fit_quietly(trainer, model, loader(12))
    assert trainer.global_step == 2
    return trainer, dict(model.state_dict()), capture.of_interp(), said


def test_a_hundred_thousand_layers_asked_for_are_bounded_and_said():
    trainer, weights, rows, said = run([Interp("light", max_layers=100_000, on_error="raise")])
    groups = {}
    for tag in rows:
        group, _, layer = tag.partition("/")
        groups.setdefault(group, []).append(layer)
    shown = groups["interp.dead_filters"]
    assert len(shown) == MOST_LAYERS
    assert max(map(len, groups.values())) <= MOST_LAYERS
    assert {"0000_net.layers.0", f"{LAYERS - 1}_net.layers.{LAYERS - 1}"} <= set(shown), "over the whole depth"
    (about,) = [message for message in said if "max_layers" in message]
    assert "shows 1,000 layers" in about
    assert "max_layers=100000" in about
    assert rows["interp/dead_filters"][-1][1] == LAYERS, "the aggregate holds all"
    assert len(Session.of(trainer).history.layers("dead_fraction")) == LAYERS, "and so do the rules"
    assert differences(run([])[1], weights) == []


def test_nothing_is_said_where_no_more_are_there():
    """`max_layers=100_000` is how somebody says: all."""
    capture = Capture()
    trainer = quiet_trainer(callbacks=[Interp("light", max_layers=100_000)], logger=capture, max_epochs=1)
    assert fit_quietly(trainer, Net(), loader(12)) == []
    assert "interp.dead_filters/00_net.0" in capture.of_interp()
