"""Numbers and amounts off the beaten track: NaN and infinity anywhere, nothing alive, one of a thing, or very many."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_interp import Alerts, ClassImages, DeadFilters, Interp
from lightning_interp.callbacks._family import with_children
from tests.contract.battery import Recipe, fit_quietly
from tests.contract.factories import often
from tests.contract.nets import CLASSES, Capture, Images, Net, loader, pl, quiet_trainer, seed_all
from tests.contract.odd import LITTLE, MAKERS, NUMBERS, survives
from tests.reading import summaries

NAN, INF = float("nan"), float("inf")
DIVERGED = (r"Influence has nothing to show of the training images: the embeddings are NaN or infinite",)


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


def edited(edit):
    """A network of which `edit` changes parameters."""
    made = net()
    with torch.no_grad():
        edit(made)
    return made


def poisoned(made):
    made[0].weight[1], made[2].weight[0] = NAN, INF


def silenced(made):
    for layer in (made[0], made[2]):
        layer.weight.zero_()
        layer.bias.fill_(-1.0)


class Leaky(nn.Module):
    """Two maps of the first layer are NaN and infinite; the rest of the network does not see it."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        x = self.net[0](x).clone()
        x[:, 0], x[:, 1] = NAN, INF
        return self.net[2:](torch.nan_to_num(self.net[1](x), 0.0, 0.0, 0.0))


class BadImages(Net):
    """Some images of every batch, or all of them, are NaN or infinite; the user leaves those out of the loss."""

    def __init__(self, share, value):
        super().__init__(net())
        self.share, self.value = share, value

    def loss(self, batch):
        x, y = batch
        x = x.clone()
        x[: round(len(x) * self.share)] = self.value
        losses = nn.functional.cross_entropy(self(x), y, reduction="none")
        return torch.where(losses.isfinite(), losses, 0.0).mean()


class BadLoss(Net):
    """The loss is NaN from the second step on."""

    def loss(self, batch):
        return super().loss(batch) * (NAN if self.global_step else 1.0)


def recipe(name, make_model, **data):
    return Recipe(name, make_model, data={**LITTLE, **data})


ODD = {
    "NaN and inf in weights": (recipe("weights", lambda: Net(edited(poisoned))), DIVERGED, {"interp/dead_filters"}),
    "NaN and inf in activations": (recipe("activations", lambda: Net(Leaky())), (), NUMBERS),
    "some images NaN": (recipe("some images", lambda: BadImages(0.5, NAN)), DIVERGED, {"interp/dead_filters"}),
    "all images inf": (recipe("all images", lambda: BadImages(1.0, INF)), DIVERGED, {"interp/dead_filters"}),
    "loss NaN": (recipe("loss", lambda: BadLoss(net())), DIVERGED, NUMBERS),
    "all filters dead": (recipe("dead", lambda: Net(edited(silenced))), (), NUMBERS),
    "batches of one": (recipe("one", lambda: Net(net()), batch=1, samples=5), (), NUMBERS),
    "last batch smaller": (recipe("last", lambda: Net(net()), batch=4, samples=9), (), NUMBERS),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("kind", ODD)
def test_odd_numbers_are_measured_and_trained_as_without_us(kind, make):
    """NaN equals NaN here: bit for bit."""
    how, says, measured = ODD[kind]
    rows = survives(how, make, says=says, measured=measured)
    if kind == "all filters dead":
        assert {value for _, value in rows["interp/dead_fraction_max"]} == {1.0}


@pytest.mark.parametrize("kind", ["NaN and inf in weights", "loss NaN"])
def test_what_is_not_finite_is_said_in_an_alert(kind):
    """Where the callbacks have no number to give, the rule has one thing to say."""
    alerts = Alerts(on_error="raise")
    quiet_trainer(callbacks=[alerts]).fit(ODD[kind][0].make_model(), loader(**LITTLE), loader(**LITTLE, shuffle=False))
    assert "non_finite" in {alert.rule for alert in alerts.history}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers")
@pytest.mark.parametrize(("context", "level"), [("fork", "standard"), ("spawn", "light")])  # spawning takes seconds
def test_data_loader_with_workers(context, level):
    """In either way to start them; the workers of the user's loader see nothing of us."""

    def run(callbacks):
        seed_all(3)
        options = {"batch_size": 4, "num_workers": 1, "multiprocessing_context": context}
        model, capture = Net(net()), Capture()
        trainer = quiet_trainer(callbacks=callbacks, logger=capture, max_epochs=1, num_sanity_val_steps=0)
        said = fit_quietly(trainer, model, DataLoader(Images(8), **options), DataLoader(Images(8, seed=1), **options))
        return model.state_dict(), said, capture.of_interp()

    expected, _, _ = run([])
    actual, said, rows = run([Interp(level, on_error="raise")])
    assert said == []
    assert rows.keys() >= (NUMBERS if level == "standard" else NUMBERS - {"interp/sparsity_mean"})
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


# ---------------------------------------------------------------------- very many

MANY = 10_000


def test_ten_thousand_classes(tmp_path):
    """Pictures and scalars of a few of them, and no table of classes by classes anywhere."""
    head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, MANY))
    capture, board = Capture(), pl.loggers.TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(callbacks=often(), logger=[capture, board], max_epochs=1)
    data = {**LITTLE, "classes": MANY}
    assert fit_quietly(trainer, Net(head), loader(**data), loader(**data, seed=1, shuffle=False)) == []
    assert capture.of_interp().keys() >= NUMBERS
    assert len({value.tag for event in summaries(tmp_path) for value in event.summary.value}) < 200
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 5e6


