"""Shares of zeros on the sampled batches, and the maps of the fixed samples, against the activations themselves."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_interp.callbacks import _activation_maps, activation_sparsity
from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import ArgumentError, InterpWarning
from lightning_interp.render.maps import activation_grid
from tests.callbacks.watched import Plain, Watched, fit, images, loader


class Reference(pl.Callback):
    """Shares of zeros by counting, for each batch; and what the callback has put into the history."""

    def __init__(self):
        self.batches, self.history, self.metric = [], {}, []

    def on_train_start(self, trainer, module):
        self.metric.append(trainer.callback_metrics["interp/sparsity_mean"].item())

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.book = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        shares = {}
        for note in module.book:
            shares.setdefault(note.layer, []).append((note.values == 0).double().mean().item())
        self.batches.append({layer: float(np.mean(values)) for layer, values in shares.items()})
        self.metric.append(trainer.callback_metrics["interp/sparsity_mean"].item())

    def on_train_end(self, trainer, module):
        history = Session.of(trainer).history
        for layer in history.layers("sparsity"):
            series = history.get("sparsity", layer)
            self.history[layer] = dict(zip(series.steps, series.values, strict=True))

    def means(self, indices):
        """Layer to the mean over these batches."""
        chosen = [self.batches[index] for index in indices]
        return {layer: float(np.mean([batch[layer] for batch in chosen])) for layer in chosen[0]}


def run(module=None, *, callbacks=(), train=None, options=None, **settings):
    """Without maps, unless they are asked for: their forwards would be in the reference's book."""
    torch.manual_seed(0)
    reference = Reference()
    callback = ActivationSparsity(on_error="raise", **{"maps": False} | (options or {}))
    fit(module or Plain(), callback, reference, *callbacks, train=train, **settings)
    return callback, reference


def assert_history(reference, expected):
    """`expected`: step to the batches that are averaged there."""
    for layer in reference.batches[0]:
        shares = {step: reference.means(indices)[layer] for step, indices in expected.items()}
        assert reference.history[layer] == pytest.approx(shares, abs=1e-6), layer


def test_sampled_batches_of_each_epoch(monkeypatch):
    """The first batch alone at step 0; then every second one of an epoch (50th, were it not patched), averaged."""
    monkeypatch.setattr(activation_sparsity, "_SAMPLE_EVERY", 2)
    monkeypatch.setattr(activation_sparsity, "_SAMPLE_AT", 1)
    _, reference = run(train=loader(7, batch_size=1), epochs=2)
    assert_history(reference, {0: [0], 6: [1, 3, 5], 13: [8, 10, 12]})
    assert list(reference.history) == ["first", "second"]


def test_sixth_batch_and_every_fiftieth():
    """As documented, the first of all apart."""
    _, reference = run(train=loader(57, batch_size=1), epochs=2)
    assert_history(reference, {0: [0], 56: [5, 55], 113: [62, 112]})


@pytest.mark.parametrize(("batches", "expected"), [(5, {0: [0], 9: [5]}), (6, {0: [0], 5: [5], 11: [11]})])
def test_a_short_epoch_is_sampled_too(batches, expected):
    """Its first batch, where it has no sixth one."""
    _, reference = run(train=loader(batches, batch_size=1), epochs=2)
    assert_history(reference, expected)


def test_first_batch_of_an_accumulated_step_is_sampled_alone():
    """However many batches make the first step."""
    _, reference = run(train=loader(9, batch_size=1), epochs=1, accumulate_grad_batches=3)
    assert_history(reference, {0: [0], 2: [5]})


def test_epochs_that_are_not_due_are_not_sampled():
    """The first one always is."""
    _, reference = run(train=loader(2, batch_size=1), epochs=5, options={"every_n_epochs": 2})
    assert_history(reference, {0: [0], 3: [2], 7: [6]})


def test_step_schedule():
    """The state before the first step, and the batches that are due."""
    _, reference = run(train=loader(7, batch_size=1), epochs=1, options={"every_n_train_steps": 3})
    assert_history(reference, {0: [0], 2: [2], 5: [5]})


