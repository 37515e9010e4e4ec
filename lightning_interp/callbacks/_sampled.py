"""The base of callbacks that look at the same few images for the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp._options import check_positive_int
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._periodic import PeriodicCallback
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import FixedSamples, check_samples, keep, read_samples
from lightning_interp.callbacks.schedule import BatchHooks

# Samples of up to so many numbers (4 MB in float32) lie in each checkpoint; more are read again after a resume.
_IN_CHECKPOINT = 1_000_000
_IMAGE_AXES = 4


class SampledCallback(PeriodicCallback):
    """Measures on fixed samples, on rank zero.

    A subclass writes `measure` only; `images`, `labels` and `masks` are copies, made anew for each call.

    Attributes:
        images: (N, ...) on the model's device, as the model receives them; for the time of `measure`.
        labels: (N, ...) or None.
        masks: (N, H, W) bool, where the data set gives any (see `_masks.read_masks`), or None.
    """

    def __init__(  # noqa: PLR0913 - the common options, passed on by name
        self,
        *,
        num_samples: int = 4,
        samples: list[int] | str | tuple[Tensor, Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            num_samples: How many images, where `samples` is None.
            samples: Indices into the validation set, the path of a `.pt` file, or (images, labels); None takes the
                first images of the validation set, else of the training set, else of the first training batch.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            classes: Names of the classes.
            every_n_epochs: Due at the end of every n-th epoch; the first one always is. Every epoch by default.
            every_n_train_steps: Due every n training steps instead.
            layers: As in `InterpCallback`.
            max_layers: As in `InterpCallback`.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(
            mean=mean,
            std=std,
            classes=classes,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            layers=layers,
            max_layers=max_layers,
            name=name,
            on_error=on_error,
        )
        check_positive_int("num_samples", num_samples)
        check_samples("samples", samples)
        self.num_samples = num_samples
        self.samples = samples

    def _forget(self) -> None:
        super()._forget()
        self._fixed: FixedSamples | None = None
        self._waiting = False  # for a delivered batch to take the samples from
        self._delivered = False
        self.images: Tensor = torch.empty(0)
        self.labels: Tensor | None = None
        self.masks: Tensor | None = None

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the samples and shows the state before the first step."""
        if not trainer.is_global_zero or self.quiet or not trainer.loggers:
            return
        if self._fixed is None:
            try:
                self._fixed = read_samples(trainer, pl_module, self.num_samples, self.samples)
            except UnreadableError:
                if self.samples is not None:
                    raise
                self._waiting = True  # a stream: its first training batch will do, and says what is wrong if it won't
        else:
            device = pl_module.device
            images, labels, masks = self._fixed
            self._fixed = FixedSamples(
                images.to(device),
                None if labels is None else labels.to(device),
                None if masks is None else masks.to(device),
            )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the samples out of the first batch where the data set can't be read by index."""
        if self._waiting:
            self._waiting = False
            self._fixed = keep(pl_module, batch, self.num_samples)
            self._delivered = True
            self._measure_once("on_train_start", trainer, pl_module)

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of a batch that is due, or that the samples are taken from."""
        if self._waiting:
            return BatchHooks(self._batch_hooks)
        return super().batch_hooks(trainer, batch_idx, step, stepping=stepping)

    def _measure_once(self, hook: str, trainer: Trainer, pl_module: LightningModule) -> None:
        step = None if self._fixed is None else self.due(hook, trainer)
        if self._fixed is None or step is None:
            return
        self._shown = step
        self.wait_for_training(trainer)
        try:
            with undisturbed(pl_module, training=False, gradients=True):
                self._copy_samples(self._fixed)
                self.measure(trainer, pl_module, step)
        finally:
            self.images, self.labels, self.masks = torch.empty(0), None, None
        self.log_cost(trainer, step=step)

    def _copy_samples(self, fixed: FixedSamples) -> None:
        images, labels, masks = fixed
        if images.ndim != _IMAGE_AXES:
            raise UnreadableError(f"Expected images (N, C, H, W), but got a tensor of shape {tuple(images.shape)}.")
        self.images = images.clone() if images.is_floating_point() else images.float()
        self.labels = None if labels is None else labels.clone()
        self.masks = None if masks is None else masks.clone()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The film strips; the samples, if they are few or can't be read again."""
        state = super().state_dict()
        if self._fixed is not None and (self._delivered or self._fixed.images.numel() <= _IN_CHECKPOINT):
            state["samples"] = [None if tensor is None else tensor.cpu() for tensor in self._fixed]
            state["delivered"] = self._delivered
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if state_dict.get("samples") is not None:
            self._fixed = FixedSamples(*state_dict["samples"])
            self._delivered = state_dict.get("delivered", False)
