"""The indices of each training batch, whatever hands them out; or None and a reason."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_interp.callbacks._excited import index_of
from lightning_interp.callbacks._followed_sampler import Draws, follow, plain_class, unfollow
from lightning_interp.callbacks._sample_order import SampleOrder
from tests.callbacks.losses_kit import CHATTER, Collector, Numbered, differences, draws, kit, numbered

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]
NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
pl = kit().pl


def collected(loader, namespace="pytorch_lightning", model=None, callbacks=(), **options):
    """Fits, and gives the collector; the indices of every batch must be those that the batch brought along."""
    collector = Collector()
    kit(namespace).fit(model or kit(namespace).Net(), loader, collector, *callbacks, **options)
    return collector


def assert_right(collector, batches):
    assert collector.order.reason is None
    assert len(collector.pairs) == batches
    for found, brought in collector.pairs:
        assert found == brought


class Pairs(Sampler):
    """A batch sampler without a length, of numpy integers; its own generator."""

    def __init__(self, count):
        self.count, self.generator, self.begun = count, torch.Generator().manual_seed(5), 0

    def __iter__(self):
        self.begun += 1
        order = torch.randperm(self.count, generator=self.generator).numpy()
        for first in range(0, self.count - 1, 2):
            yield order[first : first + 2]


class Reversed(Sampler):
    """Single indices from the last to the first, as tensors."""

    def __init__(self, dataset):
        self.count = len(dataset)

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(torch.arange(self.count - 1, -1, -1))


class Registered(Sampler):
    """A class that notes who derives from it."""

    children = []  # noqa: RUF012

    def __init_subclass__(cls):
        Registered.children.append(cls)

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([3, 1, 0, 2])


class RegisteredPairs(Registered):
    """One of them, of batches."""

    def __iter__(self):
        return iter([[3, 1], [0, 2]])


def batches_of(size):
    return BatchSampler(RandomSampler(range(23)), size, drop_last=False)


class Peek(pl.Callback):
    """Reads the user's loader in the middle of the epoch, as a user may."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.first = next(iter(trainer.train_dataloader))
        if batch_idx == 2:
            self.all = list(trainer.train_dataloader)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_indices_are_those_of_the_batch(namespace, workers):
    """Shuffled, over two epochs, with the last batch smaller than the others."""
    assert_right(collected(numbered(num_workers=workers), namespace), batches=10)


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 2, "max_epochs": 4}, 8),
        ({"accumulate_grad_batches": 2}, 10),
        ({"val_check_interval": 0.4, "val": numbered(7, shuffle=False)}, 10),
        ({"overfit_batches": 2}, 4),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, 15),
        ({"fast_dev_run": True}, 1),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"callbacks": (Peek(),)}, 10),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),  # the same in each process
)
def test_the_indices_are_right_in_every_loop(options, batches):
    """Whatever leaves an iterator half-way, makes another one, or reads the loader in between."""
    assert_right(collected(numbered(), **options), batches)


LOADERS = {
    "drop_last": (lambda: numbered(drop_last=True), 8),
    "workers that stay": (lambda: numbered(num_workers=2, persistent_workers=True), 10),
    "no length": (lambda: DataLoader(Numbered(), batch_sampler=Pairs(23)), 22),
    "no length, workers": (lambda: DataLoader(Numbered(), batch_sampler=Pairs(23), num_workers=2), 22),
    "tensors": (lambda: DataLoader(Numbered(), batch_size=4, sampler=Reversed(Numbered())), 12),
    "a sampler of batches": (lambda: DataLoader(Numbered(), batch_size=None, sampler=batches_of(4)), 12),
    "with replacement": (lambda: numbered(shuffle=False, sampler=RandomSampler(range(23), replacement=True)), 10),
    "own generator": (lambda: numbered(generator=torch.Generator().manual_seed(3)), 10),
    "one worker, in any order": (lambda: numbered(in_order=False, num_workers=1), 10),
    "a sampler that registers its children, inside": (lambda: numbered(shuffle=False, sampler=Registered()), 2),
}


@pytest.mark.parametrize(("loader", "batches"), LOADERS.values(), ids=LOADERS)
def test_the_indices_are_right_for_every_loader(loader, batches):
    """Samplers with and without a length, that yield lists, arrays and tensors, of batches and of single samples."""
    assert_right(collected(loader()), batches)


