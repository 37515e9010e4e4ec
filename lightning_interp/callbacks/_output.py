"""What callbacks write: numbers for the rules, records for the loggers, metrics for the callbacks of Lightning."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_interp._options import spread
from lightning_interp.callbacks._lightning import CallbackBase, Trainer
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import InterpWarning
from lightning_interp.records import Image, Record, Scalar
from lightning_interp.rules.history import History

# Tags of one quantity. TensorBoard sends and draws all of a group at once, and its event file is read from the start.
MOST_LAYERS = 1000


class Output(CallbackBase):
    """The part of `InterpCallback` that writes.

    Attributes:
        max_layers: Most layers with scalars and pictures of their own.
        name: Tells two instances of one class apart in the tags.
        quiet: Measures for `Alerts` only: numbers go to the history, nothing to the loggers.
    """

    max_layers: int
    name: str | None

    def __init__(self) -> None:
        super().__init__()
        self.quiet = False
        self._said: set[str] = set()
        self.forget_output()

    def forget_output(self) -> None:
        """What waits is of another fit."""
        self._aside = History()
        self._outbox: list[Record] = []

    def notebook(self, trainer: Trainer) -> History:
        """Where numbers for the rules go: the history of the run, or one aside if another of its class has that."""
        session = Session.of(trainer)
        return session.history if session.owns_history(self) else self._aside

    def write(self, trainer: Trainer, records: Iterable[Record]) -> None:
        """Hands records to the loggers at the end of the current hook, all at once, unless the callback is quiet."""
        if not self.quiet and trainer.is_global_zero:
            self._outbox.extend(records)

    def flush(self, trainer: Trainer) -> None:
        """Hands over what waits; called at the end of each hook."""
        if self._outbox:
            records, self._outbox = self._outbox, []
            Session.of(trainer).write(trainer, records)

    def _flush_quietly(self, trainer: Trainer) -> None:
        """What was found must be on record before an error that the user asked for ends the run."""
        with contextlib.suppress(Exception):
            self.flush(trainer)

    def tag(self, quantity: str, suffix: str = "") -> str:
        """`interp/<quantity><suffix>`, the tag of a number for the whole model."""
        return f"interp{self._suffix}/{quantity}{suffix}"

    @property
    def _suffix(self) -> str:
        return f".{self.name}" if self.name else ""

    def shown_layers(self, trainer: Trainer, layers: Sequence[str]) -> list[str]:
        """Those of these layers that get tags of their own, spread over the depth and always the same."""
        return spread(layers, min(self.max_layers, MOST_LAYERS))

    def log_layers(  # noqa: PLR0913
        self,
        trainer: Trainer,
        quantity: str,
        values: Mapping[str, float],
        *,
        step: int,
        unit: str = "",
        note: bool = True,
    ) -> None:
        """Logs one number per layer: all to the history, those of `max_layers` layers to the loggers.

        Args:
            trainer: The running trainer.
            quantity: As in the tags, see `provides`.
            values: Layer to number.
            step: Step on the axis of `self.log`.
            unit: Unit of the numbers.
            note: Whether the rules may read it.
        """
        session = Session.of(trainer)
        if note:
            for layer, value in values.items():
                self.notebook(trainer).record(quantity, value, step=step, layer=layer)
        shown = self.shown_layers(trainer, list(values))
        self.write(
            trainer,
            [
                Scalar(tag=session.layer_tag(quantity, layer, self.name), step=step, value=values[layer], unit=unit)
                for layer in shown
            ],
        )

    def log_number(  # noqa: PLR0913
        self, trainer: Trainer, quantity: str, value: float, *, step: int, unit: str = "", note: bool = False
    ) -> None:
        """Logs one number for the whole model, as `interp/<quantity>`."""
        if note:
            self.notebook(trainer).record(quantity, value, step=step)
        self.write(trainer, [Scalar(tag=self.tag(quantity), step=step, value=value, unit=unit)])

    def log_pictures(self, trainer: Trainer, quantity: str, pictures: Mapping[str, Any], *, step: int) -> None:
        """Logs one picture per layer, for `max_layers` layers.

        Args:
            trainer: The running trainer.
            quantity: As in the tags, see `provides`.
            pictures: Layer to (H, W, 3) uint8, or to a function that draws it: what is not shown costs nothing.
            step: Step on the axis of `self.log`.
        """
        session = Session.of(trainer)
        for layer in self.shown_layers(trainer, list(pictures)):
            picture = pictures[layer]
            pixels = picture() if callable(picture) else picture
            self.write(trainer, [Image(tag=session.layer_tag(quantity, layer, self.name), step=step, pixels=pixels)])

    def publish(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Puts numbers into `trainer.callback_metrics`, where EarlyStopping and ModelCheckpoint look.

        A metric that the user logs under the same name stays there.
        """
        shown, ours = trainer.callback_metrics, Session.of(trainer).published
        for key, value in metrics.items():
            if key in shown and shown[key] is not ours.get(key):
                self.say_once(
                    f"A metric of the name {key!r} is logged by the model or another callback: {type(self).__name__} "
                    "leaves it in trainer.callback_metrics, without its own. Log yours under another name to have both."
                )
            else:
                shown[key] = ours[key] = torch.tensor(value, dtype=torch.float32)

    def say_once(self, message: str) -> None:
        """Warns, the first time only."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, InterpWarning, stacklevel=2)
