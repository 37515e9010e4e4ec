"""Embeds fixed points: each rank its share, all of them gathered."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._points import Points
from lightning_interp.callbacks._regression import read_regression
from lightning_interp.callbacks._rows import Rows
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.callbacks.batches import NoScoresError, UnreadableError
from lightning_interp.callbacks.samples import FixedSamples
from lightning_interp.callbacks.scores import ScoreModel, read_targets
from lightning_interp.functional.embeddings import EmbeddingPlace, NoEmbeddingError, embedding_tap, find_embedding

_THUMBNAIL = 48  # pixels of the longer side, at most
_IMAGE_AXES = 4
_NUMBERS = -2  # in the place of a label: these points are those of a regression


class Embedded(NamedTuple):
    """What the model makes of fixed points.

    Attributes:
        rows: (n, D) float32, the embeddings.
        labels: (n,) int64; -1 where there is none, as in a regression.
        predicted: (n,) int64, the class with the highest score; -1 where the model gives no scores for classes.
        losses: (n,) float32, cross-entropy of the label in nats; NaN where scores or label are missing.
        thumbnails: (n, C, h, w) float32 of at most 48 pixels a side, as the model receives them; None if not asked for
            or not images.
    """

    rows: Tensor
    labels: Tensor
    predicted: Tensor
    losses: Tensor
    thumbnails: Tensor | None


class Lenient(ScoreModel):
    """Goes on where the model's output holds no scores: embeddings need none."""

    def forward(self, images: Tensor) -> Tensor | None:  # type: ignore[override]
        try:
            return super().forward(images)
        except NoScoresError as error:
            if error.__cause__ is not None:  # the model could not be called at all
                raise
            return None


def find_place(model: nn.Module, points: Points, trainer: Any, layer: str | None) -> EmbeddingPlace:
    """Where the embedding of the user's model is; to be called inside `undisturbed`.

    Raises:
        UnreadableError: If the model can't be called with the images, or has no embedding.
    """
    sample = next(points.read(trainer, model, [0]))
    try:
        with torch.no_grad():
            return find_embedding(Lenient(model), _floating(sample.images), layer)
    except NoEmbeddingError as error:
        raise UnreadableError(str(error)) from error


def embed_points(  # noqa: PLR0913 - what it takes to run a model
    callback: InterpCallback | None,
    trainer: Any,
    model: nn.Module,
    points: Points,
    place: EmbeddingPlace,
    *,
    thumbnails: bool = False,
    last: bool = True,
) -> Embedded:
    """The embeddings of the points on the CPU, the same on all ranks; a collective where there are several.

    To be called inside `undisturbed`, on all ranks.

    Args:
        callback: Through which the ranks meet; None embeds all points here.
        trainer: The running trainer.
        model: The LightningModule.
        points: Which samples.
        place: From `find_place`.
        thumbnails: Whether to keep small images.
        last: As in `InterpCallback.meet`.

    Raises:
        UnreadableError: If the model can't be called with the images, or its embedding is not one row an image.
    """
    world, rank = (1, 0) if callback is None else (trainer.world_size, trainer.global_rank)
    rows = list(range(rank, len(points), world)) or [0]  # a rank without a share embeds one, to know the size
    packed: list[_Packed] = []

    def prepare() -> Tensor:
        packed.append(_Packed(_embed_rows(trainer, model, points, place, rows, thumbnails=thumbnails)))
        return packed[0].spread_over(len(points), rows, mine=rank < len(points))

    if callback is None or world == 1:
        return _settled(_embed_rows(trainer, model, points, place, rows, thumbnails=thumbnails))
    values = callback.meet(trainer, prepare, last=last)
    return _settled(packed[0].unpack(_ranks.total(trainer, values), len(points)))


def _settled(found: Embedded) -> Embedded:
    """Without classes if any part of the points tells that there are none: a small part of a regression may hide it."""
    if not bool((found.labels == _NUMBERS).any()):
        return found
    none = torch.full_like(found.labels, -1)
    return found._replace(labels=none, predicted=none, losses=torch.full_like(found.losses, torch.nan))


