"""Rule `non_finite`: a loss, gradient or weight is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp.rules._evidence import broken_since, first_bad_loss, first_loss
from lightning_interp.rules._jumps import early_jump
from lightning_interp.rules.alert import Alert, Severity
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "Common practice (SageMaker Debugger's ExplodingTensor checks the same)"


@dataclass(frozen=True)
class NonFiniteRule(Rule):
    """The first NaN or infinity, with its layer and step. Works for any loss; there is no threshold.

    Critical while the loss is not finite, or right after a gradient or weight was not. A loss that is finite again is
    a warning (a batch was skipped); a gradient after which the loss stayed finite is information (with mixed
    precision the scaler skips such steps, and that is normal).
    """

    name: ClassVar[str] = "non_finite"
    needs: ClassVar[tuple[str, ...]] = ("loss", "non_finite_step")

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run: when one number is not finite, soon none is."""
        loss_step = first_bad_loss(history)
        layers = sorted(
            (history.fact("non_finite_step", math.inf, layer), order, layer)
            for order, layer in enumerate(history.layers("non_finite_step"))
        )
        if loss_step is None and not layers:
            return
        first_step, _, first_layer = layers[0] if layers else (math.inf, 0, "")
        step = min(first_step, math.inf if loss_step is None else loss_step)
        severity = _severity(history, loss_step, first_step)
        cause, alternatives = _cause(history, step)
        where = f"The gradient or weight of {first_layer}" if first_step <= step else "The loss"
        also = f"; the loss at step {loss_step}" if loss_step is not None and first_step <= step else ""
        yield Alert(
            rule=self.name,
            severity=severity,
            value=math.nan,
            cause=cause,
            message=f"{where} was NaN or infinite at step {step:.0f}{also}{_outcome(severity)}.",
            advice=_SKIPPED if severity == "info" else _ADVICE.get(cause or "", _LOOK),
            evidence={"first_step": float(step), "layers": float(len(layers))},
            alternatives=alternatives,
            source=SOURCE,
        )


_LOOK = (
    "Look at the batch of that step and at logarithms, divisions and square roots in the loss; "
    "torch.autograd.set_detect_anomaly(True) names the operation."
)
_SKIPPED = "Nothing, if the step was skipped on purpose, as mixed precision does."
_ADVICE = {
    "learning rate": "Divide the learning rate by about 10, or warm it up over the first few hundred steps.",
    "inputs": "Remove NaN and infinite values from the images of the training set.",
}


def _severity(history: History, loss_step: int | None, layer_step: float) -> Severity:
    if loss_step is not None:
        return "critical" if broken_since(history) is not None else "warning"
    # Two steps on, a poisoned weight would have reached the loss.
    later = any(point.step >= layer_step + 2 for point in history.finite("loss")[-1:])
    return "info" if later else "critical"


def _outcome(severity: Severity) -> str:
    return {"critical": "", "warning": ", and finite again later", "info": ", and the loss stayed finite"}[severity]


def _cause(history: History, step: float) -> tuple[str | None, list[str]]:
    others = ["a batch with NaN or infinite values", "an operation of the loss", "overflow in half precision"]
    if not math.isfinite(history.fact("input_mean", 0.0)) or not math.isfinite(history.fact("input_std", 1.0)):
        return "inputs", others[1:]
    first = first_loss(history)
    if step > 0 and first is not None and math.isfinite(first) and early_jump(history) is not None:
        return "learning rate", others
    return None, (["initialisation"] if step == 0 else ["learning rate"]) + others
