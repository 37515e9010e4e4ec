"""Rule `weight_decay_too_high`: the weights wither before the network has learned anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_number
from lightning_interp.rules._decay import SHRUNK, decayed_to, nothing_learned
from lightning_interp.rules._evidence import LEARNED, RELAXED, recent_loss, steps_done
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "norm of the weights over the first one; thresholds measured"
_LEFT = 0.3  # nats that the weights may lose over the whole run by the advice
_MOST, _LEAST = 0.1, 0.01  # part of the decay that is advised


@dataclass(frozen=True)
class WeightDecayTooHighRule(Rule):
    """The weights have lost most of their norm, and nothing is learned.

    Fires if norm(weight) / norm(weight at first), as the median over the layers, is below `shrunk` while the loss is
    above `loss` of ln C (without a cross-entropy of the first loss, if the optimizer names a decay). Not if the weights
    had grown by half before, or the loss had come below half of that: then something else has broken the network,
    mostly a too-high rate, and decay only clears away what is left of it. Nor does a network that learns count, however
    small its weights: with a normalisation behind each layer their length does not matter.

    Such runs look like a too-high rate (filters die), a too-low one (steps are short), vanishing gradients or too few
    steps. `learning_rate_too_low`, `vanishing_gradient` and `undertrained` are silent where this finding holds, also if
    it is muted, and `learning_rate_too_high` unless the loss has leapt.

    The advice lets the weights lose a quarter of their norm over the whole run, by a tenth to a hundredth of the
    decay, as `evidence["advised_decay_factor"]`.

    Source: measured on two small networks, on digits, with SGD, Adam and AdamW: with too much decay 0.002 to 0.09 of
    the norm was left at step 100; where the rate was too high the norm was 6 to 1100 times the first, or no number; a
    run that lost half and learned late had 0.46.

    Attributes:
        shrunk: Part of the first norm, in [0, 1].
        critical: The same below which nothing can be learned any more.
        loss: Part of ln C (or of the first loss).
    """

    name: ClassVar[str] = "weight_decay_too_high"
    needs: ClassVar[tuple[str, ...]] = (
        "loss", "num_classes", "weight_norm", "weight_decay", "in_optimizer", "planned_steps",
    )  # fmt: skip
    patience: ClassVar[int] = 2

    shrunk: float = SHRUNK
    critical: float = 0.1
    loss: float = LEARNED

    def __post_init__(self) -> None:
        check_number("shrunk", self.shrunk, low=0, high=1)
        check_number("critical", self.critical, low=0, high=self.shrunk)
        check_number("loss", self.loss, low=0, high=math.inf)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        relaxed = RELAXED if (self.name, None) in active else 1.0
        left = decayed_to(history, shrunk=self.shrunk / relaxed, part=self.loss * relaxed)
        loss, reference = recent_loss(history), nothing_learned(history)
        if left is None or loss is None or reference is None:
            return
        decay = history.fact("weight_decay", math.nan)
        factor = self._factor(history, left)
        yield Alert(
            rule=self.name,
            severity="critical" if left < self.critical else "warning",
            value=left,
            threshold=self.critical if left < self.critical else self.shrunk,
            cause="weight decay",
            message=(
                f"The weights have shrunk to {100 * left:.2g} % of the norm that they had at first (median over the "
                f"layers), and the loss is {loss:.3g} where nothing learned means {reference:.3g}."
            ),
            advice=_advice(decay, factor),
            evidence={
                "norm_left": left,
                "loss": loss,
                "reference_loss": reference,
                "weight_decay": decay,
                "advised_decay_factor": factor,
            },
            alternatives=["a penalty on the weights in the loss", "weights that are clipped or overwritten"],
            source=SOURCE,
        )

    def _factor(self, history: History, left: float) -> float:
        """The part of the decay by which the planned steps take `_LEFT` nats of the norm."""
        done, planned = steps_done(history), history.fact("planned_steps", math.inf)
        whole = -math.log(max(left, 1e-30)) * max(planned / done, 1.0)
        return min(_MOST, max(_LEAST, _LEFT / whole))


def _advice(decay: float, factor: float) -> str:
    if decay > 0:
        return f"Lower the weight decay from {decay:.2g} to about {decay * factor:.1g}."
    return f"Divide the weight decay, or the penalty on the weights in the loss, by about {1 / factor:.0f}."
