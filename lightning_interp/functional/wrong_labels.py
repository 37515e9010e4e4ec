"""How many labels are wrong, judged where the neighbours in the embedding agree best.

Shape letters: N points, A anchors, C classes, K neighbours, G groups of points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_interp.functional.mislabeled import LabelVotes

_KNOWN = 0.25  # a class is known to the neighbours if so many of its members are recognised
_TWO = 2


class WrongLabels(NamedTuple):
    """An estimate of how many labels are wrong, and what it is based on.

    Attributes:
        share: Of the labels that are wrong, in [0, 1]; NaN if nothing can be said.
        disagreement: Share of the anchors whose label is not that of their neighbours, before `lift` is allowed for.
        lift: How much likelier the label of a dissenting anchor is among its own neighbours than among those of the
            other anchors of its group: 1 if the dissent has nothing to do with the image, as wrong labels have; the
            larger, the more it is images that lie between two classes. NaN without dissent.
        recognition: How well the neighbours know the given labels: balanced accuracy of their vote, 0 at chance, 1
            if it is always right.
        anchors: Number of points that it rests on.
    """

    share: float
    disagreement: float
    lift: float
    recognition: float
    anchors: int


_NOTHING = WrongLabels(math.nan, math.nan, math.nan, math.nan, 0)


def wrong_label_share(votes: LabelVotes) -> WrongLabels:
    """How many labels are wrong, judged at the points whose neighbours agree best among themselves.

    Points are grouped by the label that wins the vote of their neighbours (their own label has no vote). Of each group
    the half with the largest winning shares are its anchors. With each group counted by its size,

        disagreement = share of the anchors whose given label is not the winner,
        share        = disagreement * min(1, max(0, 2 - lift)).

    A label that was mistaken without regard to the image is as frequent at the anchors as anywhere, whereas images that
    are hard to tell, or that the network can't tell yet, are rare there, and what label they have shows in the
    votes of their neighbours: that is `lift`, the mean of [label is b] * (votes for b) over the product of the means.

    Only classes with at least K points that are recognised at least now and then (a quarter of them) are counted. An
    embedding that knows nothing of the classes makes every label look wrong: heed `recognition`, trust 0.5 and more.

    It can't tell wrong labels at images that look like both classes from hard images, and it misses labels that are
    wrong for most images of one look. It falls when the embedding has learned the wrong labels by heart.

    Measured on 1,797 real digits with small CNNs after 5 epochs (`benchmarks/flipped_labels.py`), where 0, 5, 10, 20
    and 40 % of the labels were moved to any other class: 0.1, 4.6, 10.1, 19.6 and 39.0 % plain, 0.1, 3.9, 10.3, 19.1
    and 37.2 % with BatchNorm, 0.6, 2.5, 7.1, 15.5 and 25.1 % with classes imbalanced 20 to 1 (rare classes are not
    counted), and 0.0, 0.0, 5.4, 19.6 and 39.9 % on images with noise of one standard deviation added. After 20 epochs,
    when they are half learned by heart: 0.0, 0.9, 8.5, 17.2 and 36.6 % plain, but 0.0, 1.9, 0.0, 3.7 and 17.7 % with
    BatchNorm.

    Args:
        votes: Of at least some hundred points, see `label_votes`; with about 20 neighbours.

    Returns:
        The estimate; `share` is NaN with fewer than two classes that have K points, or without neighbours.

    Cost: N K log(N K).
    Source: judging the noise where the class is certain: anchor points, Liu and Tao 2016, section 5; confident
    disagreement: Northcutt et al. 2021, section 3. The vote as judge and the lift are this package's own.

    Example:
        >>> from lightning_interp.functional.mislabeled import label_votes
        >>> noise = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> points = torch.eye(2).repeat_interleave(100, dim=0) + 0.1 * noise
        >>> labels = torch.arange(200) // 100
        >>> labels[::20] = 1 - labels[::20]
        >>> 0.01 < wrong_label_share(label_votes(points, labels)).share < 0.1
        True
    """
    asked = votes.given.isfinite().nonzero()[:, 0]
    neighbors = votes.neighbor_labels.shape[1]
    if not len(asked) or not neighbors:
        return _NOTHING
    table = torch.cat([votes.labels[asked, None], votes.suggested[asked, None], votes.neighbor_labels[asked]], dim=1)
    names, table = torch.unique(table, return_inverse=True)
    own_N, around_NK = table[:, 0], table[:, 2:]
    dissents = _outvoted(votes.margin[asked], own_N, table[:, 1], around_NK)
    winner_N = torch.where(dissents, table[:, 1], own_N)
    sizes_C = torch.bincount(own_N, minlength=len(names))
    recall_C = torch.bincount(own_N[~dissents], minlength=len(names)) / sizes_C.clamp(min=1)
    large_C = sizes_C >= neighbors
    count = int(large_C.sum())
    if count < _TWO:
        return _NOTHING
    recognition = (float(recall_C[large_C].mean()) - 1 / count) / (1 - 1 / count)
    counted_N = dissents & (large_C & (recall_C >= _KNOWN))[own_N]
    chosen, weight_A = _anchors(winner_N, torch.maximum(votes.given, votes.other)[asked])
    disagreement = float((weight_A * counted_N[chosen]).sum() / weight_A.sum())
    dissenters = _Dissent(own_N[chosen], around_NK[chosen], winner_N[chosen], counted_N[chosen], weight_A)
    lift = dissenters.lift(len(names))
    factor = min(1.0, max(0.0, 2 - lift)) if math.isfinite(lift) else 1.0
    return WrongLabels(disagreement * factor, disagreement, lift, recognition, len(chosen))


def _outvoted(margin: Tensor, own: Tensor, other: Tensor, around: Tensor) -> Tensor:
    """Whether the other label wins; of equally many votes the nearest decides, not what the label should be."""
    first_own, first_other = ((around == label[:, None]).int().argmax(dim=1) for label in (own, other))
    return (margin > 0) | ((margin == 0) & (first_other < first_own))


def _anchors(winner: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """(A,) indices of the points at or above the median winning share of their group; how many each stands for."""
    order = winner.argsort(stable=True)
    chosen, weights = [], []
    for group in torch.tensor_split(order, torch.bincount(winner).cumsum(0)[:-1].cpu()):
        if len(group):
            level = share[group].sort().values[len(group) // 2]
            best = group[share[group] >= level]
            chosen.append(best)
            weights.append(torch.full_like(best, len(group) / len(best), dtype=torch.float64))
    return torch.cat(chosen), torch.cat(weights)


@dataclass(frozen=True)
class _Dissent:
    """Anchors: label, labels around, group, whether it dissents, weight; (A,), but `around` (A, K)."""

    own: Tensor
    around: Tensor
    group: Tensor
    counted: Tensor
    weight: Tensor

    def lift(self, classes: int) -> float:
        """Observed over expected votes for the labels of the dissenting anchors; NaN without any."""
        if not self.counted.any():
            return math.nan
        own_votes = (self.around == self.own[:, None]).sum(dim=1)
        observed = float((self.weight * self.counted * own_votes).sum())
        # Pairs of a group and a dissenting label: few, where a matrix of all classes would not fit.
        pairs, which = torch.unique((self.group * classes + self.own)[self.counted], return_inverse=True)
        dissent = torch.zeros(len(pairs), dtype=torch.float64, device=pairs.device)
        votes, totals = torch.zeros_like(dissent), dissent.new_zeros(classes)
        dissent.index_add_(0, which, self.weight[self.counted])
        codes = self.group[:, None] * classes + self.around
        at = torch.searchsorted(pairs, codes).clamp(max=len(pairs) - 1)
        votes.index_add_(0, at.flatten(), ((pairs[at] == codes) * self.weight[:, None]).flatten())
        totals.index_add_(0, self.group, self.weight)
        expected = float((dissent * votes / totals[pairs // classes]).sum())
        return observed / expected if expected else 1.0
