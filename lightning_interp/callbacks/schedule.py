"""When a callback is due."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_interp._options import check_positive_int
from lightning_interp.errors import ArgumentError

FALLBACK_STEPS = 500


@dataclass(frozen=True)
class Schedule:
    """Every n epochs or every n training steps, as in Lightning's ModelCheckpoint; every epoch if neither is given.

    Attributes:
        every_n_epochs: Due at the end of epoch e (from 0) if (e + 1) is a multiple; the first epoch always is.
        every_n_train_steps: Due after step s (from 0) if (s + 1) is a multiple.
    """

    every_n_epochs: int | None
    every_n_train_steps: int | None

    def __post_init__(self) -> None:
        check_positive_int("every_n_epochs", self.every_n_epochs, optional=True)
        check_positive_int("every_n_train_steps", self.every_n_train_steps, optional=True)
        if self.every_n_epochs is not None and self.every_n_train_steps is not None:
            raise ArgumentError(
                "Arguments `every_n_epochs` and `every_n_train_steps` exclude each other, but both were given "
                f"({self.every_n_epochs} and {self.every_n_train_steps}). Set one of them to None."
            )
        if self.every_n_epochs is None and self.every_n_train_steps is None:
            object.__setattr__(self, "every_n_epochs", 1)

    def epoch_due(self, epoch: int) -> bool:
        """Whether the end of this epoch (from 0) is due."""
        return self.every_n_epochs is not None and (epoch == 0 or (epoch + 1) % self.every_n_epochs == 0)

    def step_due(self, step: int, *, endless: bool) -> bool:
        """Whether the end of this step (from 0) is due.

        Args:
            step: The step just done.
            endless: Whether the epoch never ends; then an epoch schedule falls back to every `FALLBACK_STEPS` steps.
        """
        every = self.every_n_train_steps
        if every is None and self.every_n_epochs is not None and endless:
            every = FALLBACK_STEPS
        return every is not None and (step + 1) % every == 0
