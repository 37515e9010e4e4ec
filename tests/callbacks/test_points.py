"""Many fixed samples: the same ones, the same pixels, and nothing of the user's moves."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import ArgumentError
from lightning_interp.callbacks import _points
from lightning_interp.callbacks._embedded import embed_points, find_place
from lightning_interp.callbacks._points import choose_points, is_stream
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.functional import embed
from tests.callbacks.watched import fit
from tests.contract.nets import Images, Net, Stream, loader


class Inside(pl.Callback):
    """Calls a function at the start and at the end of the training, where callbacks measure."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def _look(self, trainer, module):
        with undisturbed(module):
            self.seen.append(self.look(trainer, module))

    on_train_start = on_train_end = _look


def look(function, *, train=None, val=None, net=None, **options):
    """What the function gives at the start and at the end of one epoch."""
    watcher = Inside(function)
    fit(net or Net(), watcher, train=loader() if train is None else train, val=val, epochs=1, **options)
    return watcher.seen


def gather(points, trainer, module, rows=None):
    parts = list(points.read(trainer, module, range(len(points)) if rows is None else rows))
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


def test_points_are_spread_evenly_over_the_validation_set():
    """A set that is sorted by class would else show one class only."""
    chosen = []

    def read(trainer, module):
        points = choose_points(trainer, 4)
        chosen.append((points.indices, points.from_training))
        return gather(points, trainer, module)

    (images, labels), _ = look(read, val=loader(12, seed=1, shuffle=False, noise=0.0))
    assert chosen[0] == ([0, 3, 6, 9], False)
    assert torch.equal(images, Images(12, seed=1).images[[0, 3, 6, 9]])
    assert torch.equal(labels, Images(12, seed=1).labels[[0, 3, 6, 9]])


def test_training_set_is_taken_where_there_is_no_validation_and_where_asked_for():
    """Said by `from_training`."""
    seen = look(lambda trainer, _: choose_points(trainer, 5).from_training)
    assert seen == [True, True]
    seen = look(
        lambda trainer, _: choose_points(trainer, 5, split="train").from_training, val=loader(12, shuffle=False)
    )
    assert seen == [True, True]


@pytest.mark.parametrize("kept", [1 << 27, 0])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_give_the_same_images_each_time(kept, workers, monkeypatch):
    """Whether they are kept in memory or read again, by workers or not; the data set draws from three generators."""
    monkeypatch.setattr(_points, "_KEPT", kept)
    val = DataLoader(Images(12, seed=1), batch_size=5, num_workers=workers)
    points = []

    def read(trainer, module):
        points.append(points[0] if points else choose_points(trainer, 100))
        return gather(points[0], trainer, module)[0]

    first, last = look(read, val=val)
    assert torch.equal(first, last)
    assert not torch.equal(first, Images(12, seed=1).images)  # the noise is there
    assert bool(points[0]._kept) == bool(kept)


def test_reading_moves_nothing_of_the_users():
    """The data set is a copy: what was noted in it before is not there."""
    val = loader(12, seed=1, shuffle=False)
    look(lambda trainer, module: gather(choose_points(trainer, 100), trainer, module), val=val, num_sanity_val_steps=0)
    assert sorted(val.dataset.reads) == list(range(12))  # once, by the validation itself


def test_images_that_were_kept_are_not_changed_by_the_model():
    """A model that writes into its input."""
    points = []

    def read(trainer, module):
        points.append(points[0] if points else choose_points(trainer, 6))
        copies = [part.images.clone() for part in points[0].read(trainer, module, range(6))]
        for part in points[0].read(trainer, module, range(6)):
            part.images.zero_()
        return torch.cat(copies)

    first, last = look(read, val=loader(12, noise=0.0, shuffle=False))
    assert torch.equal(first, last)
    assert bool(first.any())


def test_given_points():
    """Indices into the validation set, tensors, a file."""
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([2, 0, 1])

    def read(samples):
        return look(
            lambda t, m: gather(choose_points(t, 100, samples), t, m), val=loader(12, seed=1, noise=0.0, shuffle=False)
        )[0]

    assert torch.equal(read([7, 2])[0], Images(12, seed=1).images[[7, 2]])
    assert torch.equal(read((images, labels))[0], images)
    assert torch.equal(read((images, labels))[1], labels)


