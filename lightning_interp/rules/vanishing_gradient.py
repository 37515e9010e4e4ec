"""Rule `vanishing_gradient`: next to nothing of the gradient reaches the far layers, and the network learns nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._decay import decay_explains
from lightning_interp.rules._evidence import (
    RELAXED,
    broken_since,
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

SOURCE = "Bengio et al. 1994; Glorot and Bengio 2010; the pair of signs as in AUTOTRAINER (Zhang et al. 2021)"
_QUARTER = 4


@dataclass(frozen=True)
class VanishingGradientRule(Rule):
    """A quarter of the layers get less than `share` of the gradient, while the loss is where it began.

    The share of a layer is norm(its gradient) / norm(gradient of all parameters), median of the newest `probes`
    probed steps; a quarter of the layers (rounded down, and one more) must be below. The loss must be above `loss` of
    ln C or of the first loss, the smaller one, after `min_steps` steps: a network that learns all the same (Adam
    makes small gradients large), or whose loss is near zero, is well. Neither depends on the scale of the loss.

    Not said if the loss is NaN, after a bad start, if a too-high rate explains the loss, or with `dead` or more of a
    layer dead: then no gradient can pass, and `dead_filters` speaks. A gradient of exactly 0 is a matter of
    `untrained_layer`. The cause is the way through the layers if the shares fall from the output to the input, else
    the initialisation: small weights all over leave no gradient to any of them but to the last bias.

    Source: Bengio et al. 1994; Glorot and Bengio 2010. AUTOTRAINER compares the first with the last layer (1e-3) and
    with 1e-4, which depends on the loss; here the whole gradient stands for both. Measured on small CNNs on real
    digits: found in 4 of 4 runs with five or eight layers of sigmoids (second smallest share at most 3e-4), left to
    `dead_filters` in 2 of 2 with sixteen layers of ReLU, silent in 65 of 65 without the fault (shares from 0.013 on).
    The threshold was chosen on these runs.

    Without a cross-entropy the first loss stands for ln C; then a bias that learns the mean of the targets may hide
    that nothing else was learned. The same goes for classes of very different sizes.

    Attributes:
        share: Of the whole gradient, in [0, 1].
        loss: Part of ln C (or of the first loss).
        min_steps: Steps before which nothing is said.
        probes: Newest probed steps that are looked at.
        min_layers: Layers with a gradient that the network must have.
        dead: Dead share of a layer that explains it, in [0, 1].
    """

    name: ClassVar[str] = "vanishing_gradient"
    needs: ClassVar[tuple[str, ...]] = (
        "gradient_norm", "update_norm", "update_ratio", "loss", "num_classes", "dead_fraction", "trainable",
        "loss_before", "loss_after", "step_ratio", "learning_rate", "weight_norm",
    )  # fmt: skip
    patience: ClassVar[int] = 2

    share: float = 1e-3
    loss: float = 0.9
    min_steps: int = 100
    probes: int = 10
    min_layers: int = 3
    dead: float = 0.5

    def __post_init__(self) -> None:
        for argument in ("share", "dead"):
            check_number(argument, getattr(self, argument), low=0, high=1)
        check_number("loss", self.loss, low=0, high=math.inf)
        for argument in ("min_steps", "probes"):
            check_at_least(argument, getattr(self, argument), 1)
        check_at_least("min_layers", self.min_layers, 2)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        relaxed = RELAXED if (self.name, None) in active else 1.0
        loss, reference = recent_loss(history), reference_loss(history)
        if loss is None or reference is None or loss <= self.loss * relaxed * reference:
            return
        if steps_done(history) < self.min_steps or self._explained(history):
            return
        layers = layer_gradients(history, self.probes)
        if len(layers) < self.min_layers:
            return
        value = sorted(layer.share for layer in layers)[len(layers) // _QUARTER]
        if value < self.share / relaxed:
            yield self._alert(layers, value, {"loss": loss, "reference_loss": reference})

    def _explained(self, history: History) -> bool:
        bad = broken_since(history) is not None or started_badly(history, 3.0) or decay_explains(history)
        return bad or largest_dead(history) >= self.dead or explains_loss(history)

    def _alert(self, layers: list[LayerGradient], value: float, losses: dict[str, float]) -> Alert:
        first, last = layers[0], layers[-1]
        step = (last.share / first.share) ** (1 / (len(layers) - 1))
        through = last.share > self.share and first.share < last.share
        limit = max(self.share, value)
        few = [layer for layer in layers if layer.share <= limit]
        cause = "depth or saturating activations" if through else "initialisation"
        return Alert(
            rule=self.name,
            severity="warning",
            value=value,
            threshold=self.share,
            cause=cause,
            message=(
                f"{len(few)} of {len(layers)} layers get {limit:.2g} of the gradient or less ({few[0].layer} gets "
                f"{few[0].share:.1e}), and the loss is {losses['loss']:.3g} "
                f"where nothing learned means {losses['reference_loss']:.3g}."
            ),
            advice=_advice(through, step),
            evidence={
                **losses,
                "first_layer_share": first.share,
                "last_layer_share": last.share,
                "factor_per_layer": step,
                "layers": float(len(layers)),
            },
            alternatives=["initialisation" if through else "depth or saturating activations", "dead filters"],
            source=SOURCE,
        )


def _advice(through: bool, step: float) -> str:
    if through:
        return (
            f"The gradient shrinks about {step:.2g} times a layer: put a normalisation (BatchNorm, GroupNorm) behind "
            "each convolution, use ReLU instead of sigmoid or tanh, or add skip connections."
        )
    return "Use the default (Kaiming) initialisation, or a normalisation behind each layer; the weights are too small."
