"""Births, deaths and revivals, through checkpoints too; dormancy; and what it costs."""

from __future__ import annotations

import copy
import io

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.lifelines import FilterEvent
from tests.callbacks.watched import Plain, Watched, check, fit, images, loader, scores


class Script(pl.Callback):
    """Silences and wakes filters of the first layer at given steps, after the batch."""

    def __init__(self, **by_step):
        self.by_step = {int(step[1:]): biases for step, biases in by_step.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with torch.no_grad():
            for index, bias in self.by_step.get(trainer.global_step - 1, {}).items():
                module.first.bias[index] = bias


def plain():
    """Learns nothing; filter 0 of the first layer is dead, the others are alive."""
    torch.manual_seed(0)
    module = Plain(rate=0.0)
    with torch.no_grad():
        module.first.bias.copy_(torch.tensor([-9.0, 3.0, 3.0, 3.0]))
        module.second.bias.fill_(9.0)
    return module


SCRIPT = {"s2": {1: -9.0}, "s4": {2: -9.0}, "s8": {0: 3.0, 1: 3.0}, "s9": {0: -9.0}}
# Three batches an epoch, so epochs end with the steps 2, 5, 8, 11; the script acts after a step. Filter 2 fires at the
# steps 3 and 4 before it is silenced, so a training epoch sees it alive once more, and a validation run does not.
TRAIN_EVENTS = [
    ("first", 0, "born_dead", -1, 0),
    ("first", 1, "died", 2, 5),
    ("first", 2, "died", 5, 8),
    ("first", 0, "revived", 8, 11),
    ("first", 1, "revived", 8, 11),
]
VAL_EVENTS = [
    ("first", 0, "born_dead", -1, 0),
    ("first", 1, "died", 0, 2),
    ("first", 2, "died", 2, 5),
    ("first", 0, "revived", 5, 8),
    ("first", 1, "revived", 5, 8),
    ("first", 0, "died", 8, 11),
]


def events(callback):
    return [(event.layer, event.filter, event.kind, event.after, event.until) for event in callback.events]


@pytest.mark.parametrize(("split", "expected"), [("train", TRAIN_EVENTS), ("val", VAL_EVENTS)])
def test_filters_are_born_dead_die_and_revive(split, expected):
    """Each event with the last step before it and the step at which it was seen."""
    watcher, windows = check(plain(), split=split, val=loader(4), epochs=4, callbacks=[Script(**SCRIPT)])
    assert events(watcher) == expected
    assert watcher.events[0] == FilterEvent("first", 0, "born_dead", -1, 0)
    assert windows[-1][3]["first"] == ([2] if split == "train" else [0, 2])
    assert watcher.lifelines.born_dead("first") == [0]
    assert watcher.lifelines.revived("first") == [0, 1]
    died = {2: (5, 8)} if split == "train" else {0: (8, 11), 2: (2, 5)}
    assert watcher.lifelines.died_between("first") == died


def test_the_share_that_was_dead_ever_since_is_kept_for_the_rules():
    """One of four is born dead, and revived after step 8; what dies later never counts."""
    shares = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            series = Session.of(trainer).history.get("born_dead_fraction", "first")
            shares.extend(zip(series.steps, series.values, strict=True))

    check(plain(), split="train", val=loader(4), epochs=4, callbacks=[Script(**SCRIPT), Look()])
    assert shares == [(0, 0.25), (2, 0.25), (5, 0.25), (8, 0.25), (11, 0.0)]


def test_filters_that_were_pruned_are_not_born_dead():
    """The layer that they are taken from may lose others later, and then the initialisation is not to blame."""
    module, shares = plain(), []
    prune.custom_from_mask(
        module.first, "weight", torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(4, 1, 1, 1).expand_as(module.first.weight)
    )
    prune.custom_from_mask(module.first, "bias", torch.tensor([1.0, 0.0, 0.0, 1.0]))

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            history = Session.of(trainer).history
            shares.extend(history.get(name, "first").last.value for name in ("dead_fraction", "born_dead_fraction"))

    check(module, split="train", val=loader(4), epochs=1, callbacks=[Look()])
    assert shares == [0.75, 0.25]


class Save(pl.Callback):
    """Keeps a checkpoint at a step, from one of Lightning's hooks."""

    def __init__(self, hook, step, path):
        self.step, self.path = step, path
        setattr(self, hook, self._save)

    def _save(self, trainer, *_):
        if trainer.global_step - 1 == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Resumable(DataLoader):
    """In order; remembers how many batches it has given, as Lightning asks of a loader that is to resume."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.given = self.skip = 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        self.given = skip
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.given += 1
                yield batch

    def state_dict(self):
        return {"given": self.given % len(self)}

    def load_state_dict(self, state):
        self.skip = state["given"]


def _resumable():
    return Resumable(TensorDataset(*images()), batch_size=3)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_epoch_end", 2),  # at an epoch boundary
        ("on_train_epoch_end", 8),
        ("on_train_batch_end", 0),  # right after the first window
        ("on_train_batch_end", 4),  # in the middle of an epoch
        ("on_train_batch_end", 7),
        ("on_validation_end", 5),  # where ModelCheckpoint saves: the training epoch has not ended
    ],
)
def test_resume_goes_on_as_if_nothing_had_been(split, hook, step, tmp_path):
    """Same events as the uninterrupted run: nothing is repeated, nothing lost."""
    options = {"val": loader(4), "epochs": 4}
    whole = DeadFilters(split=split, on_error="raise")
    path = tmp_path / "a.ckpt"
    fit(plain(), whole, Script(**SCRIPT), Save(hook, step, path), train=_resumable(), **options)
    assert events(whole) == (TRAIN_EVENTS if split == "train" else VAL_EVENTS)
    resumed = DeadFilters(split=split, on_error="raise")
    fit(plain(), resumed, Script(**SCRIPT), train=_resumable(), ckpt_path=path, **options)
    assert events(resumed) == events(whole)
    assert resumed.dead == whole.dead
    assert resumed.lifelines.state_dict() == whole.lifelines.state_dict()


def test_resume_after_the_last_batch_of_an_epoch(tmp_path):
    """Before the epoch has ended: Lightning goes on with the next one, and the window of this one is not lost."""
    whole, resumed = DeadFilters(on_error="raise"), DeadFilters(on_error="raise")
    path = tmp_path / "a.ckpt"
    fit(plain(), whole, Script(**SCRIPT), Save("on_train_batch_end", 5, path), train=_resumable(), epochs=4)
    fit(plain(), resumed, Script(**SCRIPT), train=_resumable(), ckpt_path=path, epochs=4)
    assert events(whole) == events(resumed) == TRAIN_EVENTS


def test_callback_that_joins_a_resumed_run_saw_no_birth(tmp_path):
    """A filter that is dead then died some time before, and is not called born dead."""
    path = tmp_path / "a.ckpt"
    fit(plain(), Save("on_train_epoch_end", 2, path), train=_resumable(), epochs=1)
    late = DeadFilters(on_error="raise")
    fit(plain(), late, train=_resumable(), ckpt_path=path, epochs=2)
    assert events(late) == [("first", 0, "died", -1, 3)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_state_survives_a_file(split, tmp_path):
    """Plain Python and tensors: `weights_only` loads it, and what is loaded gives the same state again."""
    watcher = DeadFilters(split=split, on_error="raise")
    path = tmp_path / "a.ckpt"
    fit(plain(), watcher, Script(**SCRIPT), Save("on_train_batch_end", 4, path), val=loader(4), epochs=4)
    for state in (watcher.state_dict(), torch.load(path, weights_only=True)["callbacks"]["DeadFilters"]):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        other = DeadFilters(split=split)
        other.load_state_dict(copy.deepcopy(loaded))
        assert other.lifelines.state_dict() == state["lifelines"]
        assert set(loaded) == set(state)
        assert loaded["window"]["forwards"] == state["window"]["forwards"]


def test_two_instances_keep_states_of_their_own():
    """Told apart by `name`; without one the second would overwrite the first, which Lightning refuses."""
    callbacks = [DeadFilters(split="train"), DeadFilters(split="val", name="val")]
    assert [callback.state_key for callback in callbacks] == ["DeadFilters", "DeadFilters[val]"]
    fit(plain(), *callbacks, Script(**SCRIPT), val=loader(4), epochs=4)
    assert events(callbacks[0]) == TRAIN_EVENTS
    assert events(callbacks[1]) == VAL_EVENTS


class Graded(Watched):
    """GELU behind a convolution over some steps; filters of very different strength."""

    def __init__(self):
        super().__init__(4, rate=0.5)
        self.conv, self.relu = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.conv.weight *= torch.tensor([1.0, 0.3, 0.02, 1e-4]).view(-1, 1, 1, 1)
            self.conv.bias.zero_()

    def features(self, x):
        x = self.note("conv", F.gelu(self.conv(x)), zero=False)
        return self.note("relu", F.relu(self.relu(x))).mean((2, 3))


class Dormancy(pl.Callback):
    """Scores by the formula over everything that the training forwards of an epoch gave."""

    def __init__(self):
        self.notes, self.expected, self.found = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.notes += module.book
        module.book = []

    def on_train_epoch_end(self, trainer, module):
        self.expected.append((scores(self.notes, "conv") <= 0.1).double().mean().item())
        self.found.append(Session.of(trainer).history.get("dormant_fraction", "conv").values[-1])
        self.notes = []


def test_dormant_fraction_equals_brute_force_over_whole_windows():
    """All batches of the window count, also the smaller last one; the ReLU layer has none, since it has exact zeros."""
    torch.manual_seed(0)
    module, watcher, reference = Graded(), DeadFilters(dormant_threshold=0.1, on_error="raise"), Dormancy()
    runner = fit(module, watcher, reference, Listen(), epochs=3)
    assert reference.found == reference.expected
    assert len(set(reference.expected)) > 1
    assert runner.current_epoch == 3


class Listen(pl.Callback):
    """That a layer behind ReLU has no dormancy."""

    def on_train_end(self, trainer, module):
        assert Session.of(trainer).history.layers("dormant_fraction") == ["conv"]


class Costs(pl.Callback):
    """Which layers carry a hook, and how many modes listen, at points of each training step.

    None does before the first layer is called: a compiled function that found one would be compiled anew for it.
    """

    def __init__(self):
        self.forward, self.later = [], []

    @staticmethod
    def _now(module):
        hooked = [n for n, m in module.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        return hooked, torch._C._len_torch_function_stack()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.forward.append(self._now(module))

    def on_before_backward(self, trainer, module, loss):
        self.later.append(self._now(module))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.later.append(self._now(module))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.forward.append(self._now(module))


ALL, NOTHING = (["fc", "first", "second"], 0), ([], 0)


def test_nothing_is_on_the_model_once_all_filters_are_proven():
    """One batch of each window is read, in the forward alone; then there is no hook and no mode."""
    module = plain()
    with torch.no_grad():
        module.first.bias[0] = 3.0
    costs = Costs()
    fit(module, DeadFilters(split="train", on_error="raise"), costs)
    assert costs.forward == [ALL, NOTHING, NOTHING] * 2
    assert set(map(str, costs.later)) == {str(NOTHING)}


def test_only_layers_with_suspects_are_followed():
    """Filter 0 of the first layer is dead: the second layer is left alone."""
    costs = Costs()
    fit(plain(), DeadFilters(split="train", on_error="raise"), costs)
    assert costs.forward == [ALL, (["first"], 0), (["first"], 0)] * 2
    assert set(map(str, costs.later)) == {str(NOTHING)}


def test_validation_windows_leave_training_alone():
    """After the first update the training batches are free."""
    costs = Costs()
    fit(plain(), DeadFilters(on_error="raise"), costs, val=loader(4, batch_size=1), epochs=1, num_sanity_val_steps=0)
    assert costs.forward == [ALL, NOTHING, NOTHING, ALL, *[(["first"], 0)] * 3]


def test_two_callbacks_share_their_hooks():
    """One hook before and one after each layer, however many read it."""
    counts = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            counts.append(len(module.first._forward_hooks))

    fit(plain(), DeadFilters(split="train"), DeadFilters(split="train", name="again"), Count())
    assert set(counts) == {1}


def test_metrics_are_there_from_the_start_and_follow_the_windows():
    """Zero before anything is known, then what the last window found."""
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(trainer.callback_metrics["interp/dead_filters"].item())

        def on_train_epoch_end(self, trainer, module):
            metrics = trainer.callback_metrics
            seen.append([metrics[f"interp/{name}"].item() for name in ("dead_filters", "dead_fraction_max")])

    fit(plain(), DeadFilters(), Script(**SCRIPT), Look(), val=loader(4), epochs=4)
    assert seen == [0.0, [2.0, 0.5], [3.0, 0.75], [1.0, 0.25], [2.0, 0.5]]
