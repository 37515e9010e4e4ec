"""`Interp`: everything in one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from lightning_interp._options import check_choice, check_share
from lightning_interp.callbacks._budget import Budget
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
from lightning_interp.callbacks.alerts import Alerts
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.class_images import ClassImages
from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.embedding_projection import EmbeddingProjection
from lightning_interp.callbacks.filter_grid import FilterGrid
from lightning_interp.callbacks.influence import Influence
from lightning_interp.callbacks.occlusion_maps import OcclusionMaps
from lightning_interp.callbacks.saliency_maps import SaliencyMaps
from lightning_interp.callbacks.top_patches import TopPatches
from lightning_interp.callbacks.training_dynamics import TrainingDynamics
from lightning_interp.records import Scalar
from lightning_interp.rules.alert import Severity

Level = Literal["light", "standard", "full"]
_Options = dict[str, Any]
_SELDOM = 5  # epochs between what costs more than a few images
log = logging.getLogger("lightning_interp")


def standard_callbacks(  # noqa: PLR0913 - options, by keyword
    level: Level = "standard",
    *,
    layers: Sequence[str] | None = None,
    max_layers: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
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
    | `standard` | the same, `FilterGrid`, `ActivationSparsity`, `SaliencyMaps`; every fifth epoch |
    | | `EmbeddingProjection` (PCA of 500 points) |
    | `full` | the same with more methods and images, `OcclusionMaps`, `TopPatches`; every fifth epoch `ClassImages`, |
    | | t-SNE at two perplexities, `Influence` |

    The options are those of the callbacks, see there.

    Raises:
        ArgumentError: If an option is wrong.
    """
    check_choice("level", level, ("light", "standard", "full"))
    colours: _Options = {"mean": mean, "std": std}
    named: _Options = {"name": name, "on_error": on_error}
    shown: _Options = {"layers": layers, "max_layers": max_layers, **named}
    callbacks: list[InterpCallback] = [TrainingDynamics(**shown), DeadFilters(**shown)]
    if level != "light":
        callbacks += _pictures(level == "full", shown, colours, {**colours, "classes": classes, **named})
    alerts = Alerts(on_alert=on_alert, min_severity=min_severity, mute=mute, **named)
    return [*callbacks, alerts]


def _pictures(full: bool, shown: _Options, colours: _Options, sampled: _Options) -> list[InterpCallback]:
    """What draws. `shown`, `colours`, `sampled`: the options that the callbacks have in common."""
    standard: list[InterpCallback] = [
        ActivationSparsity(num_samples=4 if full else 1, **shown, **colours),
        FilterGrid(**shown),
    ]
    if not full:
        return [
            *standard,
            # Two passes over four images; the curves that test the maps cost twenty more.
            SaliencyMaps(method=["gradient", "grad_cam"], curve_steps=0, **sampled),
            EmbeddingProjection(max_points=500, every_n_epochs=_SELDOM, **sampled),
        ]
    named = {key: shown[key] for key in ("name", "on_error")}
    return [
        *standard,
        SaliencyMaps(method=["gradient", "guided_backprop", "grad_cam"], **sampled),
        OcclusionMaps(**sampled),
        TopPatches(layers=shown["layers"], **colours, **named),
        ClassImages(every_n_epochs=_SELDOM, **sampled),
        EmbeddingProjection(method="tsne", perplexity=[10.0, 40.0], max_points=1000, every_n_epochs=_SELDOM, **sampled),
        Influence(every_n_epochs=_SELDOM, **sampled),
    ]


