"""Rule `suspect_labels`: more of the training labels look wrong than a few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._evidence import (
    LEARNED,
    RECENT,
    RELAXED,
    broken_since,
    guess_loss,
    largest_dead,
    recent_loss,
)
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.learning_rate_too_high import explains_loss
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Anchor points, Liu and Tao 2016, with the votes of neighbours as judge; thresholds measured"
_RUNNING = 2  # measurements in a row on which a share must hold
_AT_END = 3  # measurements that are enough when no more will come


class _Measured(NamedTuple):
    step: int
    share: float
    recognition: float


@dataclass(frozen=True)
class SuspectLabelsRule(Rule):
    """The share of training labels that look wrong is `share` or more.

    The share is estimated by `wrong_label_share`: how often the label of an image is not the one that wins among its
    neighbours in the embedding, judged where the neighbours agree best. Fires if in two measurements running it was at
    least `share` and more than `certainty` of its standard errors, sqrt(s (1 - s) / anchors), above 0; one measurement
    will do when the training has ended. Only measurements count in which the neighbours know the labels: their
    recognition (balanced accuracy; 0 at chance, 1 if always right) is at least `recognition`, and only from where the
    loss has come below 0.9 ln C (if it is a cross-entropy). Of the pairs of measurements the one with the largest share
    counts, also later on: a wrong label is not right because the network has learned it by heart.

    Information instead (a warning when the training has ended), if in all of at least `unrelated_after` measurements
    (three at the end) the recognition was below `unrelated`: the labels have nothing to do with the images (shuffled,
    or files and labels in different orders), or this network can't see what they have; numbers of the training set
    can't tell which. It is cleared if the network learns such labels by heart so well that its embedding follows them.

    Not said if the loss is NaN, or if a too-high rate or deaths (`dead` of a layer) explain what the network does not
    know. A rate that is too low does not explain it: neighbours know most labels even in an untrained network. Does not
    depend on the loss function.

    Source: anchor points, Liu and Tao 2016, section 5. Measured on 1,797 real digits, small CNNs, 20 epochs, one seed,
    ten recipes (with and without BatchNorm, Adam and SGD, noisy images, imbalanced classes, rates too low and too high;
    `benchmarks/flipped_labels.py`): silent in all of 10 runs with right labels. Of 9 runs each whose rate was not too
    high it found 9 with 10 % of the labels moved to any other class, 8 with 20 %, 5 with 40 % (elsewhere the neighbours
    knew too little, or nothing had been learned yet), 8 with 10 % moved to the class that is confused most easily, and
    5 with 5 %: all 5 on images without added noise, none on those with. On clear images of balanced classes it said 5.0
    to 5.5, 9.8 to 9.9 and 20.3 to 20.8 % where 5, 10 and 20 % were wrong, mostly after the second epoch; on noisy ones
    3 to 7 where 10 % were: less than the truth. Shuffled labels: the second kind in 9 of 9 after the fifth epoch,
    cleared later in three (noisy images, easily learned by heart). The thresholds were chosen on other seeds of such
    runs, not on other data.

    Attributes:
        share: Of wrong labels, in [0, 1].
        recognition: From which the estimate is trusted, in [0, 1].
        certainty: Standard errors.
        unrelated: Recognition below which the labels may have nothing to do with the images, in [0, 1].
        unrelated_after: Measurements that are needed to say so.
        dead: Dead share of a layer that explains much, in [0, 1].
    """

    name: ClassVar[str] = "suspect_labels"
    needs: ClassVar[tuple[str, ...]] = (
        "suspect_label_share", "label_recognition", "label_anchors", "train_samples", "loss", "num_classes",
        "dead_fraction", "loss_before", "loss_after", "step_ratio", "learning_rate",
    )  # fmt: skip

    share: float = 0.03
    recognition: float = 0.5
    certainty: float = 2.0
    unrelated: float = 0.25
    unrelated_after: int = 5
    dead: float = 0.25

    def __post_init__(self) -> None:
        for argument in ("share", "recognition", "unrelated", "dead"):
            check_number(argument, getattr(self, argument), low=0, high=1)
        check_number("certainty", self.certainty, low=0, high=math.inf)
        check_at_least("unrelated_after", self.unrelated_after, 1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        measured = _measured(history)
        if not measured or broken_since(history) is not None:
            return
        if largest_dead(history) >= self.dead or explains_loss(history):
            return
        begin = history.once("learned_from", lambda: _learned_from(history))
        known = [each for each in measured if each.recognition >= self.recognition and each.step >= begin]
        found = _held(known, history.finished)
        if found is not None:
            anchors = history.fact("label_anchors", math.nan)
            error = math.sqrt(found.share * (1 - found.share) / anchors) if anchors > 0 else math.inf
            limit = self.share * (RELAXED if (self.name, None) in active else 1.0)
            if found.share >= limit and found.share > self.certainty * error:
                yield self._wrong(history, found, measured[-1], error)
                return
        needed = min(_AT_END, self.unrelated_after) if history.finished else self.unrelated_after
        low = len(measured) >= needed and max(each.recognition for each in measured) < self.unrelated
        if low:
            yield self._unrelated(history, measured)

    def _wrong(self, history: History, found: _Measured, last: _Measured, error: float) -> Alert:
        samples = history.fact("train_samples", math.nan)
        count = f" ({found.share * samples:.0f} of {samples:.0f})" if samples > 0 else ""
        late = "; by now the network is learning them by heart" if last.share < found.share / 2 else ""
        return Alert(
            rule=self.name,
            severity="warning",
            value=found.share,
            threshold=self.share,
            cause="wrong labels",
            message=f"About {found.share:.0%} of the training labels{count} look wrong{late}.",
            advice=(
                "Look at the images of `suspect_labels.csv` in the log folder from the top, correct or remove those "
                "whose label is wrong until hardly any is, and train anew."
            ),
            evidence={
                "share": found.share,
                "standard_error": error,
                "recognition": found.recognition,
                "measured_at_step": float(found.step),
                "share_now": last.share,
            }
            | ({"train_samples": samples} if samples > 0 else {}),
            alternatives=["images that belong to two classes", "classes that these images don't tell apart"],
            source=SOURCE,
        )

    def _unrelated(self, history: History, measured: list[_Measured]) -> Alert:
        best, loss = max(each.recognition for each in measured), recent_loss(history)
        evidence = {"recognition": best, "measurements": float(len(measured))}
        return Alert(
            rule=self.name,
            severity="warning" if history.finished else "info",
            value=best,
            threshold=self.unrelated,
            cause=None,
            message=(
                f"What the network makes of the training images says next to nothing about their labels (recognition "
                f"{best:.2f}; 0 is chance, 1 is always right)."
            ),
            advice=(
                "Look at a few training images with their labels: are they those of other images (shuffled, or in "
                "another order)? If they are right, the network or the images are the matter, not the labels."
            ),
            evidence=evidence | ({} if loss is None else {"loss": loss}),
            alternatives=["labels that have nothing to do with the images", "a network that has not learned to see"],
            source=SOURCE,
        )


def _measured(history: History) -> list[_Measured]:
    shares = dict(history.finite("suspect_label_share"))
    known = history.finite("label_recognition")
    return [_Measured(step, shares[step], value) for step, value in known if step in shares]


def _learned_from(history: History) -> float:
    """Step from which the network has learned something; 0 if the loss is no cross-entropy, infinity if never."""
    guess, losses = guess_loss(history), history.finite("loss")
    if guess is None or not losses:
        return 0.0
    ends = range(RECENT, len(losses) + 1)
    below = (end for end in ends if statistics.median(p.value for p in losses[end - RECENT : end]) < LEARNED * guess)
    first = next(below, None)
    return math.inf if first is None else losses[first - 1].step


def _held(known: list[_Measured], finished: bool) -> _Measured | None:
    """The measurement with the largest share that held twice running; the newest if there is no other at the end."""
    pairs = [min(pair, key=lambda each: each.share) for pair in zip(known, known[_RUNNING - 1 :], strict=False)]
    if pairs:
        return max(pairs, key=lambda each: each.share)
    return known[-1] if known and finished else None
