"""From embeddings to what is shown of influence: the training points that a test point hangs on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_interp.callbacks._embedded import Embedded
from lightning_interp.functional.influence import HeadInfluence
from lightning_interp.functional.softmax_head import SoftmaxHead
from lightning_interp.render.sheets import MAX_SHOWN

MOST_WEIGHTS = 2_500
"""Of the head. Time goes with the third power: see the figures in `Influence`."""
_LEAST_AXES = 32  # of the embedding; before it has fewer, classes are left out


class Effect(NamedTuple):
    """What leaving out a training point does to the loss of a test point.

    Attributes:
        row: Of the training point.
        predicted: Change of the test loss in nats, by influence functions.
        actual: The same after refitting the head without the point; NaN for what is in no picture.
    """

    row: int
    predicted: float
    actual: float


class Hanging(NamedTuple):
    """A test point and the training points that it hangs on.

    Attributes:
        row: Of the test point.
        predicted: Class that the refitted head gives it.
        loss: In nats, of the refitted head.
        helpful: Without these the loss would rise, the strongest first.
        harmful: Without these the loss would fall, the strongest first.
    """

    row: int
    predicted: int
    loss: float
    helpful: list[Effect]
    harmful: list[Effect]


class Influential:
    """The refitted head, and the points that were looked at.

    A head of more than 2,500 weights is fitted on the principal axes of the embeddings, as many as keep within that;
    where these would be fewer than 32, on 32 of them and on the points of the classes nearest to the test points.

    Attributes:
        influence: On the rows `train_rows` of the training points.
        train_rows: (n,), those with a label and a finite embedding.
        tests: One for each test point with a label and a finite embedding.
        agreement: Share of the training points to which head and network give the same class; NaN without scores.
        limit: What was left out to keep the head small, or None.
        kept: Share of the squared length of the embeddings that lies along the axes, in [0, 1].
        dropped: Number of classes that were left out.
    """

    def __init__(self, train: Embedded, test: Embedded, *, top_k: int, weight_decay: float) -> None:
        """Fits the head and asks it.

        Args:
            train: The training points; those with a label and a finite embedding must be of two classes at least.
            test: The test points, one at least.
            top_k: Helpful and harmful training points of each test point.
            weight_decay: Of the head.
        """
        train_rows, test_rows = usable(train), usable(test)
        self._classes = torch.unique(torch.cat([train.labels[train_rows], test.labels[test_rows]]))
        every = len(self._classes)
        most = MOST_WEIGHTS // (min(_LEAST_AXES, train.rows.shape[1]) + 1)
        if every * (train.rows.shape[1] + 1) > MOST_WEIGHTS and every > most:
            self._classes = _nearest_classes(train, train_rows, test, test_rows, most)
        self.dropped = every - len(self._classes)
        self.train_rows = train_rows[torch.isin(train.labels[train_rows], self._classes)]
        test_rows = test_rows[torch.isin(test.labels[test_rows], self._classes)]
        self._width = train.rows.shape[1]
        self._axes, self.kept = _axes(train.rows[self.train_rows], MOST_WEIGHTS // len(self._classes) - 1)
        features = self.features(train.rows[self.train_rows])
        self.influence = HeadInfluence(
            features,
            self.class_of(train.labels[self.train_rows]),
            weight_decay=weight_decay,
            num_classes=len(self._classes),
        )
        predicted = train.predicted[self.train_rows]
        agreed = self._classes[self.head.scores(features).argmax(dim=1)] == predicted
        self.agreement = float(agreed[predicted >= 0].double().mean())
        self.tests = self._ask(
            self.features(test.rows[test_rows]), self.class_of(test.labels[test_rows]), test_rows, top_k
        )

    @property
    def head(self) -> SoftmaxHead:
        """The refitted head."""
        return self.influence.head

    @property
    def limit(self) -> str | None:
        """In words, what keeps the head small; None where nothing is left out."""
        words = []
        if self.dropped:
            words.append(
                f"on the {len(self._classes)} classes nearest to the test images of {self.dropped + len(self._classes)}"
            )
        if self._axes is not None:
            count = self._axes.shape[1]
            words.append(f"on {count} principal axes of {self._width} features ({self.kept:.2%} of the squared length)")
        return f"The head was fitted {' and '.join(words)}." if words else None

    def features(self, rows: Tensor) -> Tensor:
        """What the head sees of embeddings (n, D): (n, d) in float64, differentiable."""
        return rows.double() if self._axes is None else rows.double() @ self._axes

    def class_of(self, labels: Tensor) -> Tensor:
        """Labels as the head numbers them: only classes that occur are among its own."""
        return torch.searchsorted(self._classes, labels)

    def _ask(self, features: Tensor, labels: Tensor, rows: Tensor, top_k: int) -> list[Hanging]:
        predicted = self.influence.on(features, labels).cpu()
        order = predicted.argsort(dim=1, stable=True)
        count = min(top_k, predicted.shape[1])
        drawn, shown = order[:MAX_SHOWN], min(count, MAX_SHOWN)
        asked = torch.unique(torch.cat([drawn[:, :shown], drawn[:, -shown:]]))
        actual = torch.full_like(predicted, torch.nan)
        actual[:, asked] = self.influence.leave_one_out(features, labels, asked).cpu()

        def effects(at: int, columns: Tensor, sign: int) -> list[Effect]:
            found = [(column, float(predicted[at, column])) for column in columns.tolist()]
            return [
                Effect(int(self.train_rows[column]), value, float(actual[at, column]))
                for column, value in found
                if sign * value > 0
            ]

        classes = self._classes[self.head.scores(features).argmax(dim=1)].tolist()
        losses = self.head.losses(features, labels).tolist()
        helpful, harmful = order[:, -count:].flip(1), order[:, :count]
        return [
            Hanging(row, classes[at], losses[at], effects(at, helpful[at], 1), effects(at, harmful[at], -1))
            for at, row in enumerate(rows.tolist())
        ]


def usable(points: Embedded) -> Tensor:
    """Rows with a finite embedding and a label that is a class of the model's, if it has scores."""
    beyond = (points.predicted >= 0) & points.losses.isnan()
    return ((points.labels >= 0) & points.rows.isfinite().all(dim=1) & ~beyond).nonzero()[:, 0]