def test_batches_of_one_accumulated_step_make_one_point():
    """Three batches an update: all of them are averaged."""
    _, reference = run(
        train=loader(9, batch_size=1), epochs=1, options={"every_n_train_steps": 2}, accumulate_grad_batches=3
    )
    assert_history(reference, {0: [0, 1, 2], 1: [3, 4, 5]})


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*images(), strict=True)


def test_endless_data_falls_back_to_steps(monkeypatch):
    """No epoch ends: sampled and reported by steps; pictures are not to be had, which is said."""
    monkeypatch.setattr("lightning_interp.callbacks.schedule.FALLBACK_STEPS", 4)
    monkeypatch.setattr(activation_sparsity, "_SAMPLE_EVERY", 2)
    with pytest.warns(InterpWarning, match=r"no pictures to show.*read by index.*got Endless"):
        _, reference = run(train=DataLoader(Endless(), batch_size=1), epochs=-1, max_steps=9, options={"maps": True})
    assert_history(reference, {0: [0], 3: [2], 7: [4, 6], 8: [8]})


class Mixed(Watched):
    """ReLU, a slice of a concatenation, a layer used twice, GELU, none; and a linear unit."""

    def __init__(self):
        super().__init__(4)
        self.a, self.b, self.twice = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(5, 5, 1)
        self.bare, self.up = nn.Conv2d(5, 4, 1), nn.Linear(4, 4)

    def features(self, x):
        both = F.relu(torch.cat([self.a(x), self.b(x)], dim=1))
        self.note("a", both[:, :3])
        self.note("b", both[:, 3:])
        x = self.note("twice", F.relu(self.twice(both)))
        x = self.note("twice", F.relu(self.twice(x)))
        return self.note("up", F.gelu(self.up(self.bare(x).mean((2, 3)))))


def test_every_kind_of_layer():
    """What no non-linearity follows has no sparsity."""
    _, reference = run(Mixed(), epochs=1)
    assert list(reference.history) == ["a", "b", "twice", "up"]
    assert_history(reference, {0: [0]})


def test_metric_is_there_from_the_start():
    """NaN before the first batch, then the mean over the layers."""
    callback, reference = run(epochs=1)
    assert np.isnan(reference.metric[0])
    mean = np.mean(list(reference.batches[0].values()))
    assert reference.metric[1:] == pytest.approx([mean] * 3, abs=1e-6)
    assert callback.state_key == "ActivationSparsity"


def test_broken_network_is_not_called_sparse():
    """All activations are NaN."""
    module = Plain()
    with torch.no_grad():
        module.first.bias.fill_(float("nan"))
    _, reference = run(module, epochs=1)
    assert np.isnan(reference.history["first"][0])


def test_chosen_layers_only():
    """Globs; a name that has no activation is no error, it just has no sparsity."""
    _, reference = run(options={"layers": ["s*", "fc"]}, epochs=2)
    assert list(reference.history) == ["second"]