class Interp(Family):
    """One callback that holds the rest: `Trainer(callbacks=[Interp()])`.

    With a `budget`, 0.02 for two percent, pictures, maps and whatever else costs much are shown less often, so that the
    seconds of all callbacks keep within that share of the training time (wall time since the fit began, without
    theirs; after a resume both go on). The numbers of `DeadFilters`, `TrainingDynamics`, `ActivationSparsity`,
    `FilterGrid` and the alerts' looks at them are never left out: they are paid first, and where they alone exceed the
    budget, mostly in the first hundred steps, the log says so in the end. The rest is shared: each sampler
    may take as much as the others, and what the cheap ones don't need goes to the dear ones. Shown in any case are the
    state before the first step, the first time due and the last state, for which seconds are set aside from the start:
    in a short run they alone may exceed the budget. Rules that read a sampler (`suspect_labels`, `unlearned_class`)
    judge as seldom as it is shown. Logged: `interp.cost/share`; the log says what is left out, once, and sums up.

    Attributes:
        children: The callbacks it holds, see `standard_callbacks`.
        alerts: The one among them that raises alerts: `alerts.active`, `alerts.history`.
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        level: Level = "standard",
        *,
        budget: float | None = None,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        on_alert: Literal["log", "stop", "raise"] = "log",
        min_severity: Severity = "critical",
        mute: Sequence[str] | None = None,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Makes the callbacks.

        Args:
            level: `"light"` (numbers and alerts only), `"standard"` (cheap enough to leave on) or `"full"`.
            budget: Share of the training time in (0, 1], 0.02 for two percent, that all of it may take; None does not
                look at the time.
            layers: Names or globs of the layers to look at, as in `named_modules()`; None takes all that apply.
            max_layers: Most layers with scalars and pictures of their own, 1,000 at most; aggregates always hold all.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            classes: Names of the classes.
            on_alert: What an alert does: `"log"`, `"stop"` the training, or `"raise"`.
            min_severity: For `"stop"` and `"raise"`: the least severity that does.
            mute: Rules to silence: `rule` or `rule:layer-glob`.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and lets the callback concerned rest; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(name=name, on_error=on_error)
        check_share("budget", budget)
        self.children = standard_callbacks(
            level,
            layers=layers,
            max_layers=max_layers,
            mean=mean,
            std=std,
            classes=classes,
            on_alert=on_alert,
            min_severity=min_severity,
            mute=mute,
            name=name,
            on_error=on_error,
        )
        self.alerts = next(child for child in self.children if isinstance(child, Alerts))
        self.budget = budget
        self._budget = None if budget is None else Budget(float(budget), self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves out what a sharded strategy does not allow; alone, such a callback is refused by name."""
        strategy, sharded = type(trainer.strategy).__name__, is_sharded(trainer)
        kept = [child for child in self.children if not (sharded and child.works_alone)]
        if len(kept) < len(self.children):
            left_out = ", ".join(type(child).__name__ for child in self.children if child not in kept)
            self.children = kept
            log.warning(f"{strategy} allows no work on one rank alone, so Interp leaves out {left_out}.")
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._budget is not None:
            self._budget.begin()

    def pass_on(self, children: Sequence[InterpCallback], hook: str, *args: Any, **kwargs: Any) -> None:
        """Calls a hook of these children; within the budget, if there is one."""
        if self._budget is None:
            super().pass_on(children, hook, *args, **kwargs)
            return
        with self._budget.around(hook, args[0]):
            super().pass_on(children, hook, *args, **kwargs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the share of the training time."""
        self._log_share(trainer, step=max(0, self.step_of(trainer) - 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what the budget did."""
        self._log_share(trainer, step=self.step_of(trainer))  # the last step has the one of before the last state
        if self._budget is not None and trainer.is_global_zero:
            log.log(logging.WARNING if self._budget.left_out else logging.INFO, self._budget.summary())

    def _log_share(self, trainer: Trainer, *, step: int) -> None:
        if self._budget is not None:
            share = Scalar(tag=f"interp.cost{self._suffix}/share", step=step, value=self._budget.spent_share)
            self.write(trainer, [share])

    def state_dict(self) -> dict[str, Any]:
        """The states of the children, and the accounts of the budget."""
        own = {} if self._budget is None else {"budget": self._budget.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if self._budget is not None and "budget" in state_dict:
            self._budget.load_state_dict(state_dict["budget"])
