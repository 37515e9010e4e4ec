"""The embedding of fixed points: numbers, maps that keep their places, the projector."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from google.protobuf import text_format
from sklearn.neighbors import NearestNeighbors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import ArgumentError, EmbeddingProjection, InterpWarning
from lightning_interp.callbacks.session import Session
from lightning_interp.functional import embed
from lightning_interp.functional.projection import displacement, project_pca
from lightning_interp.functional.separation import separation
from tests.callbacks.two_ranks import run_two_ranks
from tests.callbacks.watched import fit
from tests.contract.nets import Capture, Images, Net, Stream, body, loader

POINTS = 24
NUMBERS = ("knn_accuracy", "silhouette", "fisher_ratio", "nc1", "effective_rank")


def points(count=POINTS):
    """The validation images and their labels."""
    data = Images(count, seed=1)
    return data.images, data.labels


def project(callback=None, *others, net=None, train=None, val="usual", logger=None, epochs=2, **options):
    """Trains; gives the callback, the network, what was logged and the Trainer."""
    torch.manual_seed(0)
    callback = callback or EmbeddingProjection(on_error="raise")
    logger, net = logger or Capture(), net or Net()
    val = DataLoader(TensorDataset(*points()), batch_size=5) if val == "usual" else val
    trainer = fit(
        net,
        callback,
        *others,
        train=loader() if train is None else train,
        val=val,
        epochs=epochs,
        logger=logger,
        **options,
    )
    return callback, net, logger, trainer


def last(logger, tag):
    """The newest value."""
    return logger.of_interp()[tag][-1][1]


def board(folder):
    return pl.loggers.TensorBoardLogger(folder, version=0)


def read(logger):
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


class Still(Net):
    """Without random numbers: a resumed run is then the uninterrupted one."""

    def __init__(self):
        super().__init__(body(dropout=0.0))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Watch(pl.Callback):
    """Embeds the points at each event by itself, and projects them one after the other."""

    def __init__(self):
        self.moved, self.map = [], None

    def _look(self, trainer, module):
        coordinates = project_pca(embed(module, points()[0]), previous=self.map).coordinates
        if self.map is not None:
            self.moved.append(displacement(coordinates, self.map))
        self.map = coordinates

    on_train_start = on_train_epoch_end = _look


def test_numbers_are_those_of_the_final_network():
    """Oracle: `separation` of `embed`; each in its tag, at the step of the last update."""
    _, net, logger, _ = project()
    images, labels = points()
    for quantity, value in separation(embed(net, images), labels).items():
        assert logger.of_interp()[f"interp/{quantity}"][-1] == (7, pytest.approx(value, rel=1e-5))
    assert [step for step, _ in logger.of_interp()["interp/nc1"]] == [0, 3, 7]


def test_knn_accuracy_is_what_scikit_learn_counts():
    """Each point classified by its ten nearest others."""
    _, net, _, trainer = project(epochs=3)
    images, labels = points()
    rows = embed(net, images).double().numpy()
    _, nearest = NearestNeighbors(n_neighbors=11).fit(rows).kneighbors(rows)
    votes = [np.bincount(labels.numpy()[[j for j in row if j != i][:10]], minlength=3) for i, row in enumerate(nearest)]
    # A vote may be tied: then either is right.
    low = sum(v[y] == v.max() and (v == v.max()).sum() == 1 for v, y in zip(votes, labels.tolist(), strict=True))
    high = sum(v[y] == v.max() for v, y in zip(votes, labels.tolist(), strict=True))
    assert low <= round(POINTS * float(trainer.callback_metrics["interp/knn_accuracy"])) <= high


def test_points_keep_their_place_as_the_projection_says():
    """The displacement between events is that of maps made one after the other."""
    watch = Watch()
    _, _, logger, _ = project(None, watch, epochs=3)
    logged = [value for _, value in logger.of_interp()["interp.embedding_displacement/pca"]]
    assert logged == pytest.approx(watch.moved, rel=1e-3)
    assert len(logged) == 3


def test_knn_accuracy_is_a_metric_from_the_start():
    """NaN until it is measured, so that EarlyStopping may watch it."""

    class Listen(pl.Callback):
        def on_fit_start(self, trainer, module):
            self.before = float(trainer.callback_metrics["interp/knn_accuracy"])

        def on_train_epoch_end(self, trainer, module):
            self.after = float(trainer.callback_metrics["interp/knn_accuracy"])

    listen = Listen()
    project(None, listen, logger=False)
    assert math.isnan(listen.before)
    assert 0 <= listen.after <= 1


def test_rules_get_the_knn_accuracy():
    """In the history of the run."""

    class Take(pl.Callback):
        def on_train_end(self, trainer, module):
            self.series = Session.of(trainer).history.get("knn_accuracy")

    take = Take()
    _, _, logger, _ = project(None, take)
    assert [tuple(point) for point in zip(take.series.steps, take.series.values, strict=True)] == [
        (step, pytest.approx(value)) for step, value in logger.of_interp()["interp/knn_accuracy"]
    ]


def test_pictures_of_the_map_and_of_its_history(tmp_path):
    """Wide enough for a card, each class in a colour; the strip grows."""
    logger = board(tmp_path)
    project(logger=logger)
    events = read(logger)
    assert [image.step for image in events.Images("interp.embedding/net.10")] == [0, 3, 7]
    assert [image.width for image in events.Images("interp.embedding/net.10")] == [320] * 3
    widths = [image.width * image.height for image in events.Images("interp.embedding_strip/net.10")]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_several_perplexities_stand_side_by_side(tmp_path):
    """Each with its divergence and its displacement."""
    logger = Capture()
    project(EmbeddingProjection(method="tsne", perplexity=[2, 5], on_error="raise"), logger=logger)
    for perplexity in (2, 5):
        assert len(logger.of_interp()[f"interp.embedding_kl/tsne_{perplexity}"]) == 3
        assert len(logger.of_interp()[f"interp.embedding_displacement/tsne_{perplexity}"]) == 2


def test_projector_gets_the_points_with_their_labels(tmp_path):
    """Oracle: the files read by hand: directions of the embedding, labels, predicted classes, indices, thumbnails."""
    logger = board(tmp_path)
    _, net, _, _ = project(EmbeddingProjection(classes=["a", "b", "c"], max_points=20, on_error="raise"), logger=logger)
    folder = Path(logger.log_dir)
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    newest = next(entry for entry in config.embeddings if "7" in entry.tensor_name)
    images, labels = points()
    chosen = [row * POINTS // 20 for row in range(20)]
    rows = np.fromfile(folder / newest.tensor_path, np.float32).reshape(tuple(newest.tensor_shape))
    wanted = torch.nn.functional.normalize(embed(net, images[chosen]), dim=1)
    assert rows.shape == (20, 8)
    np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-3, atol=1e-5)
    table = [line.split("\t") for line in (folder / newest.metadata_path).read_text().splitlines()]
    assert [line[0] for line in table[1:]] == ["abc"[label] for label in labels[chosen].tolist()]
    with torch.no_grad():
        guesses = ["abc"[label] for label in net.eval()(images[chosen]).argmax(dim=1).tolist()]
    columns = dict(zip(table[0][1:], zip(*[line[1:] for line in table[1:]], strict=True), strict=True))
    assert list(columns["predicted"]) == guesses
    assert list(columns["index"]) == [str(index) for index in chosen]
    assert (folder / newest.sprite.image_path).exists()


def test_projector_can_be_left_out(tmp_path):
    """No files then."""
    logger = board(tmp_path)
    project(EmbeddingProjection(projector=False, on_error="raise"), logger=logger)
    assert not (Path(logger.log_dir) / "projector_config.pbtxt").exists()


def test_named_layer_and_named_instances():
    """The tags tell them apart."""
    logger, other = Capture(), EmbeddingProjection(layer="net.3", name="early", on_error="raise")
    _, net, _, _ = project(None, other, logger=logger)
    images, labels = points()
    wanted = separation(embed(net, images, layer="net.3"), labels)
    assert last(logger, "interp.early/fisher_ratio") == pytest.approx(wanted["fisher_ratio"], rel=1e-5)
    assert last(logger, "interp/fisher_ratio") != last(logger, "interp.early/fisher_ratio")


def test_layer_that_does_not_exist_is_refused_before_training():
    """With the nearest name."""
    with pytest.raises(ArgumentError, match=r"No layer matches 'net\.33'.*Did you mean 'net\.3'"):
        project(EmbeddingProjection(layer="net.33"))


def test_points_without_labels_have_maps_and_no_numbers(tmp_path):
    """A data set of images only."""
    logger = board(tmp_path)

    class Blind(Net):
        def validation_step(self, batch, batch_idx):
            return None

    project(net=Blind(), val=DataLoader(points()[0], batch_size=5), logger=logger)
    tags = read(logger).Tags()
    assert "interp.embedding/net.10" in tags["images"]
    assert not any(f"interp/{quantity}" in tags["scalars"] for quantity in NUMBERS)


def test_stream_is_followed_on_the_samples_that_came_first():
    """As many as were asked for, the same ones at each event."""
    callback = EmbeddingProjection(max_points=10, on_error="raise")
    _, net, logger, _ = project(callback, train=DataLoader(Stream(), batch_size=6), val=None)
    data = Images(24, noise=0.0)
    wanted = separation(embed(net, data.images[:10]), data.labels[:10])
    assert last(logger, "interp/fisher_ratio") == pytest.approx(wanted["fisher_ratio"], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_few_points_give_a_picture(count, method, tmp_path):
    """Where a number has no meaning it is left out."""
    logger = board(tmp_path)
    project(EmbeddingProjection(method=method, max_points=count, on_error="raise"), logger=logger)
    assert "interp.embedding/net.10" in read(logger).Tags()["images"]


def test_more_points_than_t_sne_can_take_are_refused():
    """At once, or when the points are counted; PCA takes them."""
    with pytest.raises(ArgumentError, match=r"`max_points` to give at most 10,000 points.*got 10,001"):
        EmbeddingProjection(method="tsne", max_points=10_001)
    assert EmbeddingProjection(max_points=10_001).max_points == 10_001
    images = torch.zeros(10_001, 1, 8, 8)
    with pytest.raises(ArgumentError, match="`samples` to give at most 10,000 points"):
        project(EmbeddingProjection(method="tsne", samples=(images, torch.zeros(10_001).long())))


def test_diverged_network_gives_empty_maps_and_training_goes_on(tmp_path):
    """All embeddings NaN."""
    net = Net()
    with torch.no_grad():
        net.net[0].weight.fill_(math.nan)
    logger = board(tmp_path)
    callback, *_ = project(net=net, logger=logger)
    assert not callback.resting
    assert "interp.embedding/net.10" in read(logger).Tags()["images"]


def test_resume_goes_on_with_the_places_of_the_points(tmp_path):
    """Oracle: the uninterrupted run."""

    def train(**options):
        torch.manual_seed(0)
        in_order = loader(shuffle=False, noise=0.0)
        _, _, logger, trainer = project(net=Still(), train=in_order, **options)
        return logger.of_interp(), trainer

    whole, _ = train(epochs=3)
    _, trainer = train(epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = train(epochs=3, ckpt_path=tmp_path / "last.ckpt")
    for tag in ("interp.embedding_displacement/pca", "interp/nc1"):
        assert resumed[tag][-1] == (11, pytest.approx(whole[tag][-1][1], rel=1e-5))
        assert len(resumed[tag]) == 1


def test_umap_needs_its_package():
    """Said at once; where it is installed, it works."""
    try:
        import umap  # noqa: F401
    except ImportError:
        with pytest.raises(ArgumentError, match=r"lightning-interp\[umap\]"):
            EmbeddingProjection(method="umap")
    else:
        assert EmbeddingProjection(method="umap").method == "umap"


def test_model_that_cannot_be_called_is_said_once():
    """With the way out, and training goes on."""

    class Closed(Net):
        def forward(self, images, extra):
            return super().forward(images)

        def loss(self, batch):
            return torch.nn.functional.cross_entropy(self(batch[0], None), batch[1])

    with pytest.warns(InterpWarning, match="interp_scores") as caught:
        _, _, _, trainer = project(EmbeddingProjection(), net=Closed(), val=None)
    assert len(caught) == 1
    assert trainer.current_epoch == 2


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    """An odd number of points on two ranks; the same numbers on both."""
    zero, one = run_two_ranks("ddp_embedding_projection.py", tmp_path)
    assert not zero["resting"]
    assert not one["resting"]
    assert zero["knn_accuracy"] == one["knn_accuracy"] == pytest.approx(zero["alone"]["knn_accuracy"])
    assert zero["logged"] == pytest.approx(zero["alone"], rel=1e-4)
    assert one["logged"] == {}
    assert zero["failing"] == one["failing"] == [True, 2]  # fails on rank one only: both rest, both finish
