"""The fixed samples: the same images as the model would receive, and nothing of the user's data moves."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset

from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.samples import fixed_samples
from tests.callbacks.watched import Plain, fit, images, loader


class Read(pl.Callback):
    """Reads the samples at the start, in the middle and at the end of training, and keeps what it got."""

    def __init__(self, count=3):
        self.count, self.read = count, []

    def _read(self, trainer, module):
        self.read.append(fixed_samples(trainer, module, self.count))

    def on_train_start(self, trainer, module):
        self._read(trainer, module)

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            self._read(trainer, module)

    def on_train_end(self, trainer, module):
        self._read(trainer, module)


def read(train=None, val=None, *, module=None, count=3, **options):
    reader = Read(count)
    fit(module or Plain(), reader, train=train, val=val, epochs=1, **options)
    first = reader.read[0]
    for again in reader.read[1:]:
        assert torch.equal(again[0], first[0])
    return first


def test_first_ones_of_the_validation_set():
    """Else of the training set; fewer where there are fewer; labels beside them."""
    pictures, labels = read(val=loader(5, seed=1))
    assert torch.equal(pictures, images(5, seed=1)[0][:3])
    assert torch.equal(labels, torch.arange(3))
    assert torch.equal(read()[0], images()[0][:3])
    assert len(read(count=100)[0]) == 7


def test_of_several_loaders_the_first():
    """Lists, dicts, and nested ones."""
    for val in ([loader(5, seed=1), loader()], {"a": loader(5, seed=1), "b": loader()}):
        assert torch.equal(read(val=val)[0], images(5, seed=1)[0][:3])


class Busy(Dataset):
    """Counts its reads in every way, and draws from every generator there is: its own and the global ones."""

    def __init__(self):
        self.pictures, self.labels = images()
        self.reads, self.log, self.tally, self.count = 0, [], {"reads": 0}, torch.zeros(1)
        self.array = np.zeros(2)
        self.generator = torch.Generator().manual_seed(3)
        self.python, self.numpy = random.Random(3), np.random.default_rng(3)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        self.reads += 1
        self.log.append(index)
        self.tally["reads"] += 1
        self.count += 1
        self.array[0] += 1
        noise = torch.rand(1, generator=self.generator) + self.python.random() + float(self.numpy.random())
        noise = noise + torch.rand(1) + random.random() + float(np.random.rand())
        return self.pictures[index] + noise, self.labels[index]

    def state(self):
        own = [self.reads, list(self.log), dict(self.tally), self.count.item(), self.array.tolist()]
        return [
            *own,
            self.generator.get_state().tolist(),
            self.python.getstate(),
            self.numpy.bit_generator.state,
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ]


class Held(Busy):
    """Can't be deep-copied: a lock, as open files and data bases have one."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Compare(pl.Callback):
    """The state of the data set before and after a reading."""

    def __init__(self, *datasets):
        self.datasets = datasets

    def on_train_start(self, trainer, module):
        before = [dataset.state() for dataset in self.datasets]
        pictures, _ = fixed_samples(trainer, module, 3)
        assert [dataset.state() for dataset in self.datasets] == before
        assert len(pictures) == 3
        self.done = True


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, [4, 2, 0]), lambda d: ConcatDataset([d, d])])
@pytest.mark.parametrize("kind", [Busy, Held])
def test_reading_moves_nothing_of_the_data_set(kind, wrap):
    """Counters, lists, tensors, arrays, generators of its own and global ones: all as before."""
    dataset = kind()
    compare = Compare(dataset)
    fit(Plain(), compare, train=DataLoader(wrap(dataset), batch_size=3), epochs=1)
    assert compare.done


def test_run_sees_the_same_data_with_and_without():
    """Shuffled, augmented, with the sampler's own generator."""
    seen = []
    for callbacks in ([], [Read()]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        dataset, batches = Busy(), []

        class Keep(pl.Callback):
            def __init__(self, batches):
                self.batches = batches

            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                self.batches.append(batch[0].clone())

        train = DataLoader(dataset, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))
        fit(Plain(), *callbacks, Keep(batches), train=train, val=DataLoader(Busy(), batch_size=3), epochs=2)
        seen.append((torch.cat(batches), dataset.state()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]


def test_large_arrays_are_not_copied():
    """A data set in memory may be larger than what is left of it."""
    pictures = torch.rand(70, 2, 64, 64)
    shared = []

    class Large(Dataset):
        def __init__(self):
            self.pictures = pictures

        def __len__(self):
            return 70

        def __getitem__(self, index):
            shared.append(self.pictures.data_ptr() == pictures.data_ptr())
            return self.pictures[index], 0

    read(DataLoader(Large(), batch_size=35))
    assert all(shared)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*images(), strict=True)


def test_stream_can_not_be_read_by_index():
    """It is said, with the type; where the training set can be read, that is taken."""
    with pytest.raises(UnreadableError, match="got Stream"):
        read(DataLoader(Stream(), batch_size=3))
    pictures, _ = read(loader(), DataLoader(Stream(), batch_size=3))
    assert torch.equal(pictures, images()[0][:3])


class Unsized(Sampler):
    """In order, and does not know how long it is."""

    sampler = None  # older versions of Lightning look for it

    def __iter__(self):
        return iter([[0, 1], [2]])


def test_loader_without_a_length():
    """Its data set has one."""
    pictures, _ = read(val=DataLoader(list(zip(*images(5, seed=1), strict=True)), batch_sampler=Unsized()))
    assert torch.equal(pictures, images(5, seed=1)[0][:3])


def test_collate_function_of_the_user():
    """As the loader would have put the images together."""

    def collate(items):
        return {"pixel_values": torch.stack([picture.flip(-1) for picture, _ in items]), "y": torch.ones(len(items))}

    class Reads(Plain):
        def training_step(self, batch, batch_idx):
            return self(batch["pixel_values"]).mean()

    train = DataLoader(list(zip(*images(), strict=True)), batch_size=3, collate_fn=collate)
    pictures, labels = read(train, module=Reads())
    assert torch.equal(pictures, images()[0][:3].flip(-1))
    assert labels.tolist() == [1.0, 1.0, 1.0]


class Transfers(Plain):
    """Changes each batch on its way to the device, in all three hooks, as augmentation on a GPU does."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device([batch[0] * 2, batch[1]], device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.rand(1), batch[1]]


def test_batch_goes_the_way_of_the_model():
    """Before, during and after the transfer; what is drawn on the way is put back."""
    torch.manual_seed(0)
    reader = Read()
    fit(Transfers(), reader, epochs=1)
    noise = reader.read[0][0] - (images()[0][:3] + 1) * 2
    assert noise.min() > 0
    assert torch.allclose(noise, noise.flatten()[0].expand_as(noise), atol=1e-6)
    states = []

    class State(pl.Callback):
        def on_train_start(self, trainer, module):
            before = torch.get_rng_state()
            fixed_samples(trainer, module, 2)
            states.append(torch.equal(before, torch.get_rng_state()))

    fit(Transfers(), State(), epochs=1)
    assert states == [True]


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_have_the_type_of_the_model(precision, dtype):
    """As the precision plugin converts them."""
    assert read(precision=precision)[0].dtype == dtype


def test_samples_are_copies():
    """The model may write into them without changing the data set."""

    class Writes(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0].mul_(0)), batch[1])

    pictures, labels = images()
    dataset = list(zip(pictures, labels, strict=True))
    reader = Read()
    fit(Writes(), reader, train=DataLoader(dataset, batch_size=3), epochs=1)
    reader.read[0][0].zero_()
    assert torch.equal(dataset[0][0], images()[0][0])
