"""Watches the labels of the training set: the loss of each sample in the loop, and the neighbours in the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_interp.callbacks._embedded import Embedded
from lightning_interp.callbacks._influential import usable
from lightning_interp.callbacks._regression import about_classes
from lightning_interp.callbacks._sample_losses import SampleLosses
from lightning_interp.callbacks._sample_order import SampleOrder
from lightning_interp.functional.mislabeled import LabelVotes, Suspects, label_votes, rank_suspects, suspicion
from lightning_interp.functional.wrong_labels import WrongLabels, wrong_label_share


class LabelWatch:
    """What one run says about its labels.

    Attributes:
        order: In which the training samples come.
        losses: Of each training sample, collected in the loop.
        wrong: How many labels look wrong, as of the last look.
    """

    def __init__(self, neighbors: int) -> None:
        """Begins empty.

        Args:
            neighbors: That are asked for their label.
        """
        self.order = SampleOrder()
        self.losses = SampleLosses()
        self.wrong: WrongLabels | None = None
        self._neighbors = neighbors
        self._votes: LabelVotes | None = None
        self._rows = torch.empty(0, dtype=torch.int64)  # of the points that had votes
        self._step = -1  # of the last look
        self._points = torch.empty(2, 0, dtype=torch.int64)  # index and label of each
        self._sums = torch.zeros(3, 0, dtype=torch.float64)  # over the looks: margins, losses, how many

    @property
    def limit(self) -> str | None:
        """Why the losses of all samples are not known, or None; one batch that can't be read is one too many."""
        reason = self.losses.reason or self.order.reason
        if reason is not None or bool(self.losses.means().counts.any()):
            return reason
        return "the last Linear layer does not return a score for each class"

    def release(self) -> None:
        """Takes everything off the model and the loader."""
        self.order.remove()
        self.losses.close()

    def look(self, points: Embedded, indices: Tensor, step: int) -> None:
        """Asks the neighbours of all points with a label and a finite embedding.

        Args:
            points: As embedded now.
            indices: (n,), of the points in the training set.
            step: When; a step that was looked at before a resume does not count twice.
        """
        self._begin(torch.stack([indices, points.labels]))
        self._rows = usable(points)
        self._votes = label_votes(points.rows[self._rows], points.labels[self._rows], neighbors=self._neighbors)
        self.wrong = wrong_label_share(self._votes)
        margin, loss = self._votes.margin.double(), points.losses[self._rows].double()
        fit = margin.isfinite()
        if step > self._step:
            self._step = step
            # Without scores there is no loss: then the neighbours alone are heard, see `rank`.
            self._sums[:, self._rows[fit]] += torch.stack([margin, loss, torch.ones_like(margin)])[:, fit]

    def _begin(self, points: Tensor) -> None:
        """Drops what was said of other points, and of other labels."""
        if self._points.shape != points.shape or bool((self._points[0] != points[0]).any()):
            self._sums, self._step = torch.zeros(3, points.shape[1], dtype=torch.float64), -1
        else:
            self._sums[:, self._points[1] != points[1]] = 0
        self._points = points

    def rank(self, count: int) -> Suspects:
        """The samples of the training set as of the last look, the most suspicious first.

        Where the losses of all samples are not known, the points are ranked alone, by their losses at the looks.

        Args:
            count: Most samples.

        Returns:
            The ranking, by index in the training set.
        """
        (indices, labels), (margins, looked, looks) = self._points, self._sums
        if self.limit is not None:
            rivals, places = torch.full_like(labels, -1), torch.arange(len(labels))
            losses = looked / looks
            if not bool(losses.isfinite().any()):
                losses = torch.where(looks > 0, 1.0, torch.nan)  # of a model without scores: the neighbours decide
            ranked = self._ranked(losses, margins / looks, labels, rivals, places, count)
            return ranked._replace(indices=indices[ranked.indices])
        scores = self.losses.means()
        around = torch.full_like(scores.losses, torch.nan)
        around[indices] = margins / looks
        return self._ranked(scores.losses, around, scores.labels, scores.suggested, indices, count)

    def _ranked(  # noqa: PLR0913, PLR0917
        self, losses: Tensor, margins: Tensor, labels: Tensor, rivals: Tensor, places: Tensor, count: int
    ) -> Suspects:
        """`places`: of the points among the samples; where their neighbours outvote the label, they name its rival."""
        if self._votes is not None:
            outvoted = self._votes.margin.cpu() > 0
            rivals[places[self._rows[outvoted]]] = self._votes.suggested.cpu()[outvoted]
        values = suspicion(losses, margins)
        return rank_suspects(torch.where(labels >= 0, values, torch.nan), labels, rivals, count=count)

    def state_dict(self) -> dict[str, Any]:
        """Sums, safe in a checkpoint."""
        looks = {"step": self._step, "points": self._points.clone(), "sums": self._sums.clone()}
        return {"losses": self.losses.state_dict(), "looks": looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; before the losses are opened."""
        self.losses.load_state_dict(state["losses"])
        looks = state["looks"]
        self._step, self._points, self._sums = looks["step"], looks["points"].clone(), looks["sums"].clone()


def no_classes(labels: Tensor | None) -> str | None:
    """Why these labels of a batch are not one class a sample, and what to do; None if they are, or none is given."""
    way_out = "Give the LightningModule a method `interp_batch(batch)` that returns (images, labels)."
    if labels is None:
        return f"Influence needs labels, but the batches hold none. {way_out}"
    rows = labels.reshape(len(labels), -1).double()
    several = rows.shape[1] > 1
    if several and (labels.ndim > 2 or bool(((rows.sum(dim=1) - 1).abs() > 1e-3).any())):
        pixels = labels.ndim > 2 and not labels.is_floating_point()
        kind = "several labels an image" if about_classes(rows) else "a regression, it seems"
        kind = "a class for each pixel, it seems" if pixels else kind
        return (
            "Influence needs one class an image, but got labels of shape "
            f"{tuple(labels.shape)} that are no probabilities: {kind}. {way_out}"
        )
    if not several and bool((rows != rows.round()).any()):
        return f"Influence needs classes, but got labels like {float(rows[rows != rows.round()][0]):.4g}. {way_out}"
    return None
