"""What `Alerts` asks about the run besides the rules."""

from __future__ import annotations

from typing import Any

from lightning_interp.callbacks._lightning import Trainer, axis_step, planned_steps
from lightning_interp.rules.history import History


def fingerprint(history: History) -> object:
    """Changes with every step, and whenever something was recorded or noted: no rule is asked twice about the same."""
    return (
        history.finished,
        history.step,
        dict(history.facts),
        {key: series.last for key, series in history.series.items()},
    )


def adopt(history: History, state: dict[str, Any]) -> None:
    """Puts restored numbers into a history, in place, since others may hold it.

    Args:
        history: Of the session; series and facts that the restored one lacks stay, and so do all its facts.
        state: From `History.state_dict`.
    """
    series, facts = history.series, history.facts
    history.load_state_dict(state)
    history.series |= {key: new for key, new in series.items() if key not in history.series}
    history.facts |= facts


def ended_as_planned(trainer: Trainer) -> bool:
    """Whether the limit of steps or epochs was reached; False if someone stopped the training before."""
    by_steps = trainer.max_steps is not None and 0 <= trainer.max_steps <= trainer.global_step
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
    # An epoch counts as done for Lightning even if it was cut short.
    cut_short = trainer.should_stop and axis_step(trainer) < planned_steps(trainer)
    return by_steps or (by_epochs and not cut_short)