class Save(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step - 1 == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Tail(DataLoader):
    """Goes on in the middle of an epoch, as Lightning asks of a loader that is to resume."""

    given = skip = 0

    def __iter__(self):
        self.given, self.skip, skip = self.skip, 0, self.skip
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.given += 1
                yield batch

    def state_dict(self):
        return {"given": self.given % len(self)}

    def load_state_dict(self, state):
        self.skip = state["given"]


@pytest.mark.parametrize("step", [0, 3, 8])
def test_resume_loses_no_sample(step, tmp_path, monkeypatch):
    """In the middle of an epoch, with samples that no report holds yet."""
    monkeypatch.setattr(activation_sparsity, "_SAMPLE_EVERY", 2)
    monkeypatch.setattr(activation_sparsity, "_SAMPLE_AT", 1)
    path = tmp_path / "a.ckpt"

    def train():
        return Tail(list(zip(*images(), strict=True)), batch_size=1)

    _, whole = run(train=train(), epochs=2, callbacks=[Save(step, path)])
    buffer = io.BytesIO()
    torch.save(torch.load(path, weights_only=True)["callbacks"]["ActivationSparsity"], buffer)
    _, resumed = run(train=train(), epochs=2, ckpt_path=path)
    assert resumed.history
    for layer, points in resumed.history.items():
        later = {at: value for at, value in whole.history[layer].items() if at > step}
        assert points == pytest.approx(later, abs=1e-6)
    assert not np.isnan(resumed.metric[0])


# ---------------------------------------------------------------------- maps


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to the renderer: (maps, image), in order."""
    pictures = []

    def draw(maps, image=None):
        pictures.append((maps.copy(), image))
        return np.zeros((4, 4, 3), dtype=np.uint8)

    monkeypatch.setattr(_activation_maps, "activation_grid", draw)
    return pictures


class Weights(pl.Callback):
    """Activations of the fixed samples by hand, when the maps are due: at the start and at the end of each epoch."""

    def __init__(self, pictures):
        self.pictures, self.maps = pictures, []

    def _note(self, module):
        with torch.no_grad():
            first = F.conv2d(self.pictures, module.first.weight, module.first.bias, padding=1).relu()
            second = F.conv2d(first, module.second.weight, module.second.bias).relu()
        for one, two in zip(first, second, strict=True):
            self.maps += [one.numpy(), two.numpy()]

    def on_train_start(self, trainer, module):
        self._note(module)

    def on_train_epoch_end(self, trainer, module):
        self._note(module)


@pytest.mark.parametrize("val", [False, True])
def test_maps_are_those_of_the_same_samples_throughout(val, drawn):
    """Of the validation set where there is one; with the weights of the moment; shuffling does not matter."""
    train = DataLoader(list(zip(*images(), strict=True)), batch_size=3, shuffle=True)
    expected = Weights(images(7, seed=int(val))[0][:2])
    run(
        train=train,
        val=loader(seed=1) if val else None,
        epochs=3,
        options={"maps": True, "num_samples": 2},
        callbacks=[expected],
    )
    assert len(drawn) == len(expected.maps) == 4 * 2 * 2
    for (maps, _), by_hand in zip(drawn, expected.maps, strict=True):
        assert np.allclose(maps, by_hand, atol=1e-6)
    shown = [image for _, image in drawn]
    assert all(np.array_equal(image, shown[0]) for image in shown[0::4])
    assert not np.array_equal(shown[0], shown[2])


def test_maps_of_a_slice_are_its_own(drawn):
    """Of a concatenation only the layer's own channels are shown."""
    run(Mixed(), epochs=1, options={"maps": True})
    assert [len(maps) for maps, _ in drawn[:3]] == [3, 2, 5]


class Flat(Watched):
    """One axis of positions, three, and none."""

    def __init__(self):
        super().__init__(4)
        self.one, self.three, self.none = nn.Conv1d(2, 3, 1), nn.Conv3d(3, 4, 1), nn.Linear(4, 4)

    def features(self, x):
        x = self.note("one", F.relu(self.one(x.flatten(2))))
        x = self.note("three", F.relu(self.three(x.unflatten(2, (4, 4, 4)))))
        return self.note("none", F.relu(self.none(x.mean((2, 3, 4)))))


def test_maps_of_any_number_of_axes(monkeypatch):
    """Sequences as they are, of volumes the slice in the middle; what has no positions is left out."""
    shapes = []

    def draw(maps, image=None):
        shapes.append(maps.shape)
        return activation_grid(maps, image)

    monkeypatch.setattr(_activation_maps, "activation_grid", draw)
    _, reference = run(Flat(), epochs=1, options={"maps": True})
    assert list(reference.history) == ["one", "three", "none"]
    assert shapes == [(3, 64), (4, 4, 4)] * 2


def test_no_maps_where_none_are_wanted(drawn):
    """Numbers only."""
    run(epochs=1, options={"maps": True})
    assert len(drawn) == 4
    drawn.clear()
    _, reference = run(epochs=1)
    assert drawn == []
    assert list(reference.history) == ["first", "second"]


class NoForward(Plain):
    """Images are not what its forward takes."""

    def forward(self, pictures, mask):
        return super().forward(pictures * mask)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], 1.0), batch[1])