def _embed_rows(  # noqa: PLR0913
    trainer: Any, model: nn.Module, points: Points, place: EmbeddingPlace, mine: list[int], *, thumbnails: bool
) -> Embedded:
    columns = [Rows(len(mine)) for _ in Embedded._fields]
    scored = Lenient(model)
    with torch.no_grad(), embedding_tap(scored, place) as tap:
        for samples in points.read(trainer, model, mine):
            scores = scored(_floating(samples.images))
            try:
                features = tap.rows(len(samples.images))
            except NoEmbeddingError as error:
                raise UnreadableError(str(error)) from error
            found = _described(samples, features.float().cpu(), scores, thumbnails=thumbnails)
            for column, part in zip(columns, found, strict=True):
                column.drop() if part is None else column.add(part)
    rows, labels, predicted, losses, small = (column.whole() for column in columns)
    if rows is None or labels is None or predicted is None or losses is None:
        raise UnreadableError("Expected embeddings of one size for all images. Name another layer: `layer=`.")
    return Embedded(rows, labels, predicted, losses, small)


def _described(samples: FixedSamples, features: Tensor, scores: Tensor | None, *, thumbnails: bool) -> Embedded:
    unknown = torch.full((len(features),), -1)
    predicted = unknown if scores is None else scores.argmax(dim=1).cpu()
    labels = unknown if samples.labels is None else _labels(samples.labels, scores).cpu()
    losses = torch.full((len(features),), torch.nan)
    if scores is not None:
        inside = (labels >= 0) & (labels < scores.shape[1])
        each = F.cross_entropy(scores.cpu(), labels.where(inside, 0), reduction="none").float()
        losses = torch.where(inside, each, losses)
    return Embedded(features, labels, predicted, losses, _thumbnails(samples.images) if thumbnails else None)


def _labels(labels: Tensor, scores: Tensor | None) -> Tensor:
    """One class an image, -1 where there is none; `_NUMBERS` of a regression."""
    if scores is not None:
        if read_regression(scores, labels) is not None:
            return torch.full((len(labels),), _NUMBERS)
        targets = read_targets(labels, scores)
        if targets is not None:
            return targets
    whole = labels.reshape(-1) if labels.numel() == len(labels) else None
    if whole is None or (whole.is_floating_point() and bool((whole != whole.round()).any())):
        return torch.full((len(labels),), -1)
    return whole.long().clamp(min=-1)


def _thumbnails(images: Tensor) -> Tensor | None:
    if images.ndim != _IMAGE_AXES:
        return None
    height, width = images.shape[2:]
    shrink = _THUMBNAIL / max(height, width)
    small = images.float()
    if shrink < 1:
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        small = F.interpolate(small, size=size, mode="bilinear", antialias=True)
    return small.cpu()


def _floating(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float()


class _Packed:
    """An `Embedded` as one flat vector, so that the ranks meet once."""

    def __init__(self, local: Embedded) -> None:
        self._local = local

    def spread_over(self, count: int, rows: list[int], *, mine: bool) -> Tensor:
        """(n * columns,) float32, zero in the rows of other ranks."""
        local = self._local
        columns = [each[:, None].float() for each in (local.labels, local.predicted, local.losses)]
        images = [] if local.thumbnails is None else [local.thumbnails.flatten(1)]
        table = torch.cat([*columns, local.rows, *images], dim=1)
        full = torch.zeros(count, table.shape[1])
        if mine:
            full[rows] = table
        return full.flatten()

    def unpack(self, values: Tensor, count: int) -> Embedded:
        """The inverse, of the sum over ranks."""
        table, images = values.reshape(count, -1), self._local.thumbnails
        labels, predicted, losses = table[:, :3].unbind(dim=1)
        end = 3 + self._local.rows.shape[1]
        small = None if images is None else table[:, end:].reshape(count, *images.shape[1:])
        return Embedded(table[:, 3:end], labels.long(), predicted.long(), losses, small)