def test_a_data_set_of_ten_thousand_classes():
    """As many samples as classes: what is kept per sample is numbers, and the embedding is of some points only."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, MANY))
    callbacks = [Interp("full", on_error="raise")]
    for child in callbacks[0].children:
        if isinstance(child, ClassImages):
            child.steps = 3
    capture = Capture()
    trainer = quiet_trainer(callbacks=callbacks, logger=capture, max_epochs=1, limit_train_batches=4)
    data = {"samples": MANY, "classes": MANY, "batch": 64, "shape": (1, 6, 6)}
    said = fit_quietly(trainer, Net(head), loader(**data), loader(**{**data, "samples": 64}, seed=1, shuffle=False))
    assert len(said) == len(set(said)) <= 1
    assert all("Influence" in message for message in said)  # which keeps the head small, and says so
    states = [child.state_dict() for child in with_children(callbacks)]
    assert sum(_bytes(state) for state in states) < 10e6


def _bytes(state):
    """Of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes, items))


DEPTH = 60


def deep():
    """Very many layers, all but one of them 1x1."""
    layers = [part for _ in range(DEPTH) for part in (nn.Conv2d(2, 2, 1), nn.ReLU())]
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, CLASSES)
    )


@pytest.mark.parametrize("max_layers", [5, 100_000])
def test_a_hundred_thousand_layers_asked_for(max_layers):
    """There are as many tags as layers at most, and as many as asked for; aggregates hold all layers either way."""
    capture, callback = Capture(), DeadFilters(on_error="raise")
    callbacks = [Interp(max_layers=max_layers, on_error="raise"), DeadFilters(name="all", on_error="raise")]
    seed_all(0)
    trainer = quiet_trainer(callbacks=callbacks, logger=capture, max_epochs=1, num_sanity_val_steps=0)
    assert fit_quietly(trainer, Net(deep()), loader(**LITTLE), loader(**LITTLE, seed=1, shuffle=False)) == []
    rows = capture.of_interp()
    for quantity in ("dead_filters", "sparsity", "update_ratio", "filter_movement"):
        tags = [tag for tag in rows if tag.startswith(f"interp.{quantity}/")]
        assert min(max_layers, DEPTH) <= len(tags) <= min(max_layers, DEPTH + 2)
    assert rows["interp/dead_filters"] == rows["interp.all/dead_filters"]
    assert callback.max_layers < DEPTH


def test_a_hundred_thousand_tags_at_one_step(tmp_path):
    """As scalars they go into one event: some megabytes, and no second of waiting."""
    from lightning_interp import sinks
    from lightning_interp.records import Scalar

    board = pl.loggers.TensorBoardLogger(tmp_path)
    sinks.write([board], [Scalar(tag=f"interp.dead_filters/{i:06d}_layer", step=0, value=i) for i in range(10 * MANY)])
    board.finalize("success")
    (event,) = summaries(tmp_path)
    assert len(event.summary.value) == 10 * MANY
    assert event.summary.value[-1].simple_value == 10 * MANY - 1
