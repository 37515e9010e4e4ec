"""Nothing is kept: no activation, gradient or batch outlives its batch, and no state grows with the epochs."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_interp.callbacks.session import Session
from lightning_interp.functional.lifelines import MAX_EVENTS, Lifelines
from lightning_interp.render.strip import MAX_FRAMES, FilmStrip
from lightning_interp.rules import AlertBook, History, Point, Series, default_rules
from lightning_interp.rules.book import KEPT
from tests.contract.factories import ALL
from tests.contract.lifetimes import Lifetimes, live_bytes
from tests.contract.nets import Capture, Net, loader, pl, quiet_trainer, seed_all
from tests.rules.writing import healthy, write


def _alive_after(callbacks, *, samples=18):
    seed_all(3)
    lifetimes = Lifetimes()
    trainer = quiet_trainer(callbacks=[lifetimes, *callbacks], max_epochs=2, logger=Capture())
    trainer.fit(Net(), loader(samples), loader(6, seed=1, shuffle=False))
    assert {"activation", "gradient", "batch"} <= lifetimes.noted.keys()
    return lifetimes.alive


@pytest.mark.parametrize("name", ALL)
def test_nothing_of_a_batch_outlives_it(name):
    """Every layer's output, every gradient and every batch, in the user's forwards and in those of the callbacks."""
    assert _alive_after(ALL[name]()) == []


class KeepsAnActivation(pl.Callback):
    """By a hook, as a slice without a graph."""

    def setup(self, trainer, pl_module, stage):
        pl_module.net[2].register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.kept = output.detach()[:1]


class KeepsABatch(pl.Callback):
    """Only the labels."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kept = batch[1]


class KeepsAGradient(pl.Callback):
    """Of an activation."""

    def setup(self, trainer, pl_module, stage):
        pl_module.net[4].register_full_backward_hook(self._keep)

    def _keep(self, module, inputs, outputs):
        self.kept = inputs[0].detach()


@pytest.mark.parametrize("guilty", [KeepsAnActivation, KeepsABatch, KeepsAGradient])
def test_what_is_kept_is_found(guilty):
    """Negative controls."""
    assert _alive_after([guilty()]) != []


def test_without_callbacks_nothing_is_kept():
    """Lightning itself lets go, so what is found is ours."""
    assert _alive_after([]) == []


# ---------------------------------------------------------------------- no state grows with the epochs


def _history(epochs, layers=("a", "b"), steps=10):
    """What the measuring callbacks record in so many epochs."""
    history = History()
    for step in range(epochs * steps):
        history.record("loss", 2.0 / (1 + step), step=step)
        history.record_peak("loss_peak", 2.0 / (1 + step), step=step)
        if step % 5 == 0:
            for layer in layers:
                history.record("update_norm", 0.1, step=step, layer=layer)
        if step % steps == 0:
            for layer in layers:
                history.record("dead_fraction", 0.0, step=step, layer=layer)
                history.note("num_filters", 8, layer=layer)
            history.note("label_anchors", step)
    return history


def test_a_history_is_no_larger_after_three_times_the_epochs():
    """From 1500 epochs to 4500; between two merges the number of points doubles."""
    short, long = _history(1500), _history(4500)
    assert len(long.series) == len(short.series)
    assert len(long.facts) == len(short.facts)
    assert len(pickle.dumps(long.state_dict())) < 2 * len(pickle.dumps(short.state_dict()))


class Unbounded(Series):
    """Lets everything wait, as long as it takes."""

    def append(self, step, value):
        series = Series(self.points, self.head, self.capacity, self._stride, self._pending)
        series.capacity = 10**9  # nothing is folded
        series.append(step, value)
        self._pending = series._pending
        if len(self.points) > self.capacity:
            late = self.points[self.head :]
            pairs = [late[i : i + 2] for i in range(0, len(late), 2)]
            self.points[self.head :] = [Point(pair[-1].step, sum(p.value for p in pair) / len(pair)) for pair in pairs]
            self._stride *= 2


@pytest.mark.parametrize("count", [15, 100, 3_000, 100_000])
def test_a_series_of_any_length_is_bounded_and_its_points_are_those_of_an_unbounded_one(count):
    """Small bounds, so that what would wait is longer than they are, a thousand times over."""
    series, most, other = Series(head=4, capacity=16), 0, Unbounded(head=4, capacity=16)
    for step in range(count):
        series.append(step, float(step % 7))
        other.append(step, float(step % 7))
        most = max(most, len(series))
    assert most <= 2 * series.capacity + 1
    assert series.steps == sorted(series.steps)
    assert series.last.step == count - 1
    assert len(series.steps) == len(series.values) == len(series)
    assert [point.step for point in series.points] == [point.step for point in other.points]
    assert [p.value for p in series.points] == pytest.approx([p.value for p in other.points], rel=1e-9)
    weights = [series._folded, *(1 for _ in series._pending[1:])]
    waiting = sum(weight * point.value for weight, point in zip(weights, series._pending, strict=False))
    assert waiting == pytest.approx(sum(point.value for point in other._pending))


