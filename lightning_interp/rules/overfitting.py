"""Rule `overfitting`: the validation loss rises while the training loss falls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from lightning_interp._options import check_at_least, check_number, check_strings
from lightning_interp.rules._evidence import (
    RECENT,
    RELAXED,
    broken_since,
    guess_loss,
    is_problem,
    recent_loss,
    reference_loss,
    severity_of,
)
from lightning_interp.rules._validation import ACCURACY, LOSS, find_metric
from lightning_interp.rules.alert import Alert, Severity
from lightning_interp.rules.history import History, Point
from lightning_interp.rules.learning_rate_too_high import explains_loss
from lightning_interp.rules.rule import Key, Rule
from lightning_interp.rules.suspect_labels import SuspectLabelsRule
from lightning_interp.rules.validation_mismatch import explains_validation

SOURCE = "Prechelt 1998 (early stopping: generalisation loss while training goes on); thresholds measured"
_SUDDEN = 0.75  # part of a rise that, in one piece, makes it a jump


class _Seen(NamedTuple):
    """The losses of the run.

    Attributes:
        best: Lowest median of three validation losses in a row, and where.
        now: The smallest one of the newest validation losses.
        noise: Standard deviation of one validation loss.
        training: Training loss now.
        scale: ln C, or the first loss.
        risen: Whether the validation loss rises while the training loss falls.
        gap: (now - training) / ln C if the training images are learned by heart, else 0; with `best` after a jump.
    """

    best: Point
    now: float
    noise: float
    training: float
    scale: float
    risen: bool = False
    gap: float = 0.0


@dataclass(frozen=True)
class OverfittingRule(Rule):
    """The validation loss rises while the training loss falls; or the training images are learned by heart, no others.

    With v the validation loss that the user logs, v* its best (the lowest median of three in a row), t the training
    loss and L0 = ln C, or the first loss where there is no cross-entropy:

    - Rise: min(newest `checks` v) - v* > max(`rise` (L0 - v*), `relative` v*, `certainty` noise), with noise = 1.05
      median(abs(v_i - v_(i-1))), the standard deviation of one value. Meanwhile t has fallen to `train_fall` of what it
      was at v* or less, and is below v and below `learned` of where it began. A warning; information if a logged
      validation accuracy has risen by more than `accuracy` since v*: then the network becomes too sure of itself rather
      than worse.
    - Gap: t < `by_heart` L0, and min(newest v) - t > `gap` L0: information, and from `large_gap` on a warning. Only for
      a cross-entropy. A network that knows its data by heart at a low and flat validation loss is not told off.

    A training loss above the validation loss (dropout, augmentation) is never told off, nor is a rise of which three
    quarters came at once, or of which half is gone again: a batch that disturbed the normalisation does both. Not said
    if the loss is NaN, a too-high rate or `validation_mismatch` explains it, or the validation set has less than
    `min_samples`, where its size is known. If `suspect_labels` finds wrong labels, these are the cause; if v* is not
    below ln C, so that nothing of what was learned ever helped, validation data of another kind (images or labels).

    The metric is found by its name (`val_loss`, `valid/loss`, `loss/val`, `validation-nll`, ...; of several the
    shortest). Without a logged validation loss the rule is silent, since the model is not run again for it.

    Source: Prechelt 1998, "Early stopping - but when?", generalisation loss and progress. Measured on small CNNs on
    real digits (five architectures, three optimizers): of 10 runs on 60 or 80 images, 10 were mentioned and 4 warned
    of; their gaps were 0.10 to 0.31 ln C. Of 65 others (500 to 1,400 images; rates from low to high, tiny batches,
    dropout, augmentation, fine-tuning, regression, 20 epochs of memorising, random labels) none was mentioned; gaps up
    to 0.055; four of them had 30 validation images and were not judged. The thresholds were chosen on most of these
    runs.

    Attributes:
        metric: Name of the logged validation loss; None searches for it.
        rise: Part of what was learned, L0 - v*.
        relative: Part of v*.
        checks: Validations in a row.
        certainty: Standard deviations of one value.
        train_fall: Part of the training loss at v* below which it must be by now.
        learned: Part of ln C or of the first loss, the smaller one, below which the training loss must be.
        accuracy: Rise of the accuracy that makes it information, in [0, 1].
        by_heart: Part of L0 below which the training images are known by heart.
        gap: Part of L0 between training and validation loss that is mentioned.
        large_gap: The same that is a warning.
        min_samples: Samples that a validation must have.
    """

    name: ClassVar[str] = "overfitting"
    needs: ClassVar[tuple[str, ...]] = (
        "validation_metric", "validation_samples", "loss", "num_classes", "loss_before", "loss_after", "step_ratio",
        "learning_rate", "dead_fraction", "statistics_lag", "weights_lag",
    )  # fmt: skip

    metric: str | None = None
    rise: float = 0.05
    relative: float = 0.1
    checks: int = 3
    certainty: float = 3.0
    train_fall: float = 0.8
    learned: float = 0.5
    accuracy: float = 0.01
    by_heart: float = 0.05
    gap: float = 0.1
    large_gap: float = 0.25
    min_samples: int = 100

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_strings("metric", [self.metric])
        for argument in ("train_fall", "learned", "accuracy", "by_heart"):
            check_number(argument, getattr(self, argument), low=0, high=1)
        for argument in ("rise", "relative", "certainty", "gap"):
            check_number(argument, getattr(self, argument), low=0, high=math.inf)
        check_number("large_gap", self.large_gap, low=self.gap, high=math.inf)
        check_at_least("checks", self.checks, 1)
        check_at_least("min_samples", self.min_samples, 1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        metric = self.metric or find_metric(history, LOSS)
        if metric is None or broken_since(history) is not None or explains_loss(history):
            return
        if history.fact("validation_samples", math.inf) < self.min_samples or explains_validation(history, metric):
            return
        held = severity_of(active, (self.name, None))
        seen = self._look(history, metric, RELAXED if held is not None else 1.0)
        large = seen is not None and seen.gap > self.large_gap * (RELAXED if is_problem(held) else 1.0)
        if seen is not None and seen.risen:
            yield self._rising(history, metric, seen, large)
        elif seen is not None and seen.gap > self.gap * (RELAXED if held is not None else 1.0):
            yield self._apart(history, metric, seen, "warning" if large else "info")

    def _look(self, history: History, metric: str, relaxed: float) -> _Seen | None:
        points = history.finite("validation_metric", metric)
        training, reference = recent_loss(history), reference_loss(history)
        if training is None or reference is None or len(points) < self.checks + 3:
            return None
        best = _best(points[: -self.checks])
        now, guess = min(point.value for point in points[-self.checks :]), guess_loss(history)
        noise = _noise([point.value for point in points[len(points) // 2 :]])
        seen = _Seen(best, now, noise, training, guess or reference)
        before = _loss_at(history, best.step)
        learning = before is not None and training <= self.train_fall * before and training < self.learned * reference
        gradual = _gradual(points, best, self.checks)
        risen = learning and gradual and now > max(training, self._limit(seen, relaxed))
        by_heart = guess is not None and training < self.by_heart * guess / relaxed
        lasting = now if gradual else min(now, best.value)
        return seen._replace(risen=risen, gap=(lasting - training) / seen.scale if by_heart else 0.0)

    def _limit(self, seen: _Seen, relaxed: float = 1.0) -> float:
        best = seen.best.value
        least = max(self.rise * (seen.scale - best), self.relative * best, self.certainty * seen.noise)
        return best + relaxed * least

    def _rising(self, history: History, metric: str, seen: _Seen, large: bool) -> Alert:
        gained = _accuracy_gain(history, seen.best.step, self.checks)
        surer = gained is not None and gained > self.accuracy and not large
        wrong = _wrong_labels(history)
        unlike = not wrong and not surer and _never_good(history, seen)
        aside = "" if gained is None else f" (the accuracy changed by {100 * gained:+.1f} points)"
        first = "Look at the labels first (see suspect_labels); then stop" if wrong else "Stop"
        return Alert(
            rule=self.name,
            severity="info" if surer else "warning",
            value=seen.now,
            threshold=self._limit(seen),
            cause=_WRONG if wrong else _UNLIKE if unlike else "too sure of itself" if surer else _BY_HEART,
            message=(
                f"`{metric}` was down at {seen.best.value:.3g} by step {seen.best.step} and is {seen.now:.3g} or more "
                f"now, while the training loss fell to {seen.training:.3g}{aside}."
            ),
            advice=(
                "Nothing if the accuracy counts; if the probabilities do, use label smoothing or stop earlier."
                if surer
                else _COMPARE
                if unlike
                else f"{first} near step {seen.best.step} (EarlyStopping or ModelCheckpoint with monitor={metric!r}), "
                f"or use {_MORE}."
            ),
            evidence=_evidence(seen) | ({} if gained is None else {"accuracy_gain": gained}),
            alternatives=[_BY_HEART if unlike else _UNLIKE] + ([] if wrong else [_WRONG]),
            source=SOURCE,
        )

    def _apart(self, history: History, metric: str, seen: _Seen, severity: Severity) -> Alert:
        wrong = _wrong_labels(history)
        unlike = not wrong and _never_good(history, seen)
        first = "Look at the labels first (see suspect_labels); then use" if wrong else "Use"
        return Alert(
            rule=self.name,
            severity=severity,
            value=seen.gap,
            threshold=self.large_gap if severity == "warning" else self.gap,
            cause=_WRONG if wrong else _UNLIKE if unlike else _BY_HEART,
            message=(
                f"The training loss is {seen.training:.2g}, but `{metric}` is still {seen.now:.3g} or more, "
                f"{seen.gap:.0%} of what a guess has: "
                f"{'it has never been better than a guess' if unlike else 'the training images are learned by heart'}."
            ),
            advice=_COMPARE if unlike else f"{first} {_MORE}; training longer brings nothing.",
            evidence=_evidence(seen),
            alternatives=[_BY_HEART if unlike else _UNLIKE] + ([] if wrong else [_WRONG]),
            source=SOURCE,
        )


_BY_HEART, _WRONG, _UNLIKE = "learned by heart", "wrong labels learned by heart", "validation data of another kind"
_COMPARE = (
    "Compare the images and the labels of both sets (scaling, the order of the classes, which classes occur): the "
    "validation has never been better than a guess, so to stop earlier brings nothing."
)
_MORE = "more images, augmentation, weight decay or dropout"


def _never_good(history: History, seen: _Seen) -> bool:
    """Whether the validation was at its best no better than a guess."""
    guess = guess_loss(history)
    return guess is not None and seen.best.value >= guess


def _wrong_labels(history: History) -> bool:
    return any(alert.cause == "wrong labels" for alert in SuspectLabelsRule().check(history, ()))


def _evidence(seen: _Seen) -> dict[str, float]:
    return {
        "validation_loss": seen.now,
        "best_validation_loss": seen.best.value,
        "best_step": float(seen.best.step),
        "training_loss": seen.training,
        "noise": seen.noise,
    }


def _best(points: Sequence[Point]) -> Point:
    """The lowest median of three in a row: the lowest value alone may be luck."""
    threes = [sorted(points[i : i + 3], key=lambda point: point.value)[1] for i in range(len(points) - 2)]
    return min(threes, key=lambda point: point.value)


def _gradual(points: Sequence[Point], best: Point, checks: int) -> bool:
    """Whether the values have risen since the best one bit by bit, and have not gone back by half."""
    since = [point.value for point in points if point.step >= best.step]
    whole = max(since) - best.value
    largest = max((later - value for value, later in pairwise(since)), default=0.0)
    return largest <= _SUDDEN * whole and statistics.median(since[-checks:]) >= best.value + 0.5 * whole


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of one value, from the differences of neighbours: a trend hardly counts."""
    # The median of abs of a normal variable is 0.674 deviations; a difference has twice the variance of one value.
    return 1.05 * statistics.median(abs(b - a) for a, b in pairwise(values))


def _loss_at(history: History, step: int) -> float | None:
    """Median of the last training losses up to a step."""
    values = [point.value for point in history.finite("loss") if point.step <= step][-RECENT:]
    return statistics.median(values) if values else None


def _accuracy_gain(history: History, step: int, checks: int) -> float | None:
    """Median of the newest validation accuracies minus that of the three up to a step."""
    metric = find_metric(history, ACCURACY)
    points = [] if metric is None else history.finite("validation_metric", metric)
    before = [point.value for point in points if point.step <= step][-3:]
    return statistics.median(p.value for p in points[-checks:]) - statistics.median(before) if before else None
