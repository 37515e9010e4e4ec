"""Rule `dead_filters`: filters that are zero on every input."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp.rules._evidence import RELAXED, recent_loss, reference_loss, severity_of
from lightning_interp.rules._jumps import early_jump
from lightning_interp.rules._shares import WITHERED, Share, check_thresholds, count, find_shares
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "CS231n, neural networks 1 (dying ReLU); Lu et al. 2019 (born dead); shares measured"
_LOW = 0.1  # part of the loss of a network that has learned nothing


@dataclass(frozen=True)
class DeadFiltersRule(Rule):
    """The dead share of a layer reaches `info`, `warning` or `critical` in two windows running, or in the last one.

    A filter is dead if it is zero at every position of every input of the window, so this does not mistake the
    sparsity of a healthy layer for death. Filters that `torch.nn.utils.prune` took out whole don't count, and
    the share is of the others. The cause, for at least half of the dead: dead in every window since before the first
    update, or after a bad start -> inputs (if these are off), initialisation or bias; died after the loss had leapt up
    in the first steps -> learning rate; else unknown. Of unknown cause, in a network whose loss is below a tenth of
    where it began, they are a warning at most: it does without them. Does not need a cross-entropy, or any particular
    loss.

    Source: CS231n; Lu et al. 2019. Measured by `benchmarks/diagnosis` against a count over all images: found 110 of
    110 runs with a quarter of a layer dead or more, and one other; on other networks, data and optimizers 142 of 143,
    and one other. Born dead are those that are dead in every window: the first one is a single batch, and of the
    filters that are silent in it some fire later.

    Attributes:
        info: Share in [0, 1] that is worth a note.
        warning: Share that costs capacity.
        critical: Share that cripples the layer.
    """

    name: ClassVar[str] = "dead_filters"
    needs: ClassVar[tuple[str, ...]] = (
        "dead_fraction", "born_dead_fraction", "num_filters", "loss", "loss_before", "loss_after", "learning_rate",
        "input_mean", "input_std", "num_classes", "weight_norm",
    )  # fmt: skip

    info: float = 0.05
    warning: float = 0.25
    critical: float = 0.5

    def __post_init__(self) -> None:
        check_thresholds(self.info, self.warning, self.critical)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for each layer concerned."""
        thresholds = (self.info, self.warning, self.critical)
        for share in find_shares(history, "dead_fraction", self.name, thresholds, active):
            born = "" if share.born is None else f"; {100 * share.born:.0f} % since before the first update"
            evidence = {"dead_fraction": share.now, "since_step": float(share.since)}
            if share.born is not None:
                evidence["born_dead_fraction"] = share.born
            jump = early_jump(history)
            if jump is not None:
                evidence |= {"jump": jump.factor, "jump_step": float(jump.step)}
            found = count(history, share.layer, share.now, of_unpruned=True)
            held = severity_of(active, (self.name, share.layer)) == "warning"
            spare = share.cause is None and share.now < 1 and _does_without(history, RELAXED if held else 1.0)
            if spare and share.severity == "critical":
                share = share._replace(severity="warning")
            yield Alert(
                rule=self.name,
                severity=share.severity,
                layer=share.layer,
                value=share.now,
                threshold=dict(zip(("info", "warning", "critical"), thresholds, strict=True))[share.severity],
                cause=share.cause,
                message=f"{found} of {share.layer} are dead{_since(share, self.info)}{born}.",
                advice=_SPARE if spare else _advice(history, share),
                evidence=evidence,
                alternatives=share.alternatives,
                source=SOURCE,
            )


_SPARE = "Nothing for this run: its loss is low without them, so a narrower layer would do."


def _does_without(history: History, relaxed: float) -> bool:
    """Whether the network has learned nearly all there is to learn."""
    loss, reference = recent_loss(history), reference_loss(history)
    return loss is not None and reference is not None and loss < _LOW / relaxed * reference


def _since(share: Share, info: float) -> str:
    """Of how many that is known; of a share that was there from the start, `born` says more."""
    return f", {100 * min(info, share.now):.3g} % or more since step {share.since} or earlier" if share.since else ""


def _advice(history: History, share: Share) -> str:
    if share.cause == "learning rate":
        jump = early_jump(history)
        factor = 10 if jump is None else 1 / jump.rate_factor
        return f"Divide the learning rate by about {factor:.0f} or warm it up, and start anew: the dead rarely revive."
    if share.cause == "inputs":
        mean, std = history.fact("input_mean", 0.0), history.fact("input_std", 1.0)
        return f"Normalise the images: subtract {mean:.3g} and divide by {max(std, 1e-12):.3g}."
    if share.cause == "weight decay":
        return WITHERED
    if share.cause is not None:
        return f"Use Kaiming initialisation with zero bias in {share.layer}, or a normalisation before its ReLU."
    return f"Try a rate 3 times lower, a normalisation before the ReLU of {share.layer}, or LeakyReLU."
