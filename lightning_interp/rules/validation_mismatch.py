"""Rule `validation_mismatch`: what is validated is not what was trained: other statistics, weights or images."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lightning_interp._options import check_at_least, check_number, check_strings
from lightning_interp.rules._evidence import RELAXED, guess_loss, recent_loss
from lightning_interp.rules._validation import LOSS, find_metric
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History, Point
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Ioffe and Szegedy 2015 (batch normalisation in inference), Wu and Johnson 2021 (precise statistics); measured"
_GAP = 0.1  # part of ln C between validation and training loss from which it is worth asking where it comes from
_MOST = 1.5  # part of the validation loss above which a lag can't be a part of it, few images allowed for
_SHARE = 0.5  # part of that gap that must be due to the lag


class Lag(NamedTuple):
    """Where the newest validation loss comes from.

    Attributes:
        validation: That loss.
        training: The training loss now.
        statistics: How far running statistics raise the loss of the same images, in nats.
        weights: How far other weights than those that are trained raise it.
        guess: ln C.
        on_training: How far running statistics raise the loss of training images; None if that is not known.
    """

    validation: float
    training: float
    statistics: float
    weights: float
    guess: float
    on_training: float | None = None

    @property
    def total(self) -> float:
        """Of both."""
        return self.statistics + self.weights

    @property
    def unlike(self) -> bool:
        """Whether the statistics fit the training images, and only those of the validation are others."""
        return self.on_training is not None and self.on_training < _SHARE * self.statistics


@dataclass(frozen=True)
class ValidationMismatchRule(Rule):
    """The validation loss is high because of how the network is evaluated, and not because of what it has learned.

    In training, batch normalisation goes by the batch; in a validation by running statistics, which at a momentum m
    follow the weights within some 3 / m steps. Averaged weights (EMA, SWA) lag in the same way. Where the validation
    loss v is above the training loss t by more than 0.1 ln C, at most 64 validation images are passed through the
    network as it is validated, with the statistics of the batch, and with these after the validation, when the trained
    weights are back. The differences of the three losses are `statistics_lag` and `weights_lag`.

    Where the statistics of the batch give less, the same is done with 64 training images: if running statistics raise
    their loss by less than half as much, they do not lag, but the validation images are unlike (preprocessed otherwise,
    for example), which is said instead.

    Fires if the sum of the two is more than half of v - t and more than 0.1 ln C; the validation then says little of
    the network, and `overfitting` is silent. A warning if it has been more than `large` ln C in the last `checks`
    validations, else information. Only for a cross-entropy (of a model that is not compiled), a validation loss that is
    logged (found as in `overfitting`), and validation data that can be read by index. Where the sum is more than 1.5 v,
    what is read there is not what the validation looks at (a step that resizes or scales), and nothing is said.

    Source: Ioffe and Szegedy 2015, section 3.1; Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.

    Attributes:
        metric: Name of the logged validation loss; None searches for it.
        large: Part of ln C.
        checks: Validations in a row.
    """

    name: ClassVar[str] = "validation_mismatch"
    needs: ClassVar[tuple[str, ...]] = ("validation_metric", "loss", "num_classes", "statistics_lag", "weights_lag")

    metric: str | None = None
    large: float = 0.25
    checks: int = 3

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_strings("metric", [self.metric])
        check_number("large", self.large, low=_GAP, high=math.inf)
        check_at_least("checks", self.checks, 1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        metric = self.metric or find_metric(history, LOSS)
        held = (self.name, None) in active
        lag = None if metric is None else evaluation_lag(history, metric)
        if lag is None or not _explains(lag, RELAXED if held else 1.0):
            return
        warned = self._lasts(history, metric, self.large * lag.guess * (RELAXED if held else 1.0))
        statistics = lag.statistics >= lag.weights
        causes = [_UNLIKE, _STATISTICS] if lag.unlike else [_STATISTICS, _UNLIKE]
        causes = [*causes, _WEIGHTS] if statistics else [_WEIGHTS, _STATISTICS]
        yield Alert(
            rule=self.name,
            severity="warning" if warned else "info",
            value=lag.total,
            threshold=max(_SHARE * (lag.validation - lag.training), _GAP * lag.guess),
            cause=causes[0],
            message=(
                f"`{metric}` is {lag.validation:.3g} while the training loss is {lag.training:.2g}, but "
                f"{lag.statistics if statistics else lag.weights:.2g} of that is due to how the network is evaluated: "
                f"{_MEANS if statistics else _WITH}, it has a loss lower by that on the same images"
                f"{_FITS if causes[0] == _UNLIKE else ''}."
            ),
            advice=_ADVICE[causes[0]],
            evidence={
                "validation_loss": lag.validation,
                "training_loss": lag.training,
                "statistics_lag": lag.statistics,
                "weights_lag": lag.weights,
            },
            alternatives=causes[1:],
            source=SOURCE,
        )

    def _lasts(self, history: History, metric: str | None, limit: float) -> bool:
        newest = [point.step for point in history.finite("validation_metric", metric)[-self.checks :]]
        lags = {lag.step: lag.value + other.value for lag, other in _lags(history)}
        return len(newest) == self.checks and all(lags.get(step, 0.0) > limit for step in newest)


_STATISTICS = "running statistics lag behind"
_UNLIKE = "validation images are unlike the training images"
_WEIGHTS = "averaged weights lag behind"
_MEANS, _WITH = "normalised by the batch, as in training", "with the weights that are trained"
_FITS = ", and the running statistics fit the training images"
_BY_STATISTICS = (
    "Do not judge the network by its validation yet. The running statistics of batch normalisation take some "
    "3 / momentum steps to follow: train longer, raise `momentum`, or renew them before each validation "
    "(torch.optim.swa_utils.update_bn)."
)
_BY_WEIGHTS = (
    "Do not judge the network by its validation yet. Averaged weights take some 3 / (1 - decay) updates to follow: "
    "train longer, lower the decay, or begin to average later."
)
_BY_IMAGES = (
    "Compare what the validation does to its images (scaling, mean and standard deviation, colour order) with what the "
    "training does; if that is the same, they come from elsewhere."
)
_ADVICE = {_STATISTICS: _BY_STATISTICS, _UNLIKE: _BY_IMAGES, _WEIGHTS: _BY_WEIGHTS}


def in_doubt(history: History) -> bool:
    """Whether the last validation loss is so far above the training loss that it is worth asking why."""
    metric, guess, training = find_metric(history, LOSS), guess_loss(history), recent_loss(history)
    if metric is None or guess is None or training is None:
        return False
    last = history.get("validation_metric", metric).last
    return last is not None and last.value - training > _GAP * guess


def evaluation_lag(history: History, metric: str) -> Lag | None:
    """What was measured at the newest validation; None if nothing was."""
    points, guess, training = history.finite("validation_metric", metric), guess_loss(history), recent_loss(history)
    lags = _lags(history)
    if not points or not lags or guess is None or training is None or lags[-1][0].step != points[-1].step:
        return None
    statistics, weights = lags[-1]
    last = history.get("training_statistics_lag").last
    on_training = None if last is None or last.step != statistics.step else last.value
    return Lag(points[-1].value, training, statistics.value, weights.value, guess, on_training)


def explains_validation(history: History, metric: str | None = None) -> bool:
    """Whether the newest validation loss is due to how the network is evaluated."""
    metric = metric or find_metric(history, LOSS)
    lag = None if metric is None else evaluation_lag(history, metric)
    return lag is not None and _explains(lag)


def _explains(lag: Lag, relaxed: float = 1.0) -> bool:
    gap = lag.validation - lag.training
    if lag.total > _MOST * lag.validation:  # those images are not what the user's validation looks at
        return False
    return gap > 0 and lag.total > relaxed * max(_SHARE * gap, _GAP * lag.guess)


def _lags(history: History) -> list[tuple[Point, Point]]:
    return list(zip(history.finite("statistics_lag"), history.finite("weights_lag"), strict=False))