def test_a_loader_that_was_read_before_with_workers_that_stay_is_followed():
    """Its iterator was made before the fit."""
    loader = numbered(num_workers=1, persistent_workers=True)
    next(iter(loader))
    assert_right(collected(loader), batches=10)


def test_an_index_counts_in_the_data_set_of_the_loader():
    """That is the subset, where it is one."""
    collector = collected(DataLoader(Subset(Numbered(), [20, 3, 11, 7]), batch_size=2))
    assert [found for found, _ in collector.pairs[:2]] == [[0, 1], [2, 3]]
    assert [brought for _, brought in collector.pairs[:2]] == [[20, 3], [11, 7]]
    assert collector.order.size == 4


def test_a_data_module_and_a_loader_inside_a_dictionary_are_followed():
    """One loader, wherever it comes from."""

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return numbered()

    assert_right(collected(Data(), reload_dataloaders_every_n_epochs=1), batches=10)

    class Inside(kit().Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["only"], batch_idx)

        def interp_batch(self, batch):
            return batch["only"][:2]

    model = Inside()
    collector = collected({"only": numbered()}, model=model)
    assert (collector.order.reason, collector.losses.reason) == (None, None)
    assert max(differences(collector.losses.means(), model.seen)) < 1e-6


def test_after_a_resume_in_mid_epoch_the_indices_are_right(tmp_path):
    """Lightning counts the batches on and begins the loader anew."""
    path = tmp_path / "middle.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(path)

    collected(numbered(), callbacks=(Save(),), max_epochs=1)
    again = collected(numbered(), ckpt_path=path, max_epochs=2)
    assert len(again.pairs) >= 5
    assert_right(again, len(again.pairs))


# ---------------------------------------------------------------------- where they can't be known


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Numbered()[i] for i in range(10))


class Foreign:
    """A loader of another library."""

    def __iter__(self):
        return iter(numbered())


