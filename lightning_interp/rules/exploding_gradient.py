"""Rule `exploding_gradient`: the gradient grows out of all proportion, through the layers or through time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._evidence import (
    RELAXED,
    broken_since,
    guess_loss,
    largest_dead,
    recent_loss,
    reference_loss,
    started_badly,
    steps_done,
)
from lightning_interp.rules._gradients import LayerGradient, layer_gradients
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.learning_rate_too_high import explains_loss
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Bengio et al. 1994, Pascanu et al. 2013; AUTOTRAINER (Zhang et al. 2021) compares layers; thresholds measured"
_LONG = 10  # probes from which a median over time means something


@dataclass(frozen=True)
class ExplodingGradientRule(Rule):
    """The gradient is far too large for the loss, which is where it began, or has come back there.

    The loss is above `loss` of ln C or of the first loss, the smaller one, and one of two holds.

    - Through the layers, from step `min_steps` on. With the sensitivity of a layer s = norm(gradient) norm(weights) /
      ln C, median of the newest `probes` probed steps: max s > `sensitivity` and max s > `contrast` min s. So a change
      of these weights by a tenth could cost as much as a guess, and it is the depth that makes it so.
    - Through time: the newest `checks` norms of the whole gradient are all above `growth` times the median of those
      before them.

    Large weights in a network of ReLUs without normalisation make a large loss, not a contrast: that is `bad_start`,
    and nothing is said here after it. Neither is if the loss is NaN (`non_finite`; without clipping most explosions end
    there within a few steps), if a too-high rate explains the loss, or with `dead` or more of a layer dead. None of it
    depends on how the loss is scaled.

    Source: Bengio et al. 1994; Pascanu et al. 2013. AUTOTRAINER's first over last layer (70) lacks the size: it holds
    just as well where all gradients are small. Measured on small CNNs on real digits, 23 runs with large initial
    weights (chains of tanh, of linear layers, of ReLU, and of one layer used again and again): 10 learned their digits
    all the same, two after a `bad_start`; 7 that failed were told by `bad_start`, `non_finite` or
    `learning_rate_too_high`; of the 4 left, which did not learn or hardly, this rule found 3 in the first 65 steps
    (sensitivity 23 to 116, contrast above 80), and missed one. Two more learned slowly, and nothing was said. Silent in
    65 of 65 runs without the fault (sensitivity up to 10, contrast up to 13, where the loss was as high). The
    thresholds were chosen on these runs; growth through time is from the literature and was not met in them.

    Without a cross-entropy the first loss stands for ln C.

    Attributes:
        sensitivity: norm(gradient) norm(weights) / ln C of the most sensitive layer.
        contrast: The same over that of the least sensitive layer.
        growth: Multiple of the median of the earlier norms.
        checks: Probes in a row that must have grown.
        loss: Part of ln C or of the first loss.
        min_steps: Steps before which layers are not compared.
        probes: Newest probed steps that are looked at.
        dead: Dead share of a layer that explains much, in [0, 1].
    """

    name: ClassVar[str] = "exploding_gradient"
    needs: ClassVar[tuple[str, ...]] = (
        "gradient_norm", "update_norm", "update_ratio", "loss", "num_classes", "dead_fraction", "trainable",
        "loss_before", "loss_after", "step_ratio", "learning_rate",
    )  # fmt: skip
    patience: ClassVar[int] = 2

    sensitivity: float = 10.0
    contrast: float = 30.0
    growth: float = 100.0
    checks: int = 3
    loss: float = 0.9
    min_steps: int = 60
    probes: int = 10
    dead: float = 0.5

    def __post_init__(self) -> None:
        for argument in ("sensitivity", "loss"):
            check_number(argument, getattr(self, argument), low=0, high=math.inf)
        for argument in ("contrast", "growth"):
            check_number(argument, getattr(self, argument), low=1, high=math.inf)
        for argument in ("checks", "min_steps", "probes"):
            check_at_least(argument, getattr(self, argument), 1)
        check_number("dead", self.dead, low=0, high=1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        relaxed = RELAXED if (self.name, None) in active else 1.0
        loss, reference = recent_loss(history), reference_loss(history)
        if loss is None or reference is None or loss <= self.loss * relaxed * reference or self._explained(history):
            return
        losses = {"loss": loss, "reference_loss": reference}
        earlier, newest = self._over_time(history)
        if newest and min(newest) > self.growth * relaxed * earlier > 0:
            yield self._grown(earlier, newest, losses)
            return
        layers = [each for each in layer_gradients(history, self.probes) if not math.isnan(each.sensitivity)]
        if len(layers) < 2 or steps_done(history) < self.min_steps:
            return
        most, least = _extremes(layers)
        unit = guess_loss(history) or reference
        enough = most.sensitivity > self.sensitivity * relaxed * unit
        if enough and most.sensitivity > self.contrast * relaxed * least.sensitivity:
            yield self._steep(layers, most.sensitivity / unit, losses)

    def _explained(self, history: History) -> bool:
        bad = broken_since(history) is not None or started_badly(history, 3.0)
        return bad or largest_dead(history) >= self.dead or explains_loss(history)

    def _over_time(self, history: History) -> tuple[float, list[float]]:
        norms = [point.value for point in history.finite("gradient_norm")]
        if len(norms) < _LONG + self.checks:
            return math.nan, []
        return statistics.median(norms[: -self.checks]), norms[-self.checks :]

    def _grown(self, earlier: float, newest: list[float], losses: dict[str, float]) -> Alert:
        times = min(newest) / earlier
        return Alert(
            rule=self.name,
            severity="critical",
            value=times,
            threshold=self.growth,
            cause=None,
            message=(
                f"The gradient is {times:.3g} times as large as it was, in {len(newest)} probed steps running, and the "
                f"loss is {losses['loss']:.3g} where nothing learned means {losses['reference_loss']:.3g}."
            ),
            advice=(
                f"Go back to an earlier checkpoint and clip the gradient to its former norm (gradient_clip_val="
                f"{earlier:.2g}), or divide the learning rate by about 3."
            ),
            evidence={**losses, "gradient_norm": newest[-1], "earlier_gradient_norm": earlier},
            alternatives=["learning rate", "weights that are used many times over and have grown", "bad batches"],
            source=SOURCE,
        )

    def _steep(self, layers: list[LayerGradient], value: float, losses: dict[str, float]) -> Alert:
        most, least = _extremes(layers)
        contrast = most.sensitivity / max(least.sensitivity, 1e-300)
        factor = contrast ** (1 / max(1, abs(layers.index(most) - layers.index(least))))
        return Alert(
            rule=self.name,
            severity="warning",
            value=value,
            threshold=self.sensitivity,
            cause="initialisation",
            message=(
                f"Measured against the weights, the gradient of {most.layer} is {contrast:.3g} times that of "
                f"{least.layer}, and the loss is {losses['loss']:.3g} where nothing learned means "
                f"{losses['reference_loss']:.3g}."
            ),
            advice=(
                f"It grows {factor:.2g} times a layer: divide the initial weights by about as much, or put a "
                "normalisation behind each layer; clip the gradient (gradient_clip_val=1) if it has to stay."
            ),
            evidence={**losses, "sensitivity": value, "contrast": contrast},
            alternatives=["weights that are used many times over", "learning rate"],
            source=SOURCE,
        )


def _extremes(layers: list[LayerGradient]) -> tuple[LayerGradient, LayerGradient]:
    """The most sensitive layer and the least sensitive one."""
    return max(layers, key=lambda each: each.sensitivity), min(layers, key=lambda each: each.sensitivity)
