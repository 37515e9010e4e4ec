"""The callback that shows filters and logs their numbers."""

import copy
import importlib
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks import _start
from lightning_interp.callbacks._start import StartWeights
from lightning_interp.callbacks.filter_grid import FilterGrid, _filters_first
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import ArgumentError, InterpWarning
from lightning_interp.functional.filters import filter_movement, filter_smoothness, variance_entropy
from lightning_interp.render.color import NON_FINITE, SIGNAL
from lightning_interp.render.filters import filter_grid
from tests.reading import read, summaries

TAGS = {
    f"interp.{quantity}/{layer}"
    for quantity in ("filters", "filter_smoothness", "filter_entropy", "filter_movement")
    for layer in ("00_first", "01_second")
} | {"interp/filter_smoothness_mean", "interp/filter_entropy_mean", "interp/filter_movement_max"}


class Net(pl.LightningModule):
    """Two convolutions and a head."""

    def __init__(self, first=None, second=None, rate=0.1):
        super().__init__()
        self.first = first or nn.Conv2d(3, 8, 3, padding=1)
        self.second = second or nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.rate = rate

    def forward(self, images):
        return self.head(self.second(self.first(images).relu()).relu().mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


class Linear(Net):
    """No convolution."""

    def __init__(self):
        super().__init__()
        self.first = self.second = None
        self.head = nn.Linear(3 * 36, 2)

    def forward(self, images):
        return self.head(images.flatten(1))


class Recorder(pl.Callback):
    """Copies the weights before the first and after each optimizer step."""

    def __init__(self):
        self.weights = {}

    def on_train_start(self, trainer, pl_module):
        self.weights[-1] = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.weights[step] = copy.deepcopy(pl_module.state_dict())  # with accumulation the last one of a step stays


def loader(num_batches=4):
    """Batches of four images of three channels, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * num_batches, 3, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(0, 2, (4 * num_batches,), generator=generator)), 4)


def fit(
    model, callbacks, folder, *, ckpt_path=None, namespace="pytorch_lightning", num_batches=4, ours="error", **options
):
    """Trains on the CPU; what Lightning says about small runs is not ours."""
    options = {"max_epochs": 2, "logger": True, "enable_checkpointing": False, **options}
    trainer = importlib.import_module(namespace).Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pytorch_lightning|lightning\.pytorch")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers|litlogger).*")
        warnings.filterwarnings(ours, category=InterpWarning)
        trainer.fit(model, loader(num_batches), ckpt_path=ckpt_path)
    return trainer


def log_of(trainer):
    """What the dashboards would see."""
    return read(Path(trainer.logger.log_dir), "slow")


def seeded(**options):
    """A net with the same weights each time."""
    torch.manual_seed(0)
    return Net(**options)


def test_filter_grid_numbers_and_pictures_equal_those_of_the_recorded_weights(tmp_path):
    """Before the first step and after each epoch, at the step of the last batch."""
    recorder = Recorder()
    log = log_of(fit(seeded(), [FilterGrid(on_error="raise"), recorder], tmp_path))
    assert {tag for tag in (*log.scalars, *log.images) if tag.startswith("interp") and ".cost" not in tag} == TAGS
    start = recorder.weights[-1]
    for at, (index, step) in enumerate([(-1, 0), (3, 3), (7, 7)]):
        state, movements = recorder.weights[index], []
        for layer in ("first", "second"):
            weight, number = state[f"{layer}.weight"], "00" if layer == "first" else "01"
            movements.append(filter_movement(weight, start[f"{layer}.weight"]))
            for quantity, value in (
                ("smoothness", filter_smoothness(weight)),
                ("entropy", variance_entropy(weight)),
                ("movement", movements[-1]),
            ):
                logged = log.scalars[f"interp.filter_{quantity}/{number}_{layer}"][at]
                assert logged == (step, pytest.approx(value, rel=1e-6))
            assert log.images[f"interp.filters/{number}_{layer}"][at][0] == step
            assert (log.images[f"interp.filters/{number}_{layer}"][at][1] == filter_grid(weight.numpy())).all()
        assert log.scalars["interp/filter_movement_max"][at] == (step, pytest.approx(max(movements), rel=1e-6))
    assert log.values("interp/filter_movement_max")[-1] > 0


def test_filter_grid_rules_get_the_same_numbers(tmp_path):
    """All layers, also those that are not logged, and nothing for what is not defined."""

    class Peek(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.history = Session.of(trainer).history

    peek = Peek()
    model = seeded(second=nn.Conv2d(8, 4, 1))
    trainer = fit(model, [FilterGrid(max_layers=1, on_error="raise"), peek], tmp_path)
    assert peek.history.layers("filter_movement") == ["first", "second"]
    assert peek.history.layers("filter_smoothness") == peek.history.layers("filter_entropy") == ["first"]
    assert peek.history.get("filter_smoothness", "first").steps == [0, 3, 7]
    assert [tag for tag in log_of(trainer).images if "filters" in tag] == ["interp.filters/00_first"]


def test_filter_grid_accumulation_shows_the_weights_after_the_update(tmp_path):
    """Two batches share a step; the first of them changes nothing."""
    recorder = Recorder()
    callback = FilterGrid(every_n_train_steps=2, on_error="raise")
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "num_batches": 8}
    log = log_of(fit(seeded(), [callback, recorder], tmp_path, **options))
    assert log.steps("interp/filter_movement_max") == [0, 1, 3]
    for step, value in log.scalars["interp.filter_movement/00_first"][1:]:
        expected = filter_movement(recorder.weights[step]["first.weight"], recorder.weights[-1]["first.weight"])
        assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "trainer_options", "steps"),
    [
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [0, 3, 7, 15, 19]),
        ({"every_n_train_steps": 3}, {}, [0, 2, 5, 7]),
        ({"every_n_train_steps": 100}, {"max_steps": 6, "max_epochs": -1}, [0, 5]),
        ({}, {"max_steps": 6}, [0, 3, 5]),
    ],
)
def test_filter_grid_schedule_always_has_the_first_and_the_last_state(options, trainer_options, steps, tmp_path):
    """Each step once."""
    trainer = fit(seeded(), [FilterGrid(on_error="raise", **options)], tmp_path, **trainer_options)
    log = log_of(trainer)
    assert log.steps("interp.filter_movement/00_first") == steps
    assert [step for step, _ in log.images["interp.filters/00_first"]] == steps
    tags = [(v.tag, e.step) for e in summaries(Path(trainer.logger.log_dir)) for v in e.summary.value]
    assert len(tags) == len(set(tags))


def test_filter_grid_dead_filters_are_outlined(tmp_path):
    """Those that the session knows, from then on."""

    class Declares(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            Session.of(trainer).dead["second"] = [1, 3]

    log = log_of(fit(seeded(), [Declares(), FilterGrid(on_error="raise")], tmp_path))
    before, after = log.images["interp.filters/01_second"][0][1], log.images["interp.filters/01_second"][-1][1]
    assert before.shape == after.shape
    assert not (before == SIGNAL).all(axis=-1).any()
    assert (after == SIGNAL).all(axis=-1).any()
    assert not (log.images["interp.filters/00_first"][-1][1] == SIGNAL).all(axis=-1).any()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_filters_first_transposed_filter_is_what_an_input_pixel_draws(kind, groups):
    """A one in input channel c draws kernel (o, c) into each output channel o of its group."""
    module = kind(4, 8, 3, groups=groups, bias=False)
    axes = module.weight.ndim - 2
    filters = _filters_first(module.weight.detach(), module)
    assert filters.shape == (8, 4 // groups, *(3,) * axes)
    for channel in range(4):
        pixel = torch.zeros(1, 4, *(1,) * axes)
        pixel[0, channel] = 1.0
        drawn = module(pixel)[0].detach()
        group = channel // (4 // groups)
        of_group = slice(group * 8 // groups, (group + 1) * 8 // groups)
        assert torch.allclose(filters[of_group, channel % (4 // groups)], drawn[of_group])


def test_filters_first_convolution_is_unchanged():
    """Its filters come first already."""
    module = nn.Conv2d(4, 8, 3, groups=2)
    assert _filters_first(module.weight, module) is module.weight


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm, lambda module: module],
    ids=["spectral_norm", "weight_norm", "plain"],
)
def test_filter_grid_training_is_bit_identical_with_and_without(wrap, tmp_path):
    """Reading a spectral norm in train mode would advance its power iteration."""
    states = []
    for callbacks in ([], [FilterGrid(every_n_train_steps=1, on_error="raise")]):
        torch.manual_seed(0)
        model = Net(wrap(nn.Conv2d(3, 8, 3)), wrap(nn.Conv2d(8, 4, 1)))
        fit(model, callbacks, tmp_path)
        states.append(({**model.state_dict()}, torch.get_rng_state()))
    (without, generator), (with_callback, other_generator) = states
    assert without.keys() == with_callback.keys()
    for name, value in without.items():
        assert torch.equal(value, with_callback[name]), name
    assert torch.equal(generator, other_generator)


def test_filter_grid_no_convolution_warns_once_and_rests(tmp_path):
    """Nothing is logged."""
    with pytest.warns(InterpWarning, match="nothing to show: Linear has no convolution") as caught:
        trainer = fit(Linear(), [FilterGrid(on_error="raise")], tmp_path, ours="always")
    assert len([w for w in caught if w.category is InterpWarning]) == 1
    assert not [tag for tag in log_of(trainer).scalars if tag.startswith("interp.filter")]


def test_filter_grid_not_finite_weights_are_shown_and_do_not_stop_training(tmp_path):
    """A rate that blows up within the run."""
    log = log_of(fit(seeded(rate=1e30), [FilterGrid(on_error="raise")], tmp_path))
    assert not math.isfinite(log.values("interp/filter_movement_max")[-1])
    assert (log.images["interp.filters/00_first"][-1][1] == NON_FINITE).all(axis=-1).any()


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}])
def test_filter_grid_without_a_log_does_nothing_wrong(namespace, options, tmp_path):
    """No logger, and Lightning's dry run, in both namespaces."""
    module = importlib.import_module(namespace)

    class Same(module.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    fit(Same(), [FilterGrid(on_error="raise")], tmp_path, namespace=namespace, **options)
    assert not list(tmp_path.rglob("interp_step0*"))


# ---------------------------------------------------------------------- resume


def interrupted(folder):
    """Trains one epoch and saves; the path of the checkpoint."""
    trainer = fit(seeded(), [FilterGrid(on_error="raise")], folder / "a", max_epochs=1)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("limit", [1_000_000, 10], ids=["in the checkpoint", "in a file"])
def test_filter_grid_resume_goes_on_from_the_first_start(limit, tmp_path, monkeypatch):
    """The movement equals that of the run that was not interrupted; the start is not drawn again."""
    monkeypatch.setattr(_start, "IN_CHECKPOINT", limit)
    path = interrupted(tmp_path)
    again = fit(Net(), [FilterGrid(on_error="raise")], tmp_path / "b", ckpt_path=path)
    whole = log_of(fit(seeded(), [FilterGrid(on_error="raise")], tmp_path / "whole"))
    log = log_of(again)
    for tag in sorted(TAGS - {"interp.filters/00_first", "interp.filters/01_second"}):
        assert log.scalars[tag] == whole.scalars[tag][2:], tag
    assert (log.images["interp.filters/01_second"][0][1] == whole.images["interp.filters/01_second"][2][1]).all()
    assert len(list((tmp_path / "a").rglob("interp_step0_*.pt"))) == (limit == 10)
    assert not list(tmp_path.rglob("*.tmp"))


def delete(folder):
    """The old log is gone."""
    for path in folder.rglob("interp_step0_*.pt"):
        path.unlink()


def tamper(folder):
    """A byte has changed."""
    for path in folder.rglob("interp_step0_*.pt"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(("before", "what"), [(delete, "is missing"), (tamper, "SHA-256 differs")])
def test_filter_grid_lost_file_is_said_once_and_movement_is_relative_to_the_resume(before, what, tmp_path, monkeypatch):
    """Training goes on."""
    monkeypatch.setattr(_start, "IN_CHECKPOINT", 10)
    path, recorder = interrupted(tmp_path), Recorder()
    before(tmp_path)
    with pytest.warns(InterpWarning, match=f"{what}.*relative to the weights at step 4") as caught:
        again = fit(Net(), [FilterGrid(on_error="raise"), recorder], tmp_path / "b", ckpt_path=path, ours="always")
    assert len([w for w in caught if w.category is InterpWarning]) == 1
    expected = filter_movement(recorder.weights[7]["first.weight"], recorder.weights[-1]["first.weight"])
    assert log_of(again).values("interp.filter_movement/00_first") == [pytest.approx(expected, rel=1e-6)]


def test_filter_grid_added_at_a_resume_says_that_it_has_no_start(tmp_path):
    """The checkpoint knows nothing of it."""
    trainer = fit(seeded(), [], tmp_path / "a", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(InterpWarning, match="does not hold it for 'first', 'second'"):
        again = fit(
            Net(), [FilterGrid(on_error="raise")], tmp_path / "b", ckpt_path=tmp_path / "last.ckpt", ours="always"
        )
    assert log_of(again).steps("interp/filter_movement_max") == [7]


def test_filter_grid_fit_twice_starts_afresh(tmp_path):
    """The second run's movement is its own."""
    callback = FilterGrid(on_error="raise")
    first = log_of(fit(seeded(), [callback], tmp_path / "a"))
    second = log_of(fit(seeded(), [callback], tmp_path / "b"))
    assert second.scalars["interp.filter_movement/01_second"] == first.scalars["interp.filter_movement/01_second"]


def test_start_weights_unwritable_folder_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    """A file stands where the folder should be."""
    monkeypatch.setattr(_start, "IN_CHECKPOINT", 10)
    blocked = tmp_path / "file"
    blocked.write_text("")
    start = StartWeights()
    start.take({"a": torch.ones(4, 4)})
    assert "can't be written" in start.write(str(blocked))
    assert start.write(None) == "there is no log folder"
    assert start.state_dict() == {}
    assert list(tmp_path.iterdir()) == [blocked]


def test_start_weights_moved_file_is_found_in_the_new_folder(tmp_path, monkeypatch):
    """By its name, and only if it is the same; the types of the weights stay."""
    monkeypatch.setattr(_start, "IN_CHECKPOINT", 10)
    weights = {"a": torch.randn(4, 4).bfloat16()}
    start, other = StartWeights(), StartWeights()
    start.take(weights)
    assert start.write(str(tmp_path / "old")) is None
    (tmp_path / "old").rename(tmp_path / "new")
    other.load_state_dict(start.state_dict())
    assert other.fill({"a": torch.zeros(4, 4)}, str(tmp_path / "new")) is None
    assert torch.equal(other.weights["a"], weights["a"])
    assert other.weights["a"].dtype == torch.bfloat16


def test_start_weights_are_copies():
    """An optimizer steps in place."""
    weight = torch.ones(3)
    start = StartWeights()
    start.take({"a": weight})
    weight += 1
    assert start.weights["a"].tolist() == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_filters": 0}, "`max_filters` to be a positive integer, but got 0"),
        ({"max_filters": True}, "`max_filters`"),
        ({"every_n_epochs": 0}, "`every_n_epochs`"),
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "exclude each other"),
        ({"layers": "first"}, "`layers` to be a list of strings"),
    ],
)
def test_filter_grid_wrong_arguments_are_refused_at_once(options, message):
    """Before any training."""
    with pytest.raises(ArgumentError, match=message):
        FilterGrid(**options)


def test_filter_grid_unknown_layer_is_refused_in_setup_with_a_suggestion(tmp_path):
    """A linear layer is none either."""
    with pytest.raises(ArgumentError, match=r"No layer matches 'frist'.*'first', 'second'.*Did you mean 'first'"):
        fit(seeded(), [FilterGrid(layers=["frist"])], tmp_path)


def test_filter_grid_layers_and_name_are_honoured(tmp_path):
    """Two instances side by side."""
    callbacks = [FilterGrid(layers=["first"], name="a"), FilterGrid(layers=["sec*"], name="b")]
    assert len({callback.state_key for callback in callbacks}) == 2
    log = log_of(fit(seeded(), callbacks, tmp_path))
    assert {tag for tag in log.images if tag.startswith("interp")} == {
        "interp.filters.a/00_first",
        "interp.filters.b/01_second",
    }
    assert "interp.a/filter_movement_max" in log.scalars


def test_filter_grid_quiet_draws_and_logs_nothing_but_feeds_the_rules(tmp_path):
    """As `Alerts` uses it."""

    class Peek(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.steps = Session.of(trainer).history.get("filter_movement", "first").steps

    callback, peek = FilterGrid(on_error="raise"), Peek()
    callback.quiet = True
    trainer = fit(seeded(), [callback, peek], tmp_path)
    assert not any(v.tag.startswith("interp") for e in summaries(Path(trainer.logger.log_dir)) for v in e.summary.value)
    assert peek.steps == [0, 3, 7]


def test_filter_grid_after_a_run_can_be_pickled_and_holds_no_model(tmp_path):
    """Spawned processes get callbacks by pickle."""
    callback = FilterGrid(on_error="raise")
    fit(seeded(), [callback], tmp_path)
    assert callback._convolutions == {}
    other = pickle.loads(pickle.dumps(callback))
    state = other.state_dict()["start"]["weights"]
    assert all(np.array_equal(state[layer], weight) for layer, weight in callback._start.weights.items())
