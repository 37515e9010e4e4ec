"""The base of callbacks that measure now and then: before the first step, when due, and at the end of the training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_interp._options import check_scaling, check_strings, expected
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._ranks import refuse_sharded
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.schedule import BatchHooks
from lightning_interp.records import Image, Scalar
from lightning_interp.render.color import Pixels
from lightning_interp.render.strip import FilmStrip

FRAMES = 15  # and the images themselves: sixteen fill a card four by four


class PeriodicCallback(InterpCallback):
    """Measures before the first step, when due, and at the end of the training.

    A subclass writes `measure`. It is called in an eager, undisturbed region with the model in eval mode and gradients
    recorded. Pictures over time are kept by `strip`, and lie in the checkpoint.

    Class attributes:
        frames: Pictures in a film strip.
    """

    frames: ClassVar[int] = FRAMES
    can_be_spared: ClassVar[bool] = True
    works_alone: ClassVar[bool] = True

    def __init__(  # noqa: PLR0913 - the common options, passed on by name
        self,
        *,
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
        check_strings("classes", classes)
        if isinstance(classes, set | frozenset):
            raise expected("classes", "a list of strings in the order of the labels, or None", classes)
        self.mean, self.std = check_scaling(mean, std)
        self.classes = None if classes is None else list(classes)
        self._forget()

    def _forget(self) -> None:
        """Begins a run."""
        self._strips: dict[str, FilmStrip] = {}
        self._shown: int | None = None
        self._measuring: tuple[str, int] | None = None  # hook and step, until it is done

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
            refuse_sharded(trainer, self, "runs forwards of its own")

    def due(self, hook: str, trainer: Trainer) -> int | None:
        """The step to measure at in this hook, or None; the same on all ranks, also on one that failed measuring."""
        step, after = self.step_of(trainer), None
        if hook == "on_train_start":
            after = 0 if step == 0 else None
        elif hook == "on_train_batch_end":
            after = step if self.scheduled(hook, trainer) and not self.spared else None
        elif hook == "on_train_epoch_end":
            after = max(step - 1, 0) if self.scheduled(hook, trainer) and not self.spared else None
        elif hook == "on_train_end":
            after = max(step - 1, 0)
        new = after is not None and (after != self._shown or self._measuring == (hook, step))
        return after if new and self.may_call(trainer) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the state before the first step."""
        self._measure_once("on_train_start", trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures after a due step."""
        self._measure_once("on_train_batch_end", trainer, pl_module)

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of a batch that the schedule makes due."""
        return self.scheduled_hooks(trainer, step, stepping=stepping)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures after a due epoch."""
        self._measure_once("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the last state, unless it has been measured."""
        self._measure_once("on_train_end", trainer, pl_module)

    def _measure_once(self, hook: str, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self.due(hook, trainer)
        if step is None:
            return
        self._shown, self._measuring = step, (hook, self.step_of(trainer))
        self.wait_for_training(trainer)
        with undisturbed(pl_module, training=False, gradients=True):
            self.measure(trainer, pl_module, step)
        self._measuring = None
        self.log_cost(trainer, step=step)

    # ------------------------------------------------------------------ output

    def show(self, trainer: Trainer, quantity: str, suffix: str, picture: Pixels, *, step: int) -> None:
        """Logs a picture as `interp.<quantity>[.<name>]/<suffix>`."""
        self.write(trainer, [Image(tag=self.group_tag(quantity, suffix), step=step, pixels=picture)])

    def strip(self, key: str) -> FilmStrip:
        """The film strip of that name; it lies in the checkpoint."""
        return self._strips.setdefault(key, FilmStrip(self.frames))

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
        """The film strips."""
        return {"strips": {key: strip.state_dict() for key, strip in self._strips.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for key, state in state_dict.get("strips", {}).items():
            self.strip(key).load_state_dict(state)