class Own(DataLoader):
    """An order of its own."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def fewer(samples):
    return torch.utils.data.default_collate(samples[:-1])


def doubled(samples):
    return torch.utils.data.default_collate(samples + samples)


class Sizes(Numbered):
    """Its index is a pair."""

    def __getitem__(self, index):
        return super().__getitem__(index[0])


UNKNOWN = {
    "stream": (lambda: DataLoader(Stream(), batch_size=2), "iterable data set"),
    "own iterator": (lambda: Own(Numbered(), batch_size=4), "iterator of its own"),
    "in any order": (lambda: numbered(in_order=False, num_workers=2), "in_order=True"),
    "fewer": (lambda: numbered(collate_fn=fewer), "a batch held 4 samples where the sampler had asked for 5"),
    "doubled": (lambda: numbered(collate_fn=doubled), "a batch held 10 samples where the sampler had asked for 5"),
    "another library": (Foreign, "is a Foreign"),
    "a list of batches": (lambda: DataLoader(Numbered(), batch_sampler=[[0, 1], [2, 3]]), "list can't be followed"),
    "a class that registers its children": (
        lambda: DataLoader(Numbered(), batch_sampler=RegisteredPairs()),
        "followed",
    ),
    "pairs": (lambda: DataLoader(Sizes(), batch_sampler=BatchSampler([(1, 9), (2, 9)], 2, False)), "yields indices"),
    "negative": (lambda: DataLoader(Numbered(), batch_sampler=BatchSampler([-1, 2], 2, False)), "outside of 0 to 22"),
}


@pytest.mark.parametrize(("loader", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_where_the_indices_can_not_be_known_there_is_a_reason(loader, reason):
    """None rather than a wrong index, and the training runs."""
    collector = collected(loader())
    assert reason in collector.order.reason
    assert len(collector.pairs) > 0
    assert [found for found, _ in collector.pairs] == [None] * len(collector.pairs)
    assert collector.losses.reason == collector.order.reason


def test_several_loaders_have_no_common_index():
    """Neither has the first of them, since the loop mixes them."""

    class Both(kit().Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    order = SampleOrder()

    class Asks(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            order.install(trainer)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert order.indices(5) is None

    for size in (7, 23):
        loaders = {"a": numbered(), "b": numbered(size)}
        kit().fit(Both(), loaders, Asks())
        order.remove()
        assert order.reason.startswith("a batch comes from several loaders")
        assert [type(loader.batch_sampler) for loader in loaders.values()] == [BatchSampler] * 2


def test_a_step_that_fetches_its_own_batches_has_no_indices():
    """The hooks see no batch then."""

    class Fetches(kit().Net):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    order = SampleOrder()

    class Asks(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            order.install(trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert order.indices(5) is None

    kit().fit(Fetches(), numbered(), Asks())
    assert "dataloader_iter" in order.reason
    order.remove()


def test_a_data_set_of_another_length_after_a_reload_is_another_one():
    """The index of a sample would mean something else."""
    loaders = iter([numbered(), numbered(9)])

    class Grows(kit().Net):
        def train_dataloader(self):
            return next(loaders)

    collector = collected(None, model=Grows(), reload_dataloaders_every_n_epochs=1)
    assert "had 23 samples and has 9" in collector.order.reason
    assert [found is None for found, _ in collector.pairs] == [False] * 5 + [True] * 2


# ---------------------------------------------------------------------- harmless


def _noted(loader, seed=11):
    torch.manual_seed(seed)
    return [batch[2].tolist() for batch in loader]


class Looks(pl.Callback):
    """What a user may see of the loader in the middle of a fit."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        loader = trainer.train_dataloader
        twin = pickle.loads(pickle.dumps(loader))
        self.types = [type(copy.deepcopy(loader).batch_sampler), type(twin.batch_sampler)]
        self.types += [type(copy.copy(loader.batch_sampler)), type(twin.sampler)]
        self.batch_sampler, self.names = loader.batch_sampler, (type(loader.batch_sampler).__name__, len(loader))


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_put_back(fails):
    """After a fit and after an exception: the sampler's class, the strategy, the loader's order and the generators."""

    class Fails(kit().Net):
        def training_step(self, batch, batch_idx):
            if fails and batch_idx == 3:
                raise KeyError("on purpose")
            return super().training_step(batch, batch_idx)

    loader = numbered()
    before, sampler, attributes = _noted(loader), loader.batch_sampler, dict(vars(loader))
    looks = Looks()
    collector = Collector()
    runner = kit().pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, max_epochs=1, callbacks=[collector, looks],
    )  # fmt: skip
    if fails:
        with pytest.raises(KeyError, match="on purpose"):
            runner.fit(Fails(), loader)
    else:
        runner.fit(Fails(), loader)
    assert looks.batch_sampler is sampler
    assert (looks.types, looks.names) == ([BatchSampler] * 3 + [RandomSampler], ("BatchSampler", 5))
    assert type(sampler) is BatchSampler is plain_class(sampler)
    assert "process_dataloader" not in vars(runner.strategy)
    assert {name: value for name, value in vars(loader).items() if name != "worker_init_fn"} == {
        name: value for name, value in attributes.items() if name != "worker_init_fn"
    }
    assert _noted(loader) == before
    assert_right(collected(loader), batches=10)


@pytest.mark.parametrize("workers", [0, 1])
def test_order_generators_and_weights_are_the_same_as_without(workers):
    """Bit for bit; the sampler is begun as often."""
    outcomes = []
    for callbacks in ((), (Collector(),)):
        torch.manual_seed(2)
        sampler = Pairs(23)
        model = kit().Net()
        torch.manual_seed(4)
        loader = DataLoader(Numbered(), batch_sampler=sampler, num_workers=workers)
        kit().fit(model, loader, *callbacks)
        weights = [parameter.tolist() for parameter in model.parameters()]
        outcomes.append(
            (weights, list(model.seen.items()), draws(), sampler.begun, sampler.generator.get_state().tolist())
        )
    assert outcomes[0] == outcomes[1]


def test_two_orders_do_not_disturb_one_another():
    """The first to go leaves the other working."""

    class Leaves(Collector):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if batch_idx == 2:
                self.release()

    for make in ((Leaves, Collector), (Collector, Leaves)):
        loader = numbered()
        first, second = (kind(name=str(place)) for place, kind in enumerate(make))
        trainer = kit().fit(kit().Net(), loader, first, second)
        assert_right(first if make[0] is Collector else second, batches=10)
        assert type(loader.batch_sampler) is BatchSampler
        assert "process_dataloader" not in vars(trainer.strategy)