def why_unusable(points: Embedded) -> str:
    """What is wrong where no row is usable, in one sentence."""
    if not bool((points.labels >= 0).any()):
        return "no image has a label that is a class"
    if not bool(points.rows.isfinite().all(dim=1).any()):
        return "the embeddings are NaN or infinite; the network has diverged"
    return "the labels are not among the classes that the model has scores for, or the scores are NaN"


def _axes(rows: Tensor, most: int) -> tuple[Tensor | None, float]:
    """Principal axes (D, most), not centred, and the share of the squared length along them; None if all D may stay."""
    exact = rows.double()
    if rows.shape[1] <= most:
        return None, 1.0
    wide = exact.shape[1] > exact.shape[0]
    values, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    real = values > values[0] * 1e-12
    values, vectors = values[real], vectors[:, real]
    axes = exact.T @ vectors / values.sqrt() if wide else vectors
    total = float(exact.square().sum())
    return axes.contiguous(), float(values.sum()) / total if total else 1.0


def _nearest_classes(train: Embedded, train_rows: Tensor, test: Embedded, test_rows: Tensor, most: int) -> Tensor:
    """The labels of the test points, and of the training points at the smallest angle to any of them; sorted."""
    points, asked = (
        F.normalize(each.rows[rows].float(), dim=1) for each, rows in ((train, train_rows), (test, test_rows))
    )
    nearness = (points @ asked.T).amax(dim=1)
    own = torch.unique(test.labels[test_rows])[:most]
    order = train.labels[train_rows][nearness.argsort(descending=True, stable=True)].tolist()
    others = [label for label in dict.fromkeys(order) if label not in set(own.tolist())]
    return torch.tensor(own.tolist() + others[: most - len(own)]).sort().values
