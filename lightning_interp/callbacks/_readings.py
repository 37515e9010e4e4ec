"""From the fetched values of one probed step to the numbers that are reported; on the host, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lightning_interp.functional.updates import relative_norm, step_ratio

# The loss that was followed counts as the training loss within so much.
AGREEMENT = 1e-4


@dataclass
class Movement:
    """One probed step on the host; layers by name.

    Attributes:
        update_norm: Norm of the update of all parameters that a layer owns.
        update_ratio: Norm of the update over norm of the weights of two or more axes; without layers for which it is
            not defined (zeros that moved).
        weight_norm: Norm of these weights before the step.
        gradient_norm: Norm of the gradient of these weights, before clipping; layers outside all optimizers have none.
        total_gradient: Norm of the gradient of all parameters.
        broken: Layers with a gradient or weight that is NaN or infinite.
    """

    update_norm: dict[str, float] = field(default_factory=dict)
    update_ratio: dict[str, float] = field(default_factory=dict)
    weight_norm: dict[str, float] = field(default_factory=dict)
    gradient_norm: dict[str, float] = field(default_factory=dict)
    total_gradient: float = 0.0
    broken: list[str] = field(default_factory=list)

    @property
    def median_ratio(self) -> float:
        """Median of the update ratios, NaN without any."""
        return median(self.update_ratio.values()) if self.update_ratio else math.nan

    @property
    def largest_ratio(self) -> float:
        """Largest of the update ratios, NaN without any."""
        return max(self.update_ratio.values(), default=math.nan)


def movement(values: dict[str, list[float]], notes: dict[str, Any]) -> Movement | None:
    """Sums the norms of `UpdateProbe.after_step` over layers.

    Args:
        values: `before`, `update`, `gradient`: norms of single parameters.
        notes: `layers`, `weights`, `graded`, `held`: which is whose.

    Returns:
        None for a step that mixed precision skipped: nothing moved, and a gradient was not finite.
    """
    before, update = values["before"], values["update"]
    gradient = dict(zip(notes["graded"], values["gradient"], strict=True))
    if not any(update) and not all(map(math.isfinite, gradient.values())):
        return None
    held = set(notes["held"])
    result = Movement(total_gradient=_norm(gradient.values()))
    for layer, indices in notes["layers"].items():
        if not layer:  # parameters of the LightningModule itself: they count in the total only
            continue
        result.update_norm[layer] = _norm(update[i] for i in indices)
        finite = [*(update[i] for i in indices), *(gradient.get(i, 0.0) for i in indices)]
        if not all(map(math.isfinite, finite)):
            result.broken.append(layer)
    for layer, indices in notes["weights"].items():
        if not layer:
            continue
        ratio = relative_norm(_norm(update[i] for i in indices), before_norm := _norm(before[i] for i in indices))
        result.weight_norm[layer] = before_norm
        if before_norm != 0 or ratio == 0:
            result.update_ratio[layer] = ratio
        if held.intersection(indices):
            result.gradient_norm[layer] = _norm(gradient.get(i, 0.0) for i in indices)
    return result


@dataclass(frozen=True)
class SameBatch:
    """The loss of one batch before and after the update that it caused.

    Attributes:
        before: As `training_step` returned it.
        after: In the same unit.
        ratio: Fall over predicted fall; NaN where that means nothing.
    """

    before: float
    after: float
    ratio: float


def same_batch(values: dict[str, list[float]], *, exact: bool, resolution: float) -> SameBatch | None:
    """The two losses in the unit of the returned one.

    Args:
        values: Single numbers: `returned`; `value` and `again`, the loss that was followed, before and after;
            `backward`, what gradients were taken of; `fall`, -g . Delta in its scale.
        exact: Whether `value` is known to be the returned loss up to a factor (gradient scaler, accumulation).
        resolution: Smallest predicted fall, as a fraction of the loss, that does not drown in rounding.

    Returns:
        None if there was no loss to follow, or it is not the one that was returned.
    """
    if "again" not in values:
        return None
    returned, value, again = values["returned"][0], values["value"][0], values["again"][0]
    if not exact and not agree(value, returned):
        return None
    backward = values["backward"][0]
    fall = values["fall"][0] * (value / backward if backward else math.nan)
    after = again * (returned / value) if value else math.nan
    return SameBatch(returned, after, step_ratio(value, again, fall, resolution=resolution))


def agree(value: float, returned: float) -> bool:
    """Whether two losses are the same up to rounding.

    Example:
        >>> agree(1.0, 1.00001), agree(1.0, 1.001), agree(float("nan"), 1.0)
        (True, False, False)
    """
    return abs(value - returned) <= AGREEMENT * abs(returned)


def _norm(parts: Iterable[float]) -> float:
    return math.sqrt(sum(part * part for part in parts))