def test_file_of_points(tmp_path):
    """What `torch.save` wrote."""
    batch = {"image": torch.rand(3, 1, 8, 8), "label": torch.tensor([2, 0, 1])}
    torch.save(batch, tmp_path / "points.pt")
    images, labels = look(lambda t, m: gather(choose_points(t, 9, str(tmp_path / "points.pt")), t, m))[0]
    assert torch.equal(images, batch["image"])
    assert torch.equal(labels, batch["label"])


def test_index_beyond_the_data_set_is_refused():
    """With its size."""
    with pytest.raises(ArgumentError, match="below 12"):
        look(lambda trainer, _: choose_points(trainer, 100, [3, 12]), val=loader(12, shuffle=False))


def test_collate_function_that_drops_samples_is_refused():
    """Else each image would stand for another one."""

    def drop(batch):
        return torch.utils.data.default_collate(batch[1:])

    val = DataLoader(Images(12, seed=1), batch_size=4, collate_fn=drop)
    with pytest.raises(UnreadableError, match="12 samples for as many indices, but got 9"):
        look(lambda trainer, module: gather(choose_points(trainer, 100), trainer, module), val=val)


def test_stream_is_known_and_refused():
    """Unless the points are given."""
    stream = DataLoader(Stream(), batch_size=6)
    assert look(lambda trainer, _: is_stream(trainer, None), train=stream) == [True, True]
    assert look(lambda trainer, _: is_stream(trainer, [1]), train=stream) == [False, False]
    with pytest.raises(UnreadableError, match=r"samples=\(images, labels\)"):
        look(lambda trainer, _: choose_points(trainer, 100), train=stream)


def test_embeddings_are_those_of_the_model():
    """Oracle: `embed` on the same images; labels, predicted classes and thumbnails beside them."""

    def measure(trainer, module):
        points = choose_points(trainer, 100)
        found = embed_points(None, trainer, module, points, find_place(module, points, trainer, None), thumbnails=True)
        images, _ = gather(points, trainer, module)
        return found, embed(module, images), module(images).argmax(dim=1), images

    for found, rows, predicted, images in look(measure, val=loader(13, seed=1, noise=0.0, shuffle=False)):
        torch.testing.assert_close(found.rows, rows)
        assert torch.equal(found.predicted, predicted)
        assert torch.equal(found.labels, Images(13).labels)
        assert torch.equal(found.thumbnails, images)


def test_large_images_become_thumbnails_of_their_shape():
    """At most 48 pixels on the longer side."""
    val = DataLoader(TensorDataset(torch.rand(3, 1, 32, 96), torch.zeros(3).long()), batch_size=2)

    class Wide(Net):
        def forward(self, images):
            return super().forward(images[:, :, :8, :8])

    def measure(trainer, module):
        points = choose_points(trainer, 9)
        return embed_points(None, trainer, module, points, find_place(module, points, trainer, None), thumbnails=True)

    found = look(measure, val=val, net=Wide())[0]
    assert found.thumbnails.shape == (3, 1, 16, 48)


def test_labels_that_are_no_classes_are_unknown():
    """Real numbers of a regression, negative ones."""
    targets = torch.tensor([0.5, 1.0, 2.0, 3.0])
    val = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), targets), batch_size=4)
    other = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, -100, 2, 1])), batch_size=4)

    class Regression(Net):
        def validation_step(self, batch, batch_idx):
            return None

        def interp_scores(self, images):
            return self(images)[:, 0]

    def measure(trainer, module):
        points = choose_points(trainer, 9)
        return embed_points(None, trainer, module, points, find_place(module, points, trainer, None)).labels

    assert look(measure, val=val, net=Regression())[0].tolist() == [-1] * 4
    assert look(measure, val=other, net=Regression())[0].tolist() == [0, -1, 2, 1]


def test_spread_indices_are_distinct_and_ordered():
    """For any size and count."""
    for size in (1, 2, 7, 100):
        for count in (1, 3, 7, 99, 200):
            indices = _points.spread_indices(size, count)
            assert len(indices) == min(size, count)
            assert indices == sorted(set(indices))
            assert 0 <= indices[0] <= indices[-1] < size
            gaps = np.diff(indices)
            assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
