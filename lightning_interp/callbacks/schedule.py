"""When a callback is due."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from lightning_interp._options import check_positive_int
from lightning_interp.errors import ArgumentError

FALLBACK_STEPS = 500
ALWAYS = 10**9  # batches
_A_DOUBLING = 5  # probes while the number of steps doubles


class BatchHooks(NamedTuple):
    """In which hooks of a training batch there is something to do.

    Attributes:
        names: Of the hooks.
        more: For so many batches after this one, in the same epoch, it is the same, if none but these are called and no
            gradients are accumulated; 0 is always right, and costs some microseconds a batch.
    """

    names: Collection[str]
    more: int = 0


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

    def may_be_due(self, step: int) -> bool:
        """Whether the end of this step can be due, be the epoch endless or not."""
        return (step + 1) % (self.every_n_train_steps or FALLBACK_STEPS) == 0

    def quiet(self, step: int) -> int:
        """So many steps right after this one can't be due.

        Example:
            >>> Schedule(None, 100).quiet(0), Schedule(None, 100).quiet(98)
            (98, 0)
        """
        return (-step - 2) % (self.every_n_train_steps or FALLBACK_STEPS)

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


def thinning_due(step: int, *, dense: int, every: int | None) -> bool:
    """Whether a step (from 0) lies on the bridge from "every step" to "every n-th step".

    The first `dense` steps are all looked at. After them the gap doubles whenever the number of steps has: with 50 and
    200, every 10th step up to the 100th, every 20th up to the 200th, every 40th up to the 400th, every 80th up to the
    800th, then every 200th. So a run of a few hundred steps is seen too, at the cost of some twenty looks.

    Args:
        step: The step just done.
        dense: Steps at the start that are all looked at; with fewer than five there is no bridge.
        every: Later every n-th step is looked at; None for none, and then there is no bridge either.

    Example:
        >>> [step + 1 for step in range(50, 1000) if thinning_due(step, dense=50, every=200)]
        [60, 70, 80, 90, 100, 120, 140, 160, 180, 200, 240, 280, 320, 360, 400, 480, 560, 640, 720, 800]
    """
    done = step + 1
    if every is None or dense < _A_DOUBLING or done <= dense:
        return False
    doublings = ((done - 1) // dense).bit_length() - 1
    gap = (dense // _A_DOUBLING) << doublings
    return 2 * gap <= every and done % gap == 0
