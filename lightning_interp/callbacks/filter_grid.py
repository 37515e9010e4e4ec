"""What the filters look like, how smooth and varied they are, and how far they have moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_interp._options import check_positive_int, select
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._ranks import refuse_sharded
from lightning_interp.callbacks._start import StartWeights
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.schedule import BatchHooks
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.filters import filter_numbers
from lightning_interp.functional.undisturbed import undisturbed
from lightning_interp.render.color import Pixels
from lightning_interp.render.filters import filter_grid, largest_channels, shown_channels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FilterGrid(InterpCallback):
    """Shows the filters of every convolution as a picture, dead ones outlined in green, and logs three numbers of each.

    Logged before the first step, when due, and at the end of the training:

    | tag | what |
    |---|---|
    | `interp.filters/<NN>_<layer>` | the filters, see `render.filters.filter_grid` |
    | `interp.filter_smoothness/<NN>_<layer>` | lag-1 spatial autocorrelation, about -1/(K-1) for noise; not for 1x1 |
    | `interp.filter_entropy/<NN>_<layer>` | variance entropy in [0, 1], about 1 for noise; not for 1x1 |
    | `interp.filter_movement/<NN>_<layer>` | norm(W - W0) / norm(W0), W0 = before the first step |
    | `interp/filter_smoothness_mean`, `interp/filter_entropy_mean`, `interp/filter_movement_max` | over all layers |

    All convolutions count, transposed, grouped and depthwise ones too. Which filters are dead is known where
    `DeadFilters` runs in the same Trainer: those of its last window. Where a layer has more channels than can be seen,
    those with the largest norm before the first step are shown, the same ones for the whole run.

    The weights before the first step are kept on the CPU. Up to a million of them lie in the checkpoint, more are
    written once to the log folder (`interp_step0_<hash>.pt`), and the checkpoint holds the path and the SHA-256.
    Weights that another callback averages or swaps are seen as they stand when this one is called.

    Cost: a few passes over the weights when due; no forward.
    Source: CS231n, "Understanding and visualizing CNNs"; Krizhevsky, Sutskever and Hinton 2012, figure 3; Gavrikov and
    Keuper 2022.
    """

    measures: ClassVar[tuple[str, ...]] = ("filter_smoothness", "filter_entropy", "filter_movement")
    provides: ClassVar[tuple[str, ...]] = ("filters", *measures, "cost")
    can_be_spared: ClassVar[bool] = True  # the pictures; the numbers go on
    works_alone: ClassVar[bool] = True

    def __init__(  # noqa: PLR0913 - options
        self,
        *,
        max_filters: int = 64,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            max_filters: Most filters in a picture, the first ones; more than 64 are hard to see in TensorBoard.
            every_n_epochs: Due at the end of every n-th epoch; the first one always is. Every epoch by default.
            every_n_train_steps: Due every n training steps instead.
            layers: Names or globs of convolutions; None takes all.
            max_layers: Most layers with pictures and numbers of their own in the loggers.
            name: Tells two instances apart.
            on_error: `"warn"` or `"raise"`.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            layers=layers,
            max_layers=max_layers,
            name=name,
            on_error=on_error,
        )
        check_positive_int("max_filters", max_filters)
        self.max_filters = max_filters
        self._start = StartWeights()
        self._convolutions: dict[str, nn.Module] = {}
        self._shown: int | None = None
        self._measured: int | None = None

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the last run and checks `layers`; a model that is built later is checked when training starts."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_sharded(trainer, self, "reads whole weights")
            self._shown = self._measured = None
            if self.step_of(trainer) == 0:  # else the same Trainer goes on where its last fit ended
                self._start = StartWeights()
            select("layers", self.layers, [name for name, _ in pl_module.named_modules() if name])

    def _chosen(self, layer: str) -> bool:
        """A name of another kind of layer is no error: the option may be shared with callbacks that show those."""
        return self.layers is None or any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the weights before the first step and shows them; after a resume goes on with those that were kept."""
        self._find(pl_module)
        if not self._convolutions:
            return
        weights = {layer: _weight(module) for layer, module in self._convolutions.items()}
        step, directory = self.step_of(trainer), Session.of(trainer).directory
        if step == 0:
            self._start.take(weights)
        elif problem := self._start.fill(weights, directory):
            self.say_once(
                f"FilterGrid does not have the weights before the first step: {problem}. For the layers concerned "
                f"`filter_movement` is relative to the weights at step {step}, where this run was resumed."
            )
        self._keep_start(trainer)
        if step == 0:
            self._show(trainer, step=0)

    def _find(self, pl_module: LightningModule) -> None:
        """Takes the layers that the model has now; lazy ones come when the training has given them a shape."""
        available = _convolutions(pl_module)
        if not available and not any(map(is_lazy, pl_module.parameters())):
            self.say_once(f"FilterGrid has nothing to show: {type(pl_module).__name__} has no convolution.")
        self._convolutions = {layer: module for layer, module in available.items() if self._chosen(layer)}

    def _keep_start(self, trainer: Trainer) -> None:
        directory = Session.of(trainer).directory
        if trainer.is_global_zero and (problem := self._start.write(directory)) and directory is not None:
            self.say_once(f"FilterGrid can't keep the weights before the first step for a resume: {problem}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the filters after a due step."""
        if self.scheduled("on_train_batch_end", trainer):
            self._show_once(trainer, step=self.step_of(trainer))

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of a batch that the schedule makes due."""
        return self.scheduled_hooks(trainer, step, stepping=stepping)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the filters after a due epoch."""
        if self.scheduled("on_train_epoch_end", trainer):
            self._show_once(trainer, step=max(self.step_of(trainer) - 1, 0))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last state, unless it has been shown."""
        self._show_once(trainer, step=max(self.step_of(trainer) - 1, 0))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the model."""
        self._convolutions = {}
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the model."""
        self._convolutions = {}
        super().on_exception(trainer, pl_module, exception)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The weights before the first step, or where they lie."""
        return {"start": self._start.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._start.load_state_dict(state_dict["start"])

    # ------------------------------------------------------------------ what

    def _show_once(self, trainer: Trainer, *, step: int) -> None:
        if self._shown != step:
            self._shown = None if self.spared else step  # the last state is shown in any case
            self._show(trainer, step=step)

    def _show(self, trainer: Trainer, *, step: int) -> None:
        """Logs numbers on all ranks (their rules read them) and pictures where they are written."""
        measuring = self._measured != step or step == 0
        if measuring:
            self._measured = step
            self._look_again(trainer, step=step)
        if not self._convolutions:
            return
        self.wait_for_training(trainer)
        if measuring:
            self._log_numbers(trainer, step=step)
        if trainer.is_global_zero and trainer.loggers and not self.quiet and not self.spared:
            dead = Session.of(trainer).dead
            pictures = {
                layer: partial(self._picture, layer, module, dead.get(layer, []))
                for layer, module in self._convolutions.items()
            }
            self.log_pictures(trainer, "filters", pictures, step=step)
        self.log_cost(trainer, step=step)

    def _look_again(self, trainer: Trainer, *, step: int) -> None:
        """Takes the layers that the model has now: the user may have replaced some."""
        self._find(trainer.lightning_module)
        weights = {layer: _weight(module) for layer, module in self._convolutions.items()}
        new = [layer for layer, weight in weights.items() if not self._start.fits(layer, weight)]
        if new:
            self._start.take({layer: w if layer in new else self._start.weights[layer] for layer, w in weights.items()})
            self._keep_start(trainer)
            self.say_once(
                f"{', '.join(new[:4])}{', ...' if len(new) > 4 else ''} came later, or with another shape: there "
                f"FilterGrid's `filter_movement` is relative to the weights at step {step}."
            )

    def _log_numbers(self, trainer: Trainer, *, step: int) -> None:
        weights = {layer: _weight(module) for layer, module in self._convolutions.items()}
        numbers = filter_numbers(weights, self._start.weights)
        # What has no smoothness or entropy (1x1, all kernels alike) has none to log; a weight that is not finite shows
        # in the movement, which always exists.
        smoothness = {layer: n.smoothness for layer, n in numbers.items() if not math.isnan(n.smoothness)}
        entropy = {layer: n.entropy for layer, n in numbers.items() if not math.isnan(n.entropy)}
        movement = {layer: n.movement for layer, n in numbers.items()}
        for quantity, values in zip(self.measures, (smoothness, entropy, movement), strict=True):
            self.log_layers(trainer, quantity, values, step=step)
        for quantity, values in (("filter_smoothness_mean", smoothness), ("filter_entropy_mean", entropy)):
            if values:
                self.log_number(trainer, quantity, math.fsum(values.values()) / len(values), step=step)
        if movement:
            # numpy's maximum is NaN as soon as one value is: that layer is the one to look at.
            self.log_number(trainer, "filter_movement_max", float(np.max(list(movement.values()))), step=step)

    def _picture(self, layer: str, module: nn.Module, dead: list[int]) -> Pixels:
        start = _filters_first(self._start.weights[layer], module)
        count = shown_channels(tuple(start.shape), self.max_filters)
        channels = largest_channels(_numpy(start[: self.max_filters]), count)
        weight = _filters_first(_weight(module), module)[: self.max_filters]
        return filter_grid(_numpy(weight), dead=dead, max_filters=self.max_filters, channels=channels)


def _convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Layer to convolution; without those whose weight has no shape yet, or is complex."""
    return {
        layer: module
        for layer, module in model.named_modules()
        if isinstance(module, _CONVOLUTIONS) and not any(is_lazy(p) or p.is_complex() for p in module.parameters())
    }


def _weight(module: nn.Module) -> Tensor:
    """The weight as it is now, off the graph."""
    if is_parametrized(module, "weight"):
        # Reading it computes it, and spectral norm in train mode goes one step further with its buffers at that.
        with undisturbed(module, training=False):
            return _detached(module.weight)
    return _detached(module.weight)


def _detached(weight: Any) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"Expected a convolution's `weight` to be a tensor, but got {type(weight).__name__}.")
    return weight.detach()


def _filters_first(weight: Tensor, module: nn.Module) -> Tensor:
    """(O, I, *kernel): a transposed convolution has (I, O / groups, *kernel), group after group."""
    if not isinstance(module, _TRANSPOSED):
        return weight
    groups = int(module.groups)
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * outputs, inputs // groups, *kernel)


def _numpy(weight: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    array: np.ndarray[Any, np.dtype[np.float32]] = weight.to(torch.float32).cpu().numpy()
    return array
