"""When `Alerts` looks."""

from __future__ import annotations

FIRST = (20, 60, 100)  # steps: a too-high rate does its damage in the first 20, and is judged at 60
EVERY = 50  # steps, from then on


def falls_on(step: int) -> bool:
    """Whether a look falls on the end of this training step."""
    return step in FIRST or (step > FIRST[-1] and step % EVERY == 0)


def quiet(step: int) -> int:
    """On so many steps right after this one no look falls.

    Example:
        >>> quiet(0), quiet(60), quiet(100), quiet(149)
        (19, 39, 49, 0)
    """
    following = (*FIRST, step - step % EVERY + EVERY) if step < FIRST[-1] else (step - step % EVERY + EVERY,)
    return min(look for look in following if look > step) - step - 1


class Timetable:
    """Tells in which calls of a hook a look is due: the same on all ranks, which decide together.

    Example:
        >>> times = Timetable()
        >>> [step for step in range(300) if times.due("on_train_batch_end", step) is not None]
        [20, 60, 100, 150, 200, 250]
    """

    def __init__(self) -> None:
        self._last = -1

    def due(self, hook: str, axis_step: int) -> int | None:
        """The step that is looked at, None if none is.

        Args:
            hook: Lightning's name of it.
            axis_step: From `axis_step`; at the ends of an epoch and of the training it stands one too far.
        """
        if hook in ("on_train_epoch_end", "on_train_end"):
            return max(0, axis_step - 1)
        if hook == "on_validation_end":
            return axis_step
        # When gradients are accumulated, several batches fall on one step.
        if hook != "on_train_batch_end" or not falls_on(axis_step) or axis_step == self._last:
            return None
        self._last = axis_step
        return axis_step