def test_a_series_goes_on_after_a_resume_as_if_there_had_been_none():
    """With points that wait, and an average among them."""
    history = History(series={("loss", None): Series(head=4, capacity=16)})
    for step in range(5000):
        history.record("loss", step % 11, step=step)
    restored = History()
    restored.load_state_dict(pickle.loads(pickle.dumps(history.state_dict())))
    assert history.series["loss", None]._folded > 1
    assert restored.series["loss", None] == replace(history.series["loss", None], head=128, capacity=1024)


def test_a_look_keeps_nothing_of_what_it_worked_out():
    """The notes of a look go with it."""
    history = healthy()
    before = len(pickle.dumps(history))
    book = AlertBook(default_rules())
    for _ in range(3):
        book.update(history)
    assert len(pickle.dumps(history)) == before


def test_filters_that_die_and_revive_for_ever_fill_a_bounded_list():
    """A thousand windows in which 64 filters flicker: 64,000 events, of which the newest are kept."""
    lines = Lifelines()
    for window in range(1000):
        lines.update("conv", range(64) if window % 2 else (), step=window, first=window == 0)
    assert len(lines.events) == MAX_EVENTS
    assert lines.events[-1].until == 999


def test_alerts_that_come_and_go_for_ever_fill_a_bounded_list():
    """A layer whose filters die and revive in every other window."""
    book = AlertBook(default_rules())
    for window in range(KEPT + 100):
        dead = write(History(), "dead_fraction", [0.9 * (window % 2)] * 2, layer="conv", start=window)
        assert len(book.update(dead)) == (window > 0)
    assert len(book.history) == KEPT
    assert len(book.active) <= 1


def test_a_film_strip_of_a_thousand_epochs_holds_sixteen_pictures():
    """And its state is no larger than after sixteen."""
    strip, sizes = FilmStrip(), {}
    noise = np.random.default_rng(0)
    for epoch in range(1000):
        strip.push(epoch, noise.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        sizes[epoch] = len(pickle.dumps(strip.state_dict()))
    assert len(strip.steps) == MAX_FRAMES
    assert sizes[999] <= 1.05 * sizes[15]


FEW, MANY = 36, 56  # epochs of one step: strips are full after sixteen looks, one in two epochs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("often", "Interp", "EmbeddingProjection_tsne")])
def test_the_state_of_a_callback_is_no_larger_after_more_epochs(name):
    """What lies in its checkpoint and in memory, without the history of numbers, whose bound lies further out."""
    sizes, live = {}, {}

    class Sizes(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            own = [callback for callback in trainer.callbacks if callback is not self]
            states = [callback.state_dict() for callback in own]
            for state in states:
                _forget_numbers(state)
            sizes[trainer.current_epoch + 1] = len(pickle.dumps(states))
            beside = [trainer, *trainer.loggers, *pl_module.modules(), Session.of(trainer).history]
            live[trainer.current_epoch + 1] = live_bytes(own, beside)

    seed_all(3)
    trainer = quiet_trainer(callbacks=[*ALL[name](), Sizes()], max_epochs=MANY, logger=Capture())
    trainer.fit(Net(), loader(6), loader(6, seed=1, shuffle=False))
    assert sizes[MANY] <= 1.1 * sizes[FEW] + 2000
    assert live[MANY] <= 1.2 * live[FEW] + 2000


def _forget_numbers(state):
    """Empties the history of a state in place; the bound of that is tested above."""
    for key, value in state.items() if isinstance(state, dict) else []:
        if key == "history" and isinstance(value, dict):
            value["series"] = []
        else:
            _forget_numbers(value)


def test_sampled_sparsity_is_summed_up_and_not_collected():
    """However many batches an epoch has, one vector a layer waits for its end."""
    from lightning_interp import ActivationSparsity

    seed_all(3)
    sparsity, sizes = ActivationSparsity(every_n_epochs=1, maps=False, on_error="raise"), []
    sparsity._sampled = lambda trainer, batch_idx: True

    class Sizes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            tensors = [part for value in sparsity._zeros.values() for part in value]
            sizes.append(sum(part.numel() for part in tensors if isinstance(part, torch.Tensor)))

    trainer = quiet_trainer(callbacks=[sparsity, Sizes()], max_epochs=1)
    trainer.fit(Net(), loader(48), None)
    assert len(sizes) == 8
    assert sizes[1] == sizes[-1] > 0
