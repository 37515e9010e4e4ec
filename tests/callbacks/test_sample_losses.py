"""The mean loss of each sample over a run, against a loop over every sample of every batch."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler

from lightning_interp.callbacks import _sample_losses
from lightning_interp.callbacks._sample_losses import SampleLosses
from lightning_interp.callbacks._sample_order import SampleOrder
from lightning_interp.callbacks._sample_sums import Merged, Since
from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.training_dynamics import TrainingDynamics
from lightning_interp.functional.hooks import QuietHook
from tests.callbacks.losses_kit import CHATTER, CLASSES, Collector, Numbered, differences, draws, kit, numbered
from tests.callbacks.two_ranks import run_two_ranks
from tests.contract import nets as contract_nets
from tests.contract.battery import Recipe, assert_undisturbed
from tests.contract.nets import Capture, quiet_trainer, seed_all

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]
pl, Net, fit = kit().pl, kit().Net, kit().fit
CLOSE = 2e-6  # float32 scores, losses up to about 10


def collect(model=None, loader=None, collector=None, **options):
    model, collector = model or Net(), collector or Collector()
    fit(model, loader or numbered(), collector, **options)
    return model, collector


def assert_equal(model, collector):
    """What was collected is what the model noted itself, for each index."""
    assert (collector.order.reason, collector.losses.reason) == (None, None)
    scores = collector.losses.means()
    assert max(differences(scores, model.seen)) < CLOSE
    assert scores.counts.sum() == sum(len(noted) for noted in model.seen.values()) > 0


# ---------------------------------------------------------------------- equal to brute force


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_means_are_those_of_a_loop_over_the_samples(namespace, workers):
    """Per index: loss, margin, the class that won last, and how often."""
    model, collector = kit(namespace).Net(), Collector()
    kit(namespace).fit(model, numbered(num_workers=workers), collector, max_epochs=3)
    assert_equal(model, collector)
    scores = collector.losses.means()
    assert scores.counts.tolist() == [3] * 23
    assert scores.labels.tolist() == Numbered().labels.tolist()
    assert 0 < (scores.suggested >= 0).sum() < 23


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3, "max_epochs": 4},
        {"val_check_interval": 0.5, "val": numbered(6, shuffle=False)},
        {"precision": "64-true"},
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),  # the same in each process
)
def test_the_means_are_right_in_every_loop(options):
    """Each batch counts once."""
    assert_equal(*collect(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"drop_last": True},
        {"batch_size": None, "shuffle": False, "sampler": torch.utils.data.BatchSampler(range(23), 4, drop_last=False)},
        {"shuffle": False, "sampler": RandomSampler(range(23), replacement=True, num_samples=60)},
    ],
    ids=["drop_last", "batch_size=None", "with replacement"],
)
def test_the_means_are_right_for_every_loader(options):
    """Also where a sample comes twice in one batch, or never."""
    assert_equal(*collect(loader=numbered(**options)))


def test_half_precision_scores_are_added_up_in_single_precision():
    """The same as the loop over the same scores."""

    class Half(Net):
        def training_step(self, batch, batch_idx):
            with torch.autocast("cpu", torch.bfloat16):
                scores = self.net(batch[0])
            assert scores.dtype is torch.bfloat16
            self.note(scores, *batch[1:])
            return F.cross_entropy(scores.float(), batch[1])

    assert_equal(*collect(Half(lr=1.0)))


def test_scores_that_the_step_writes_over_are_those_of_the_head():
    """And labels that it writes over are those of the batch."""

    class Writes(Net):
        def training_step(self, batch, batch_idx):
            scores = self.net(batch[0])
            self.note(scores, *batch[1:])
            loss = F.cross_entropy(scores * 1.0, batch[1].clone())
            with torch.no_grad():
                scores.zero_()
                batch[1].fill_(0)
            return loss

    assert_equal(*collect(Writes()))


def test_the_first_forward_counts_where_the_step_repeats_it():
    """Activation checkpointing runs it again in the backward, LBFGS calls the whole step again."""

    class Checkpointed(Net):
        def training_step(self, batch, batch_idx):
            scores = torch.utils.checkpoint.checkpoint(self.net, batch[0], use_reentrant=False)
            self.note(scores, *batch[1:])
            return F.cross_entropy(scores, batch[1])

    assert_equal(*collect(Checkpointed()))

    class Repeats(Net):
        def training_step(self, batch, batch_idx):
            scores = self.net(batch[0])
            if batch_idx not in self.done:
                self.note(scores, *batch[1:])
                self.done.add(batch_idx)
            return F.cross_entropy(scores, batch[1])

        def on_train_epoch_start(self):
            self.done = set()

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    assert_equal(*collect(Repeats()))


def test_a_forward_of_another_callback_is_not_the_steps():
    """Before the step in eval mode, after the backward in whatever mode."""

    class Other(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.eval()
            pl_module.net(batch[0])
            pl_module.train()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.net(batch[0])

    model, collector = Net(), Collector()
    fit(model, numbered(), collector, Other())
    assert_equal(model, collector)


def test_a_head_behind_a_compiled_body_is_read():
    """Only what is inside of a compiled part can't be."""

    class Body(Net):
        def __init__(self):
            super().__init__()
            self.net[0] = torch.compile(self.net[0], backend="eager")

    assert_equal(*collect(Body()))


