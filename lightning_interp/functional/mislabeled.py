"""Training images whose label looks wrong: scores and suggestions.

Shape letters: N points, D features, C classes, K neighbours, B points of a chunk.

Two witnesses are heard. The network: its loss at each training image, averaged over the training so far, since a wrong
label is learned late or by heart. The neighbours of the image in the embedding: which labels they have. Neither is
asked about an image with the label of that image in view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_interp._options import check_positive_int, expected

_CHUNK_VALUES = 2**24  # of cosines at a time: 64 MB
_ROWS = 2**13  # of votes counted at a time
_OFFSET = 1.05  # vote margins begin at -1: a score stays above 0, so that the loss still orders unanimous points
_BINS = 50
_MATRIX = 2


@dataclass(frozen=True)
class LabelVotes:
    """What the nearest points in the embedding say about the label of each point.

    Attributes:
        labels: (N,), int64, the given ones.
        given: (N,), share of the neighbours with the given label, in [0, 1]; NaN where nobody could be asked.
        other: (N,), largest share of another label.
        suggested: (N,), int64, that label; the given one where no neighbour has another.
        neighbor_labels: (N, K), int64, the nearest first; -1 where nobody could be asked.
    """

    labels: Tensor
    given: Tensor
    other: Tensor
    suggested: Tensor
    neighbor_labels: Tensor

    @property
    def disagreement(self) -> Tensor:
        """(N,), share of the neighbours with another label."""
        return 1 - self.given

    @property
    def margin(self) -> Tensor:
        """(N,), in [-1, 1]: by how much the strongest other label outvotes the given one."""
        return self.other - self.given


class Suspects(NamedTuple):
    """Training images, the most suspicious first.

    Attributes:
        indices: (M,), int64, into the arguments.
        scores: (M,), float64, descending.
        given: (M,), int64, their labels.
        suggested: (M,), int64, labels that fit better.
    """

    indices: Tensor
    scores: Tensor
    given: Tensor
    suggested: Tensor


def label_votes(embeddings: Tensor, labels: Tensor, *, neighbors: int = 20) -> LabelVotes:
    """The labels of the nearest other points, by the angle between embeddings, exact.

    Args:
        embeddings: (N, D), floating. A point with a NaN or an infinity, or of length 0, has no votes and casts none.
        labels: (N,), class indices, at least 0.
        neighbors: K; at most N - 1 are taken.

    Returns:
        The votes, on the device of `embeddings`. Of several other labels with equally many votes the one wins whose
        nearest member is nearest.

    Raises:
        ArgumentError: If a shape or a type is wrong or `neighbors` is not positive.

    Cost: N^2 D time in float32, N (D + K) + 2^24 values of memory; 0.5 s of one core for 5,000 points of 512.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
        >>> votes = label_votes(points, torch.tensor([5, 5, 7, 7]), neighbors=2)
        >>> votes.given, votes.suggested
        (tensor([0.5000, 0.5000, 0.0000, 0.5000]), tensor([7, 7, 5, 5]))
    """
    _check(embeddings, labels, neighbors)
    labels = labels.detach().to(embeddings.device, torch.int64)
    rows = embeddings.detach()
    # Each row by its largest magnitude first: squares of very large or small numbers would leave float32.
    rows = F.normalize((rows / rows.abs().amax(dim=1, keepdim=True)).float(), dim=1) if rows.numel() else rows
    asked = rows.isfinite().all(dim=1).nonzero()[:, 0] if rows.numel() else labels[:0]
    count = min(neighbors, max(len(asked) - 1, 0))
    found = labels.new_full((len(labels), count), -1)
    if count:
        found[asked] = labels[asked][_nearest(rows[asked], count)]
    return _tally(labels, found)


def knn_disagreement(embeddings: Tensor, labels: Tensor, *, neighbors: int = 20) -> Tensor:
    """Share of the nearest other points whose label is another one.

    Args:
        embeddings: (N, D), floating.
        labels: (N,), class indices, at least 0.
        neighbors: At most N - 1 are taken.

    Returns:
        (N,), unitless, in [0, 1]; NaN where nobody could be asked, see `label_votes`.

    Raises:
        ArgumentError: If a shape or a type is wrong or `neighbors` is not positive.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
        >>> knn_disagreement(points, torch.tensor([5, 5, 7, 7]), neighbors=2)
        tensor([0.5000, 0.5000, 1.0000, 0.5000])
    """
    return label_votes(embeddings, labels, neighbors=neighbors).disagreement


def suspicion(mean_loss: Tensor, vote_margin: Tensor | None = None) -> Tensor:
    """One score of both witnesses: mean loss * (1.05 + vote margin).

    Measured on 1,797 real digits with a small CNN (three seeds, `benchmarks/flipped_labels.py`), 10 % of the labels
    changed; AUROC / precision at the number of changed labels, after 3, 15 and 40 epochs. To any other class: mean
    loss alone .994/.889, .999/.969, 1.000/.974; vote margin alone .997/.937, 1.000/.976, 1.000/.981; both
    .998/.941, 1.000/.976, 1.000/.978; the loss of the final network .997/.930, .999/.970, .990/.874. To the class that
    it is taken for most easily: mean loss .985/.822, .997/.915, .999/.956; vote margin .996/.930, .999/.957,
    1.000/.974; both .996/.902, .998/.943, .999/.970; final loss .986/.815, .997/.924, .976/.815. So the votes alone
    are as good on easy images, both together are better on hard ones, and the loss needs no embedding.

    Args:
        mean_loss: (N,), cross-entropy under the given label, averaged over the training so far, in nats.
        vote_margin: (N,), `LabelVotes.margin`, best averaged over the training as well: late in a training the
            embedding has learned the wrong labels too. NaN for points that were not embedded: they get the mean
            of those with a similar loss. None: the loss alone decides.

    Returns:
        (N,), float64, at least 0, the larger the more suspicious; NaN where the loss is not finite.

    Raises:
        ArgumentError: If a shape is wrong.

    Example:
        >>> suspicion(torch.tensor([0.1, 2.0, 2.0]), torch.tensor([-1.0, 1.0, -1.0]))
        tensor([0.0050, 4.1000, 0.1000], dtype=torch.float64)
    """
    if mean_loss.ndim != 1:
        raise expected("mean_loss", "a tensor (N,)", tuple(mean_loss.shape))
    loss = mean_loss.detach().to("cpu", torch.float64)
    loss = torch.where(loss.isfinite(), loss, math.nan)
    if vote_margin is None:
        return loss
    if vote_margin.shape != mean_loss.shape:
        raise expected("vote_margin", f"a tensor of shape {tuple(mean_loss.shape)}", tuple(vote_margin.shape))
    return loss * (_OFFSET + _filled_in(loss, vote_margin.detach().to("cpu", torch.float64)))


def rank_suspects(
    scores: Tensor,
    labels: Tensor,
    rivals: Tensor,
    votes: LabelVotes | None = None,
    *,
    count: int | None = None,
) -> Suspects:
    """The points in the order of their scores, with a label that fits better.

    Suggested is what most neighbours say, where these outvote the given label; else the network's own second choice.

    Args:
        scores: (N,), for example of `suspicion`; points whose score is not finite are left out.
        labels: (N,), the given ones.
        rivals: (N,), the class that scored highest besides the given one; negative where it is not known.
        votes: Of the same points, or None.
        count: Most points that are returned; None for all.

    Returns:
        The ranked points, on the CPU; equal scores in the order of their index.

    Raises:
        ArgumentError: If a shape or `count` is wrong.

    Example:
        >>> ranked = rank_suspects(torch.tensor([0.1, 3.0]), torch.tensor([4, 9]), torch.tensor([9, 4]), count=1)
        >>> ranked.indices, ranked.given, ranked.suggested
        (tensor([1]), tensor([9]), tensor([4]))
    """
    check_positive_int("count", count, optional=True)
    for argument, value in (("labels", labels), ("rivals", rivals)):
        if value.shape != scores.shape or scores.ndim != 1:
            raise expected(argument, f"a tensor of shape {tuple(scores.shape[:1])}", tuple(value.shape))
    labels, suggested = labels.detach().cpu().long(), rivals.detach().cpu().long()
    suggested = torch.where(suggested < 0, labels, suggested)
    if votes is not None:
        if votes.labels.shape != scores.shape:
            raise expected("votes", f"votes on {len(scores)} points", len(votes.labels))
        suggested = torch.where((votes.margin > 0).cpu(), votes.suggested.cpu(), suggested)
    values = scores.detach().to("cpu", torch.float64)
    finite = values.isfinite().nonzero()[:, 0]
    order = finite[values[finite].argsort(descending=True, stable=True)][:count]
    return Suspects(order, values[order], labels[order], suggested[order])


def _check(embeddings: Tensor, labels: Tensor, neighbors: int) -> None:
    if embeddings.ndim != _MATRIX or not embeddings.is_floating_point():
        raise expected("embeddings", "a floating tensor (N, D)", f"{tuple(embeddings.shape)} {embeddings.dtype}")
    whole = not labels.is_floating_point() and not labels.is_complex()
    if not whole or labels.shape != embeddings.shape[:1] or (labels < 0).any():
        found = f"{tuple(labels.shape)} {labels.dtype}" + (" with negative values" if whole else "")
        raise expected("labels", f"a tensor of {len(embeddings)} class indices, one for each point", found)
    check_positive_int("neighbors", neighbors)


def _nearest(rows: Tensor, count: int) -> Tensor:
    """(N, K) indices of the rows at the smallest angle, never the row itself; rows have length 1."""
    parts = []
    for chunk in torch.arange(len(rows), device=rows.device).tensor_split(len(rows) ** 2 // _CHUNK_VALUES + 1):
        cosines_BN = rows[chunk] @ rows.T
        cosines_BN[torch.arange(len(chunk), device=rows.device), chunk] = -math.inf
        parts.append(cosines_BN.topk(count, dim=1).indices)
    return torch.cat(parts)


def _tally(labels: Tensor, found: Tensor) -> LabelVotes:
    given, other, suggested = [], [], []
    for rows in torch.arange(len(labels), device=labels.device).tensor_split(len(labels) // _ROWS + 1):
        own_B, found_BK = labels[rows], found[rows]
        if not found.shape[1]:
            found_BK = found_BK.new_full((len(own_B), 1), -1)
        votes_BK = (found_BK[:, :, None] == found_BK[:, None, :]).sum(dim=2)
        votes_BK = votes_BK.masked_fill(found_BK == own_B[:, None], 0)
        most_B1 = votes_BK.amax(dim=1, keepdim=True)
        first_B1 = (votes_BK == most_B1).int().argmax(dim=1, keepdim=True)  # of equal ones, the nearest
        asked_B = found_BK[:, 0] >= 0
        share = torch.where(asked_B, 1.0 / found_BK.shape[1], math.nan)
        given.append((found_BK == own_B[:, None]).sum(dim=1) * share)
        other.append(most_B1[:, 0] * share)
        suggested.append(torch.where(asked_B, found_BK.gather(1, first_B1)[:, 0], own_B))
    return LabelVotes(labels, torch.cat(given), torch.cat(other), torch.cat(suggested), found)


def _filled_in(loss: Tensor, margin: Tensor) -> Tensor:
    """The margins; where there is none, the mean of those with a similar loss, by ranks."""
    known = (margin.isfinite() & loss.isfinite()).nonzero()[:, 0]
    unknown = (~margin.isfinite() & loss.isfinite()).nonzero()[:, 0]
    if not len(known) or not len(unknown):
        return torch.where(margin.isfinite(), margin, 0.0)
    order = known[loss[known].argsort(stable=True)]
    bins = order.tensor_split(min(_BINS, len(order)))
    means = torch.stack([margin[part].mean() for part in bins])
    edges = torch.stack([loss[part[-1]] for part in bins[:-1]]) if len(bins) > 1 else loss[:0]
    filled = margin.clone()
    filled[unknown] = means[torch.searchsorted(edges, loss[unknown])]
    return torch.where(filled.isfinite(), filled, 0.0)