def test_model_that_can_not_be_called_with_images_keeps_its_numbers(drawn):
    """Said once, with the reason."""
    with pytest.warns(InterpWarning, match=r"no pictures to show.*TypeError.*mask") as said:
        _, reference = run(NoForward(), epochs=2, options={"maps": True})
    assert len([warning for warning in said if warning.category is InterpWarning]) == 1
    assert drawn == []
    assert list(reference.history) == ["first", "second"]


def test_precision_of_the_weights(drawn):
    """The samples have the type of the weights, and the numbers are right in half precision too."""
    _, reference = run(epochs=1, precision="bf16-true", options={"maps": True})
    assert len(drawn) == 4
    assert_history(reference, {0: [0]})


def test_run_is_the_same_with_and_without():
    """Batch statistics and dropout: bit for bit."""

    class Noisy(Plain):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def features(self, x):
            x = F.dropout(self.norm(F.relu(self.first(x))), 0.5, self.training)
            return F.relu(self.second(x)).mean((2, 3))

    states = []
    for callbacks in ([], [ActivationSparsity(on_error="raise", num_samples=3)]):
        torch.manual_seed(0)
        module = Noisy()
        fit(module, *callbacks, val=loader(4), epochs=2)
        states.append({**module.state_dict(), "generator": torch.get_rng_state()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"maps": 1}, "`maps`.*True or False.*1"),
        ({"num_samples": 0}, "`num_samples`.*positive integer.*0"),
        ({"every_n_epochs": 0}, "`every_n_epochs`.*positive integer or None.*0"),
        ({"every_n_epochs": 1, "every_n_train_steps": 1}, "`every_n_epochs` and `every_n_train_steps` exclude"),
        ({"layers": "first"}, "`layers`.*list of strings.*'first'"),
        ({"max_layers": True}, "`max_layers`.*positive integer.*True"),
        ({"on_error": "stop"}, "`on_error`.*'warn', 'raise'.*'stop'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, match):
    """Named, with what was expected and what came."""
    with pytest.raises(ArgumentError, match=match):
        ActivationSparsity(**options)


def test_unknown_layer_is_refused_before_training():
    """With a suggestion."""
    with warnings.catch_warnings(), pytest.raises(ArgumentError, match=r"'frst'.*Did you mean 'first'"):
        fit(Plain(), ActivationSparsity(layers=["frst"]))


class Namesake(Plain):
    """Logs a number of its own under a name that is ours."""

    def training_step(self, batch, batch_idx):
        self.log("interp/sparsity_mean", 7.0)
        return super().training_step(batch, batch_idx)


class Seen(pl.Callback):
    """What EarlyStopping would see."""

    def __init__(self):
        self.metric = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.metric.append(trainer.callback_metrics["interp/sparsity_mean"].item())

    def on_train_epoch_end(self, trainer, module):
        self.metric.append(trainer.callback_metrics["interp/sparsity_mean"].item())


def test_a_metric_of_the_users_stays_where_ours_has_the_same_name():
    """From the moment it is there, and it is said once."""
    seen = Seen()
    with pytest.warns(InterpWarning) as caught:
        fit(Namesake(), ActivationSparsity(maps=False, on_error="raise"), seen, max_epochs=2)
    assert seen.metric
    assert set(seen.metric) == {7.0}
    (said,) = [str(each.message) for each in caught if each.category is InterpWarning]
    assert "'interp/sparsity_mean' is logged by the model or another callback: ActivationSparsity leaves it" in said


def test_ours_of_an_earlier_fit_is_not_taken_for_a_metric_of_the_users():
    """The same Trainer, trained on."""
    seen = Seen()
    callbacks = [ActivationSparsity(maps=False, on_error="raise"), seen]
    trainer = fit(Plain(), *callbacks, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit_loop.max_epochs = 2
        trainer.fit(Plain(), loader())
    assert [each for each in caught if each.category is InterpWarning] == []
    assert len(set(seen.metric)) > 1
