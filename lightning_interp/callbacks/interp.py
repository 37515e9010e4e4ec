"""`Interp`: everything in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_interp._options import check_choice
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.filter_grid import FilterGrid
from lightning_interp.callbacks.training_dynamics import TrainingDynamics
from lightning_interp.rules.alert import Severity

Level = Literal["light", "standard", "full"]


def standard_callbacks(  # noqa: PLR0913 - options, by keyword
    level: Level = "standard",
    *,
    layers: Sequence[str] | None = None,
    max_layers: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    on_alert: Literal["log", "stop", "raise"] = "log",
    min_severity: Severity = "critical",
    mute: Sequence[str] | None = None,
    name: str | None = None,
    on_error: OnError = "warn",
) -> list[InterpCallback]:
    """The callbacks that `Interp` holds, as a list to change before it goes to the Trainer.

    | level | what |
    |---|---|
    | `light` | `TrainingDynamics`, `DeadFilters`, `Alerts`: numbers and alerts only |
    | `standard` | the same, and `FilterGrid` and `ActivationSparsity` with their pictures |
    | `full` | the same, with the activation maps of four images |

    The options are those of the callbacks, see there.

    Raises:
        ArgumentError: If an option is wrong.
    """
    check_choice("level", level, ("light", "standard", "full"))
    callbacks: list[InterpCallback] = [
        TrainingDynamics(layers=layers, max_layers=max_layers, name=name, on_error=on_error),
        DeadFilters(layers=layers, max_layers=max_layers, name=name, on_error=on_error),
    ]
    if level != "light":
        callbacks += [
            ActivationSparsity(
                layers=layers,
                max_layers=max_layers,
                num_samples=4 if level == "full" else 1,
                mean=mean,
                std=std,
                name=name,
                on_error=on_error,
            ),
            FilterGrid(layers=layers, max_layers=max_layers, name=name, on_error=on_error),
        ]
    alerts = Alerts(
        on_alert=on_alert,
        min_severity=min_severity,
        mute=mute,
        name=name,
        on_error=on_error,
    )
    return [*callbacks, alerts]


class Interp(Family):
    """One callback that holds the rest: `Trainer(callbacks=[Interp()])`.

    Attributes:
        children: The callbacks it holds, see `standard_callbacks`.
        alerts: The one among them that raises alerts: `alerts.active`, `alerts.history`.
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        level: Level = "standard",
        *,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        on_alert: Literal["log", "stop", "raise"] = "log",
        min_severity: Severity = "critical",
        mute: Sequence[str] | None = None,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Makes the callbacks.

        Args:
            level: `"light"` (numbers and alerts only), `"standard"` (cheap enough to leave on) or `"full"`.
            layers: Names or globs of the layers to look at, as in `named_modules()`; None takes all that apply.
            max_layers: Most layers with scalars and pictures of their own; aggregates always hold all.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            on_alert: What an alert does: `"log"`, `"stop"` the training, or `"raise"`.
            min_severity: For `"stop"` and `"raise"`: the least severity that does.
            mute: Rules to silence: `rule` or `rule:layer-glob`.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and lets the callback concerned rest; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(name=name, on_error=on_error)
        self.children = standard_callbacks(
            level,
            layers=layers,
            max_layers=max_layers,
            mean=mean,
            std=std,
            on_alert=on_alert,
            min_severity=min_severity,
            mute=mute,
            name=name,
            on_error=on_error,
        )
        self.alerts = next(child for child in self.children if isinstance(child, Alerts))
