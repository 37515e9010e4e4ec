"""Which callbacks measure what the rules need."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from lightning_interp.callbacks._family import with_children
from lightning_interp.callbacks.base import InterpCallback, OnError


def measuring_classes() -> list[type[InterpCallback]]:
    """The callbacks whose class attribute `measures` names series and facts of the history."""
    # Imported late: a run whose rules need none of them should not pay for them.
    from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
    from lightning_interp.callbacks.dead_filters import DeadFilters
    from lightning_interp.callbacks.filter_grid import FilterGrid
    from lightning_interp.callbacks.training_dynamics import TrainingDynamics

    return [TrainingDynamics, DeadFilters, ActivationSparsity, FilterGrid]


def measures(callback: Any) -> frozenset[str]:
    """Series and facts that a callback, or a class of callbacks, writes to the history."""
    return frozenset(getattr(callback, "measures", ()))


def callbacks_of(trainer: Any) -> list[Any]:
    """The callbacks that the Trainer knows."""
    return list(trainer.callbacks)


def bring_missing(needs: Collection[str], present: Iterable[Any], *, on_error: OnError) -> list[InterpCallback]:
    """Quiet callbacks for what nobody measures yet.

    Args:
        needs: Series and facts that the rules read.
        present: The callbacks of the Trainer; those inside families count too.
        on_error: For the new ones.

    Returns:
        New callbacks that write to the history and not to the loggers; needs that nobody can measure are left out.
    """
    missing = frozenset(needs).difference(*(measures(callback) for callback in with_children(present)))
    brought = []
    for kind in measuring_classes() if missing else ():
        if missing & measures(kind):
            callback = kind(on_error=on_error)
            callback.quiet = True
            brought.append(callback)
            missing -= measures(kind)
    return brought
