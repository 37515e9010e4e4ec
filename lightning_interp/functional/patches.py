"""Which images, and where in them, excite each filter of a layer most; and what of the image does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp._options import check_positive_int
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.gradients import NO_PIXEL_GRADIENT, gradients_of
from lightning_interp.functional.reach import Units, channels_second, check_layer, find_units, reach
from lightning_interp.functional.rectifiers import Rectifiers
from lightning_interp.functional.undisturbed import undisturbed


class PatchRanking(NamedTuple):
    """The strongest activations of each filter, one candidate an image.

    Attributes:
        values: (filters, k), largest first.
        indices: (filters, k), index of the image; -1 (value minus infinity) where there were fewer images.
        positions: (filters, k), index into the flattened grid of the activation; the first of equals.
    """

    values: Tensor
    indices: Tensor
    positions: Tensor


class PatchRanker:
    """Ranks batch by batch, with a memory of k candidates a filter; waits for no device.

    Example:
        >>> ranker = PatchRanker(k=2)
        >>> for index, value in enumerate([3.0, 1.0, 4.0, 1.0, 5.0]):
        ...     ranker.update(torch.tensor([[[0.0, value]]]), torch.tensor([index]))
        >>> ranker.ranking
        PatchRanking(values=tensor([[5., 4.]]), indices=tensor([[4, 2]]), positions=tensor([[1, 1]]))
    """

    def __init__(self, k: int) -> None:
        """Starts empty.

        Args:
            k: Candidates that are kept for each filter.
        """
        check_positive_int("k", k)
        self.k = k
        self._best: PatchRanking | None = None

    def update(self, activation: Tensor, indices: Tensor) -> None:
        """Takes the activations of one batch.

        Args:
            activation: (N, filters, *grid); NaN never ranks.
            indices: (N,), int64, of these images, each of them once in all.
        """
        flat_NCP = activation.detach().flatten(2) if activation.ndim > 2 else activation.detach()[..., None]
        values_NC, positions_NC = flat_NCP.max(dim=2)  # NaN is the maximum wherever there is one
        values = values_NC.float() if values_NC.dtype in (torch.float16, torch.bfloat16) else values_NC
        values = values.masked_fill(values.isnan(), -torch.inf)
        indices_NC = indices.to(values.device)[:, None].expand_as(values)
        batch = PatchRanking(values.T, indices_NC.T, positions_NC.T)
        self._best = _best(self.k, batch if self._best is None else _beside(self._best, batch))

    @property
    def ranking(self) -> PatchRanking:
        """The best so far, (filters, at most k).

        Raises:
            ValueError: If there was no batch.
        """
        if self._best is None:
            raise ValueError("Expected at least one batch before a ranking, but got none: call `update` first.")
        return self._best


def rank_patches(model: nn.Module, layer: str, batches: Iterable[Tensor], *, k: int) -> PatchRanking:
    """The k images that excite each filter of a layer most, over all batches.

    One candidate an image, its strongest position; ties go to the lower index.

    Args:
        model: `model(images)`; runs in eval mode, nothing of it is changed.
        layer: Name in `model.named_modules()`: a layer with filters, whose activation counts
            (`functional/tracing.py`), or any other module, whose output counts.
        batches: Tensors of images (N, ...). Images are numbered through from 0.
        k: Images per filter; fewer where there are fewer.

    Returns:
        On the device of the model. `functional.receptive_field` says what a position sees.

    Raises:
        ArgumentError: If there is no batch or no such layer.

    Cost: one forward per batch as far as the layer, one more of two images; memory filters * k * 20 bytes.
    Source: Zeiler and Fergus 2013, figure 2; Girshick et al. 2013, section 3.1.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        >>> images = torch.rand(8, 1, 4, 4)
        >>> rank_patches(net, "0", images.split(4), k=3).indices.shape
        torch.Size([2, 3])
    """
    ranker = PatchRanker(k)
    units: Units | None = None
    count = 0
    with undisturbed(model, training=False):
        for images in batches:
            if units is None:
                units = find_units(model, _two(images))
                check_layer(model, layer, units)
            activation = channels_second(reach(model, images, layer, units), len(images))
            ranker.update(activation, torch.arange(count, count + len(images)))
            count += len(images)
    if not count:
        raise ArgumentError("Expected argument `batches` to hold at least one image, but got none.")
    return ranker.ranking


def merge_rankings(rankings: Sequence[PatchRanking], *, k: int) -> PatchRanking:
    """One ranking out of several over different images; an image in more than one of them counts once.

    Args:
        rankings: At least one, of the same filters, on the same device.
        k: Images per filter.
    """
    joined = rankings[0]
    for ranking in rankings[1:]:
        joined = _beside(joined, ranking)
    by_index = _sorted(joined, joined.indices.argsort(dim=1, stable=True))
    repeated = torch.zeros_like(by_index.indices, dtype=torch.bool)
    repeated[:, 1:] = by_index.indices[:, 1:] == by_index.indices[:, :-1]
    once = PatchRanking(
        by_index.values.masked_fill(repeated, -torch.inf),
        by_index.indices.masked_fill(repeated, -1),
        by_index.positions.masked_fill(repeated, -1),
    )
    best = _best(k, once)
    most = int((best.indices >= 0).sum(dim=1).max())
    return PatchRanking(*(part[:, : max(1, most)] for part in best))


def project_patches(  # noqa: PLR0913 - three of them say which activation of each image
    model: nn.Module,
    images: Tensor,
    layer: str,
    filters: Tensor,
    positions: Tensor,
    *,
    units: Units | None = None,
    call: Callable[[Tensor], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """What of each image makes one position of one filter fire: guided backpropagation from there.

    Args:
        model: Runs in eval mode, nothing of it is changed.
        images: (M, C, *sides).
        layer: As in `rank_patches`.
        filters: (M,), the filter for each image.
        positions: (M,), the position for each image, as in `PatchRanking`.
        units: From `find_units`, where it has been called.
        call: How to run the model, if not by calling it.

    Returns:
        The gradient (M, C, *sides), signed, zero outside the receptive field; and the activations (M,).

    Cost: one forward as far as the layer, and its backward.
    Source: Springenberg et al. 2014, section 3.4; Zeiler and Fergus 2013, figure 2, with the deconvnet.
    """
    with undisturbed(model, training=False, gradients=True):
        if units is None:
            units = find_units(model, _two(images), call=call)
            check_layer(model, layer, units)
        watched = images.detach().clone().requires_grad_(True)
        with Rectifiers("guided_backprop"):
            activation = channels_second(reach(model, watched, layer, units, call=call), len(images))
        rows = torch.arange(len(images), device=activation.device)
        chosen = activation.flatten(2) if activation.ndim > 2 else activation[..., None]
        values = chosen[rows, filters.to(activation.device), positions.to(activation.device)]
        (gradient,) = gradients_of(values.sum(), [watched]) if values.requires_grad else (None,)
    if gradient is None:
        raise RuntimeError(NO_PIXEL_GRADIENT)
    return gradient.detach(), values.detach()


def _two(images: Tensor) -> Tensor:
    return images[:2] if len(images) > 1 else images.repeat(2, *[1] * (images.ndim - 1))


def _beside(first: PatchRanking, second: PatchRanking) -> PatchRanking:
    return PatchRanking(*(torch.cat(parts, dim=1) for parts in zip(first, second, strict=True)))


def _best(k: int, ranking: PatchRanking) -> PatchRanking:
    """The k largest, the lower index first among equals: two stable sorts."""
    by_index = _sorted(ranking, ranking.indices.argsort(dim=1, stable=True))
    order = by_index.values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return _sorted(by_index, order)


def _sorted(ranking: PatchRanking, order: Tensor) -> PatchRanking:
    return PatchRanking(*(part.gather(1, order) for part in ranking))
