"""Sums per training sample: on the device while batches come in, on the CPU once they are put together over ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

_CLASS_BITS = 24  # of `Since.beaten`; the rest counts batches, and both together fit into a float64
MOST_CLASSES = 1 << _CLASS_BITS
_DRIFT, _FEW = 0.2, 4  # labels that change under an index: the share, and the number, from which it is no correction


class SampleScores(NamedTuple):
    """What the training has said about each sample.

    Attributes:
        losses: (n,) float64, mean cross-entropy of the given label in nats; NaN for a sample that never counted.
        margins: (n,) float64, mean of the score of the given label less the largest other score, in the unit of the
            scores: the area under the margin (Pleiss et al. 2020); NaN likewise.
        labels: (n,) int64, the given label; -1 likewise.
        suggested: (n,) int64, the class with the highest score when the given label was last beaten; -1 where it
            never was.
        counts: (n,) int64, in how many batches the sample counted.
    """

    losses: Tensor
    margins: Tensor
    labels: Tensor
    suggested: Tensor
    counts: Tensor


@dataclass
class Since:
    """Sums over some batches, all (n,) on the device of the scores.

    Attributes:
        losses: float32.
        margins: float32.
        counts: int32.
        labels: int32, -1 where there is none.
        beaten: int64, number of the batch * 2^24 + class when the label was last beaten; -1 if it never was.
        drift: (2,) int64: how often a sample had another label than before, and how often there was a before.
    """

    losses: Tensor
    margins: Tensor
    counts: Tensor
    labels: Tensor
    beaten: Tensor
    drift: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Since:
        """Without any batch."""
        return cls(
            losses=torch.zeros(size, device=device, dtype=torch.float32),
            margins=torch.zeros(size, device=device, dtype=torch.float32),
            counts=torch.zeros(size, device=device, dtype=torch.int32),
            labels=torch.full((size,), -1, device=device, dtype=torch.int32),
            beaten=torch.full((size,), -1, device=device, dtype=torch.int64),
            drift=torch.zeros(2, device=device, dtype=torch.int64),
        )

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU by name."""
        return {field.name: getattr(self, field.name).to("cpu", copy=True) for field in fields(self)}

    def to(self, device: torch.device) -> Since:
        """On another device; itself where it is there."""
        if self.losses.device == device:
            return self
        return Since(**{name: tensor.to(device) for name, tensor in self.state().items()})

    def add(self, at: Tensor, labels: Tensor, scores: Tensor, batch: int) -> None:
        """Adds one batch without waiting for the device: nothing is selected, what does not count adds nothing.

        Args:
            at: (N,) int64, indices of the samples.
            labels: (N,), integers; those that are no class do not count.
            scores: (N, C), of any floating type.
            batch: Its number.
        """
        # No operation that the deterministic algorithms of any version of torch refuse: no `nll_loss`, no scatter.
        scores = scores if scores.dtype is torch.float64 else scores.float()
        classes = scores.shape[1]
        given = labels.long().clamp(0, classes - 1)
        losses = -scores.log_softmax(dim=1).gather(1, given[:, None]).squeeze(1)
        is_given = torch.arange(classes, device=scores.device) == given[:, None]
        rival, rival_class = scores.masked_fill(is_given, -torch.inf).max(dim=1)
        margins = scores.gather(1, given[:, None]).squeeze(1) - rival
        counted = (labels >= 0) & (labels < classes) & losses.isfinite() & margins.isfinite()
        self.losses.index_add_(0, at, torch.where(counted, losses, 0.0).float())
        self.margins.index_add_(0, at, torch.where(counted, margins, 0.0).float())
        self.counts.index_add_(0, at, counted.int())
        before = self.labels[at]
        again = counted & (before >= 0)
        self.drift += torch.stack([(again & (before != given)).sum(), again.sum()])
        # Of a sample that is twice in the batch, either may be the last.
        self.labels[at] = torch.where(counted, given, before).int()
        code = (batch << _CLASS_BITS) + rival_class
        self.beaten[at] = torch.where(counted & (margins < 0), code, self.beaten[at])


@dataclass
class Merged:
    """Sums over all batches of all ranks, all (n,) on the CPU: float64 twice, int64 three times."""

    losses: Tensor
    margins: Tensor
    labels: Tensor
    suggested: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, size: int) -> Merged:
        """Without any batch."""
        zeros, none = torch.zeros(size, device="cpu", dtype=torch.float64), torch.full((size,), -1, device="cpu")
        return cls(zeros, zeros.clone(), none, none.clone(), zeros.long())

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Merged:
        """The inverse of `state`."""
        return cls(**{name: part.clone() if part.is_floating_point() else part.long() for name, part in state.items()})

    def state(self) -> dict[str, Tensor]:
        """Copies by name, integers as int32: 28 bytes a sample."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part.clone() if part.is_floating_point() else part.int() for name, part in parts.items()}

    def scores(self) -> SampleScores:
        """The means, as copies."""
        counts = self.counts.double()  # 0 / 0 is NaN
        means = (self.losses / counts, self.margins / counts)
        return SampleScores(*means, self.labels.clone(), self.suggested.clone(), self.counts.clone())

    def add(self, since: Since) -> bool:
        """Adds sums of all ranks; says whether too many labels have changed."""
        again = (self.labels >= 0) & (since.labels >= 0)
        changed = again & (self.labels != since.labels)
        drifted = int(since.drift[0] + changed.sum())
        for name in ("losses", "margins", "counts"):
            before = getattr(self, name)
            before.masked_fill_(changed, 0).add_(getattr(since, name))
        self.labels = torch.where(since.labels >= 0, since.labels, self.labels)
        self.suggested.masked_fill_(changed, -1)
        latest = since.beaten & (MOST_CLASSES - 1)
        self.suggested = torch.where(since.beaten >= 0, latest, self.suggested)
        return drifted >= _FEW and drifted > _DRIFT * int(since.drift[1] + again.sum())