def test_a_copy_of_the_callback_in_mid_fit_follows_nothing():
    """It goes its own way, and what it does changes nothing for the first."""
    copies = []

    class Copies(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                copies.append(pickle.loads(pickle.dumps(trainer.callbacks[0].order)))
                copies.append(copy.deepcopy(trainer.callbacks[0].losses))
                assert copies[-2].indices(5) is None
                copies[-2].remove()
                copies[-1].close()

    collector = collected(numbered(), callbacks=(Copies(),))
    assert_right(collector, batches=10)
    assert len(copies) == 4
    assert collector.losses.means().counts.tolist() == [2] * 23


@pytest.mark.filterwarnings("ignore:.*weights_only", "ignore:You are using `torch.load`")
def test_a_validation_loader_that_is_made_ready_for_training_is_not_taken_for_the_other(tmp_path):
    """So does the search for a batch size, which also reloads both several times."""

    class Sized(kit().Net):
        batch_size = 2

        def train_dataloader(self):
            return numbered(batch_size=self.batch_size)

        def val_dataloader(self):
            return numbered(8, shuffle=False)

    finder = pl.callbacks.BatchSizeFinder(max_trials=2, init_val=2)
    collector = collected(None, model=Sized(), callbacks=(finder,), default_root_dir=tmp_path)
    assert_right(collector, len(collector.pairs))
    assert sum(len(brought) for _, brought in collector.pairs) == 46


def test_the_images_of_the_validation_are_still_numbered():
    """`index_of` sees through: one loader may serve both purposes."""
    found = []

    class Asks(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            number = index_of(trainer)
            found.append(number is not None and number(3))

    loader = numbered(shuffle=False)
    collected(loader, val=loader, callbacks=(Asks(),))
    assert found == [3] * len(found)
    assert len(found) > 9


# ---------------------------------------------------------------------- samplers


class Named(Sampler):
    """Copies itself by its constructor."""

    def __init__(self, name):
        self.name = name

    def __iter__(self):
        return iter([1, 2])

    def __reduce__(self):
        return type(self), (self.name,)


class Tight(Sampler):
    """No dictionary, no setting of attributes, made by `__new__` with arguments."""

    __slots__ = ("size",)

    def __new__(cls, size):
        made = super().__new__(cls)
        object.__setattr__(made, "size", size)
        return made

    def __init__(self, size):
        pass

    def __getnewargs__(self):
        return (self.size,)

    def __setattr__(self, name, value):
        raise AttributeError("frozen")

    def __getstate__(self):
        return None

    def __iter__(self):
        return iter(range(self.size))


@pytest.mark.parametrize(
    "make", [lambda: Named("a"), lambda: Tight(3), lambda: SequentialSampler(range(4)), lambda: Pairs(4)]
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_copies_of_a_followed_sampler_are_plain(make, protocol):
    """By pickle and by `copy`, for classes that are made in their own way."""
    sampler, twin = make(), make()
    plain = type(sampler)
    assert follow(sampler, 4) is None
    file = io.BytesIO()
    pickle.Pickler(file, protocol).dump(sampler)
    copies = [pickle.loads(file.getvalue()), copy.copy(sampler), copy.deepcopy(sampler)]
    assert isinstance(sampler, plain)
    assert plain_class(sampler) is plain is not type(sampler)
    unfollow(sampler)
    assert [type(each) for each in (*copies, sampler)] == [plain] * 4
    assert [str(item) for item in copies[2]] == [str(item) for item in twin]


def test_only_the_last_batches_are_remembered():
    """Memory does not grow with the length of an epoch."""
    iterator = Draws(iter([[i, i + 1] for i in range(1000)]), kept=3)
    collections.deque(iterator, maxlen=0)
    assert len(iterator._numbers) == 3
    assert iterator.at(998).tolist() == [998, 999]
    with pytest.raises(IndexError):
        iterator.at(996)
    with pytest.raises(IndexError):
        iterator.at(1000)


def test_what_is_handed_out_may_be_changed_by_whoever_gets_it():
    """The note is a copy, and what is no index is none."""
    mine, array, tensor = [4, 5], np.array([6, 7]), torch.tensor([8, 9])
    odd = ["a", [[1, 2]], [1.5], True, iter([1]), {"a": 1}]
    iterator = Draws(iter([mine, array, tensor, 3, [], *odd]), kept=20)
    assert [next(iterator) is item for item in (mine, array, tensor)] == [True] * 3
    mine[0] = array[0] = tensor[0] = 0
    collections.deque(iterator, maxlen=0)
    assert [iterator.at(n).tolist() for n in range(5)] == [[4, 5], [6, 7], [8, 9], [3], []]
    assert [iterator.at(5 + n) for n in range(len(odd))] == [None] * len(odd)
