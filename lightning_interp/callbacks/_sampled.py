"""The base of callbacks that look at the same few images for the whole run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp._options import check_numbers, check_positive_int, check_strings
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import FixedSamples, check_samples, keep, read_samples
from lightning_interp.errors import ArgumentError
from lightning_interp.records import Image, Scalar
from lightning_interp.render.color import Pixels
from lightning_interp.render.strip import FilmStrip

# Samples of up to so many numbers (4 MB in float32) lie in each checkpoint; more are read again after a resume.
_IN_CHECKPOINT = 1_000_000
_IMAGE_AXES = 4
_FRAMES = 15  # and the images themselves: sixteen fill a card four by four
# Strategies whose modules hold only a part of each weight.
SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")


class SampledCallback(InterpCallback):
    """Measures on fixed samples: before the first step, when due, and at the end of the training.

    A subclass writes `measure` only. It is called on rank zero, in an eager, undisturbed region with the model in eval
    mode and gradients recorded; `images`, `labels` and `masks` are copies, made anew for each call. Pictures over time
    are kept by `show`, and lie in the checkpoint.

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
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            layers=layers,
            max_layers=max_layers,
            name=name,
            on_error=on_error,
        )
        check_positive_int("num_samples", num_samples)
        check_samples("samples", samples)
        check_strings("classes", classes)
        self.num_samples = num_samples
        self.samples = samples
        self.mean = check_numbers("mean", mean)
        self.std = check_numbers("std", std, positive=True)
        self.classes = None if classes is None else list(classes)
        self._forget()

    def _forget(self) -> None:
        self._fixed: FixedSamples | None = None
        self._strips: dict[str, FilmStrip] = {}
        self._shown: int | None = None
        self._waiting = False  # for a delivered batch to take the samples from
        self._delivered = False
        self.images: Tensor = torch.empty(0)
        self.labels: Tensor | None = None
        self.masks: Tensor | None = None

    # ------------------------------------------------------------------ what a subclass writes

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measures and logs.

        Args:
            trainer: The running trainer.
            pl_module: The model.
            step: Step on the axis of `self.log`.
        """

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the last run; refuses strategies that spread the weights over ranks."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            strategy = type(trainer.strategy).__name__
            if strategy.startswith(SHARDED):
                raise ArgumentError(
                    f"{type(self).__name__} runs forwards of its own on one rank, which {strategy} does not allow. "
                    'Remove it, or train with strategy="ddp".'
                )

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
        if self.step_of(trainer) == 0:
            self._measure_once(trainer, pl_module, step=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the samples out of the first batch where the data set can't be read by index."""
        if self._waiting:
            self._waiting = False
            self._fixed = keep(pl_module, batch, self.num_samples)
            self._delivered = True
            if self.step_of(trainer) == 0:
                self._measure_once(trainer, pl_module, step=0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures after a due step."""
        step = self.step_of(trainer)
        updated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if updated and self.step_due(trainer, step):
            self._measure_once(trainer, pl_module, step=step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures after a due epoch."""
        if self.schedule.epoch_due(trainer.current_epoch):
            self._measure_once(trainer, pl_module, step=max(self.step_of(trainer) - 1, 0))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the last state, unless it has been measured."""
        self._measure_once(trainer, pl_module, step=max(self.step_of(trainer) - 1, 0))

    def _measure_once(self, trainer: Trainer, pl_module: LightningModule, *, step: int) -> None:
        if self._fixed is None or self._shown == step:
            return
        self._shown = step
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

    # ------------------------------------------------------------------ output

    def show(self, trainer: Trainer, quantity: str, suffix: str, picture: Pixels, *, step: int) -> None:
        """Logs a picture as `interp.<quantity>[.<name>]/<suffix>`."""
        self.write(trainer, [Image(tag=self.group_tag(quantity, suffix), step=step, pixels=picture)])

    def strip(self, key: str) -> FilmStrip:
        """The film strip of that name; it lies in the checkpoint."""
        return self._strips.setdefault(key, FilmStrip(_FRAMES))

    def log_group(self, trainer: Trainer, quantity: str, values: Mapping[str, float], *, step: int) -> None:
        """Logs numbers as `interp.<quantity>[.<name>]/<key>`."""
        self.write(
            trainer,
            [Scalar(tag=self.group_tag(quantity, key), step=step, value=value) for key, value in values.items()],
        )

    def group_tag(self, quantity: str, suffix: str) -> str:
        """`interp.<quantity>[.<name>]/<suffix>`."""
        return f"interp.{quantity}{self._suffix}/{suffix}"

    def class_name(self, index: int) -> str:
        """Its name, or the index."""
        named = self.classes is not None and index < len(self.classes)
        return self.classes[index] if named and self.classes is not None else str(index)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The film strips; the samples, if they are few or can't be read again."""
        state: dict[str, Any] = {"strips": {key: strip.state_dict() for key, strip in self._strips.items()}}
        if self._fixed is not None and (self._delivered or self._fixed.images.numel() <= _IN_CHECKPOINT):
            state["samples"] = [None if tensor is None else tensor.cpu() for tensor in self._fixed]
            state["delivered"] = self._delivered
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for key, state in state_dict.get("strips", {}).items():
            self.strip(key).load_state_dict(state)
        if state_dict.get("samples") is not None:
            self._fixed = FixedSamples(*state_dict["samples"])
            self._delivered = state_dict.get("delivered", False)