def test_what_has_no_finite_loss_is_left_out():
    """Labels that are no class, scores that are NaN or infinite: they spoil no mean."""
    loader = numbered()
    loader.dataset.labels[:4] = torch.tensor([-100, -1, CLASSES, 99])
    loader.dataset.images[4] = torch.nan
    loader.dataset.images[5] = torch.inf

    class Notes(Net):
        def training_step(self, batch, batch_idx):
            self.note(self.net(batch[0]), *batch[1:])

    model, collector = collect(Notes(), loader)
    assert_equal(model, collector)
    assert collector.losses.means().counts.tolist() == [0] * 6 + [2] * 17


def test_the_sums_hold_over_a_thousand_batches():
    """Closed form, added in single precision: 1,000 times the same loss."""
    since, merged = Since.empty(2, torch.device("cpu")), Merged.empty(2)
    scores = torch.tensor([[0.3, 0.0, -1.0], [0.0, 2.0, 0.1]])
    at, labels = torch.tensor([1, 0]), torch.tensor([0, 2])
    for batch in range(1000):
        since.add(at, labels, scores, batch)
    assert merged.add(since) is False
    found = merged.scores()
    expected = F.cross_entropy(scores.double(), labels, reduction="none").flip(0)
    torch.testing.assert_close(found.losses, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(found.margins, torch.tensor([-1.9, 0.3], dtype=torch.float64), rtol=2e-5, atol=0)
    assert (found.suggested.tolist(), found.counts.tolist()) == ([1, -1], [1000, 1000])


# ---------------------------------------------------------------------- what can't be collected


class Twice(Net):
    """Two views."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) + self.net(-batch[0]), batch[1])


class Stacked(Net):
    """Two views in one forward."""

    def training_step(self, batch, batch_idx):
        one, two = self.net(torch.cat([batch[0], -batch[0]])).chunk(2)
        return F.cross_entropy(one + two, batch[1])


class Functional(Net):
    """The weights of the head, and not the head."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(self.net[:2](batch[0]), self.net[2].weight), batch[1])


class Soft(Net):
    """Labels as probabilities."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), self.interp_batch(batch)[1])

    def interp_batch(self, batch):
        return batch[0], F.one_hot(batch[1], CLASSES).float()


class Unlabelled(Soft):
    """No labels at all."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def interp_batch(self, batch):
        return batch[0], None


class OneScore(Net):
    """One score for two classes."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.net(batch[0]).squeeze(1), (batch[1] > 1).float())


class Lambda(Net):
    """A compiled function, in one graph: the hook is not in it, and does not break it."""

    def training_step(self, batch, batch_idx):
        scores = torch.compile(lambda images: self.net(images), backend="eager", fullgraph=True)(batch[0])
        return F.cross_entropy(scores, batch[1])


class Compiled(Net):
    """Compiled whole, in place."""

    def __init__(self):
        super().__init__()
        self.net.compile(backend="eager")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice, "called the head more than once"),
        (Stacked, r"scores \((5|3), classes\) are needed"),
        (Functional, "no training step called the head"),
        (Soft, "one integer a sample"),
        (Unlabelled, "hold no labels"),
        (OneScore, "two classes or more"),
        (Compiled, "is compiled"),
        (Lambda, "no training step called the head"),
    ],
)
def test_what_can_not_be_collected_is_said(model, reason):
    """Nothing is collected then, and the training runs."""
    _, collector = collect(model())
    assert re.search(reason, collector.losses.reason)
    assert collector.losses.means().counts.sum() == 0


def test_a_batch_with_nothing_to_read_is_said():
    """In the words of whoever reads batches."""

    class Wrapped(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["odd"], batch_idx)

    _, collector = collect(Wrapped(), {"odd": numbered()})
    assert "interp_batch" in collector.losses.reason


def test_too_large_a_data_set_is_said(monkeypatch):
    """The buffers would take 24 bytes a sample on the device."""
    monkeypatch.setattr(_sample_losses, "MOST_SAMPLES", 22)
    _, collector = collect()
    assert "23 samples; at most 22" in collector.losses.reason
    assert len(collector.losses.means().counts) == 0


def test_samples_in_another_order_than_their_indices_are_noticed():
    """A collate_fn that sorts by label drops none; but the label under an index changes from epoch to epoch."""

    def by_label(samples):
        return torch.utils.data.default_collate(sorted(samples, key=lambda sample: int(sample[1])))

    _, collector = collect(loader=numbered(collate_fn=by_label))
    assert "under the same index with other labels" in collector.losses.reason
    _, within = collect(loader=numbered(collate_fn=by_label), collector=Late(), max_epochs=3)
    assert "under the same index with other labels" in within.losses.reason


class Late(Collector):
    """Puts the sums together at the end only."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == trainer.max_epochs - 1:
            super().on_train_epoch_end(trainer, pl_module)


def test_a_sample_whose_label_was_corrected_starts_anew(tmp_path):
    """Its history was that of the other label."""
    path, data = tmp_path / "two.ckpt", Numbered()
    model, collector = Net(lr=0.0), Collector()
    trainer = fit(model, DataLoader(data, batch_size=5), collector, max_epochs=2)
    trainer.save_checkpoint(path)
    data.labels[6] = (data.labels[6] + 1) % CLASSES
    again, resumed = Net(lr=0.0), Collector()
    fit(again, DataLoader(data, batch_size=5), resumed, max_epochs=3, ckpt_path=path)
    assert resumed.losses.reason is None
    scores = resumed.losses.means()
    assert scores.counts.tolist() == [1 if index == 6 else 3 for index in range(23)]
    assert max(differences(scores, {i: n * (1 if i == 6 else 3) for i, n in again.seen.items()})) < CLOSE


# ---------------------------------------------------------------------- resume and ranks


class Save(pl.Callback):
    """Saves after the second batch of the second epoch; remembers what had been noted by then."""

    def __init__(self, path):
        self.path, self.seen = path, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(self.path)
            self.seen = copy.deepcopy(pl_module.seen)


def test_a_resume_in_mid_epoch_goes_on(tmp_path):
    """Nothing is lost, nothing counts twice, and the file needs no class of ours."""
    save = Save(tmp_path / "middle.ckpt")
    first = Net()
    fit(first, numbered(), Collector(), save, max_epochs=2)
    state = torch.load(save.path, weights_only=True)["callbacks"]["Collector"]
    assert state["size"] == 23
    assert state["since"]["counts"].sum() == 10
    second, collector = Net(), Collector()
    fit(second, numbered(), collector, ckpt_path=save.path, max_epochs=3)
    joined = {index: save.seen.get(index, []) + second.seen.get(index, []) for index in range(23)}
    assert second.seen
    assert max(differences(collector.losses.means(), joined)) < CLOSE


def test_a_state_of_another_data_set_is_left():
    """Its indices meant other samples."""
    _, collector = collect(loader=numbered(9))

    class Loaded(Collector):
        def on_train_start(self, trainer, pl_module):
            self.losses.load_state_dict(collector.state_dict())
            super().on_train_start(trainer, pl_module)

    assert_equal(*collect(collector=Loaded()))


def test_a_state_does_not_change_any_more():
    """A checkpoint may be written later than it was taken."""
    _, collector = collect(loader=numbered(9))
    losses = collector.losses
    losses._since = Since.empty(9, torch.device("cpu"))
    state = losses.state_dict()
    losses._since.counts += 1
    losses._merged.losses += 1
    assert state["since"]["counts"].sum() == 0
    assert (losses._merged.losses - state["merged"]["losses"]).tolist() == [1.0] * 9


@pytest.mark.slow
def test_two_ranks_collect_what_both_have_seen(tmp_path):
    """The sum over ranks is that of a loop over the batches of both, also after a resume in mid-epoch."""
    zero, one = run_two_ranks("ddp_sample_losses.py", tmp_path)
    for name in ("first", "second"):
        for rank in (zero, one):
            assert rank[name]["reasons"] == [None, None]
            assert all(found == brought for found, brought in rank[name]["pairs"])
        assert json.dumps(zero[name]["scores"]) == json.dumps(one[name]["scores"])
    _compare(zero["first"]["scores"], [zero["first"]["seen"], one["first"]["seen"]], [])
    # Up to the checkpoint: two epochs of both ranks, and rank zero's first batch of the third.
    before = [_first(zero["first"], batches=7), _first(one["first"], batches=6)]
    _compare(zero["second"]["scores"], [zero["second"]["seen"], one["second"]["seen"]], before)


def _first(run, batches):
    """What a rank had noted after so many batches; each sample is noted once a batch, in order."""
    numbers = [number for _, brought in run["pairs"][:batches] for number in brought]
    return {str(n): run["seen"][str(n)][: numbers.count(n)] for n in numbers}


def _compare(scores, *parts):
    losses, margins, _, _, counts = scores
    assert len(counts) == 21
    for index in range(21):
        noted = [entry for part in parts for seen in part for entry in seen.get(str(index), [])]
        assert counts[index] == len(noted) > 0
        assert abs(losses[index] - sum(entry[0] for entry in noted) / len(noted)) < CLOSE
        assert abs(margins[index] - sum(entry[1] for entry in noted) / len(noted)) < CLOSE


# ---------------------------------------------------------------------- harmless


class Noted(Collector):
    """For the network of the contract."""

    def __init__(self):
        super().__init__("net.10")


RECIPES = [  # with names of their own: the battery remembers the reference of a name
    Recipe("losses plain"),
    Recipe("losses accumulation", trainer={"accumulate_grad_batches": 2}),
    Recipe("losses bf16", trainer={"precision": "bf16-mixed"}),
]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_run_with_it_is_bit_for_bit_the_run_without(recipe):
    """Weights, optimizers, generators, the order of the samples, what was read: all that the contract compares."""
    assert_undisturbed(lambda: [Noted()], recipe)


def test_it_collects_in_the_runs_that_are_compared():
    """Or they would prove nothing."""
    collectors = []

    def make():
        collectors.append(Noted())
        return [collectors[-1]]

    assert_undisturbed(make, RECIPES[0])
    assert collectors[0].losses.reason is None
    assert collectors[0].losses.means().counts.tolist() == [2] * 27


def test_other_callbacks_measure_the_same():
    """Neither sees the other: theirs follow the forward by modes, and run forwards of their own."""
    rows, collector = [], Noted()
    for callbacks in ([], [collector]):
        seed_all(3)
        capture, model = Capture(), contract_nets.Net()
        others = [
            TrainingDynamics(every_n_train_steps=2, on_error="raise"),
            DeadFilters(split="train", on_error="raise"),
        ]
        loaders = contract_nets.loader(samples=27), contract_nets.loader(samples=12, seed=1, shuffle=False)
        quiet_trainer(callbacks=[*callbacks, *others, ActivationSparsity(on_error="raise")], logger=capture).fit(
            model, *loaders
        )
        rows.append(capture.of_interp())
    assert len(rows[0]) > 20
    assert str(rows[0]) == str(rows[1])
    assert collector.losses.reason is None
    assert collector.losses.means().counts.tolist() == [2] * 27


def test_weights_and_generators_are_the_same_with_workers():
    """Each worker draws from its own generators, seeded from the main one."""
    outcomes = []
    for callbacks in ((), (Collector(),)):
        model = Net()
        torch.manual_seed(4)
        fit(model, numbered(num_workers=2), *callbacks)
        outcomes.append(([parameter.tolist() for parameter in model.parameters()], list(model.seen.items()), draws()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails):
    """Between the batches there is none either, and a copy in the middle of a step has none of ours."""

    class Looks(Net):
        def training_step(self, batch, batch_idx):
            if fails and batch_idx == 1:
                raise KeyError("on purpose")
            hooks = copy.deepcopy(self.net[2])._forward_hooks.values()
            assert [type(hook) is QuietHook for hook in hooks] == [False]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert not self.net[2]._forward_hooks

    model, collector = Looks(), Collector()
    if fails:
        with pytest.raises(KeyError, match="on purpose"):
            fit(model, numbered(), collector, val=numbered(6, shuffle=False))
    else:
        fit(model, numbered(), collector, val=numbered(6, shuffle=False))
    assert not model.net[2]._forward_hooks
    assert collector.order.indices(5) is None


@pytest.mark.parametrize("size", [0, 1])
def test_without_an_order_nothing_is_collected(size):
    """An empty data set, or one that Lightning never set up."""
    losses, order = SampleLosses(), SampleOrder()
    order._size = size
    trainer = type("Trainer", (), {"is_global_zero": True, "world_size": 1})()
    losses.open(trainer, Net(), "net.2", order)
    losses.begin_batch(Net(), next(iter(numbered())), order)
    losses.end_batch()
    losses.unpack(losses.pack(), trainer)
    assert losses.means().counts.tolist() == [0] * size
    assert (losses.reason is None) is bool(size)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_the_host_never_waits():
    """Any synchronisation is an error there; the sums are those on the CPU, also with deterministic algorithms."""
    since = {name: Since.empty(50, torch.device(name)) for name in ("cpu", "cuda")}
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 50, (16,), generator=generator), torch.randint(-1, 6, (16,), generator=generator))
        for _ in range(20)
    ]
    torch.use_deterministic_algorithms(True)
    try:
        for number, (at, labels) in enumerate(batches):
            scores = torch.randn(16, 5, generator=generator)
            since["cpu"].add(at, labels, scores, number)
            there = labels.cuda(), scores.cuda()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            since["cuda"].add(at.to("cuda", non_blocking=True), *there, number)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for name, expected in since["cpu"].state().items():
        torch.testing.assert_close(since["cuda"].state()[name], expected, rtol=1e-5, atol=1e-5)
