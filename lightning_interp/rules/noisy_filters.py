"""Rule `noisy_filters`: the first layer's filters are as rough as at random."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_at_least, check_number
from lightning_interp.rules._evidence import recent_loss, reference_loss, steps_done
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "CS231n, understanding CNNs (noisy first-layer filters); threshold measured"
STILL = 0.02  # movement under which a first layer did not take part; trained ones moved by 0.07 and more


@dataclass(frozen=True)
class NoisyFiltersRule(Rule):
    """The first layer is hardly smoother than at step 0: only ever information.

    smoothness = mean lag-1 spatial autocorrelation of the filters (white noise: -1 / (k^2 - 1)). Fires if it rose by
    less than `gain` over its own value at step 0, is below `smooth`, and `min_steps` steps are done. Only the first
    layer that has a smoothness is looked at: what CS231n says holds for filters that see the image. Nor is it said
    where the loss is below `loss` of ln C (of the first loss without a cross-entropy): the noise does no harm there.

    Smoothness is no verdict: a run that blew up is smoother than a healthy one, random labels smooth too, and a run
    with noisy filters reached a training accuracy of 0.78. So this neither says "overfitted" nor "healthy".

    Source: CS231n; measured with 7x7 filters (healthy SGD after 1200 steps +0.15, a too-low rate 0.00).

    Attributes:
        gain: Rise of the autocorrelation since step 0.
        smooth: Autocorrelation from which filters are smooth already, as in a pretrained network.
        loss: Part of ln C (or of the first loss) under which the run is doing well anyway.
        min_steps: Steps before which nothing is said.
    """

    name: ClassVar[str] = "noisy_filters"
    needs: ClassVar[tuple[str, ...]] = ("filter_smoothness", "filter_movement", "loss", "num_classes")

    gain: float = 0.02
    smooth: float = 0.05
    loss: float = 0.1
    min_steps: int = 300

    def __post_init__(self) -> None:
        check_number("gain", self.gain, low=0, high=2)
        check_number("smooth", self.smooth, low=-1, high=1)
        check_number("loss", self.loss, low=0, high=math.inf)
        check_at_least("min_steps", self.min_steps, 1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the first layer, or none."""
        quantity = "filter_smoothness"
        series = ((layer, history.finite(quantity, layer)) for layer in history.layers(quantity))
        layer, points = next(((layer, points) for layer, points in series if points), ("", []))
        if len(points) < 2 or points[0].step != 0 or steps_done(history) < self.min_steps:
            return
        start, now = points[0].value, points[-1].value
        held = (self.name, layer) in active
        if now - start >= self.gain * (1.5 if held else 1.0) or now >= self.smooth:
            return
        loss, reference = recent_loss(history), reference_loss(history)
        if loss is not None and reference is not None and loss <= self.loss * reference:
            return
        last = history.get("filter_movement", layer).last
        movement = math.nan if last is None else last.value
        still = movement < STILL
        yield Alert(
            rule=self.name,
            severity="info",
            layer=layer,
            value=now - start,
            threshold=self.gain,
            cause="the layer hardly moved" if still else None,
            message=(
                f"The filters of {layer} are hardly smoother than at step 0 (autocorrelation {start:.3f} then, "
                f"{now:.3f} now)."
            ),
            advice=(
                f"The weights moved by {movement:.1%} only: raise the learning rate, or train longer."
                if still
                else "If the loss is still high, train longer or raise the weight decay by 3 to 10 times; else nothing."
            ),
            evidence={"smoothness_start": start, "smoothness": now, "movement": movement},
            alternatives=["too few steps", "learning rate too low", "weight decay too low"],
            source=SOURCE,
        )
