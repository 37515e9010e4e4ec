"""Rule `dormant_units`: units that hardly do anything, where nothing is exactly zero."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp.rules._shares import WITHERED, check_thresholds, count, find_shares
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Sokar et al. 2023, definition 3.1 (dormant neurons); shares as for dead filters"


@dataclass(frozen=True)
class DormantUnitsRule(Rule):
    """The dormant share of a layer reaches `info`, `warning` or `critical` in two windows running.

    GELU, SiLU and the like have no exact zero, so their units are judged by Sokar's score: the mean magnitude of a
    unit over that of its layer. The callback that measures counts a unit as dormant at a score of 0.025 or less.
    Causes as in `dead_filters`, but by the first window alone. Does not need a cross-entropy, or any particular loss.

    Source: Sokar et al. 2023, section 3. The shares are those of `dead_filters`; they are not measured for this one.

    Attributes:
        info: Share in [0, 1] that is worth a note.
        warning: Share that costs capacity.
        critical: Share that cripples the layer.
    """

    name: ClassVar[str] = "dormant_units"
    needs: ClassVar[tuple[str, ...]] = (
        "dormant_fraction", "num_filters", "loss", "loss_before", "loss_after", "learning_rate", "input_mean",
        "input_std", "num_classes", "weight_norm",
    )  # fmt: skip

    info: float = 0.05
    warning: float = 0.25
    critical: float = 0.5

    def __post_init__(self) -> None:
        check_thresholds(self.info, self.warning, self.critical)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for each layer concerned."""
        thresholds = (self.info, self.warning, self.critical)
        for share in find_shares(history, "dormant_fraction", self.name, thresholds, active):
            evidence = {"dormant_fraction": share.now, "since_step": float(share.since)}
            if share.born is not None:
                evidence["born_dormant_fraction"] = share.born
            yield Alert(
                rule=self.name,
                severity=share.severity,
                layer=share.layer,
                value=share.now,
                threshold=dict(zip(("info", "warning", "critical"), thresholds, strict=True))[share.severity],
                cause=share.cause,
                message=(
                    f"{count(history, share.layer, share.now)} of {share.layer} are dormant: next to the others of the "
                    f"layer they hardly respond to any input."
                ),
                advice=_ADVICE.get(share.cause or "", _NARROW),
                evidence=evidence,
                alternatives=share.alternatives,
                source=SOURCE,
            )


_NARROW = "Use a layer with so many units fewer, or add normalisation and weight decay; then compare."
_ADVICE = {
    "learning rate": "Divide the learning rate by about 10, or warm it up.",
    "inputs": "Normalise the images to zero mean and unit standard deviation.",
    "initialisation": "Use the default initialisation with zero bias.",
    "weight decay": WITHERED,
}
