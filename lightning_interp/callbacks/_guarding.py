"""What wraps the hooks and the state of every callback: errors are said and not raised, time is counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_interp.callbacks._lightning import Trainer, fits
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.errors import AlertRaised, ArgumentError
from lightning_interp.functional.gradients import CheckpointedError

if TYPE_CHECKING:
    from lightning_interp.callbacks.base import InterpCallback

# Hooks that must run even while a callback rests: they clean up.
CLEANING = frozenset({"teardown", "on_exception"})
# Hooks that run whatever the Trainer does; the others only during `fit`.
ALWAYS = CLEANING | {"setup"}
STATE = frozenset({"state_dict", "load_state_dict"})
# Of one training batch: the hooks that are called so often that even asking whether there is something to do costs.
IN_BATCH = frozenset(
    (
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
)
# Of what `state_dict` gives; to be counted up when an older version of this package could not read it. A state without
# one was written before there was a count: schema 1.
SCHEMA = 3
HOOKS = IN_BATCH | frozenset(
    (
        "setup",
        "teardown",
        "on_exception",
        "on_fit_start",
        "on_fit_end",
        "on_sanity_check_start",
        "on_sanity_check_end",
        "on_train_start",
        "on_train_end",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_validation_start",
        "on_validation_end",
        "on_validation_epoch_start",
        "on_validation_epoch_end",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_save_checkpoint",
        "on_load_checkpoint",
    )
)


def guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a Lightning hook: errors are reported and not raised, time is counted."""
    name = hook.__name__
    always, validates = name in ALWAYS, "validation" in name

    def concerns(trainer: Trainer) -> bool:
        return always or (fits(trainer) and not (validates and trainer.sanity_checking))

    @functools.wraps(hook)
    def wrapped(self: InterpCallback, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self._depth:  # called by another hook of the same callback, through super() or directly
            return hook(self, trainer, *args, **kwargs)
        if not concerns(trainer):
            return None
        if self.resting and not always:
            return self.while_resting(name, trainer)
        self._depth += 1
        self._met = False
        self._since = self.clock()
        try:
            result = hook(self, trainer, *args, **kwargs)
            if self._outbox:
                self.flush(trainer)
            return result
        except (ArgumentError, AlertRaised):
            self._flush_quietly(trainer)
            raise
        except Exception as error:
            stop(self, trainer, error, name)
        finally:
            self._depth -= 1
            self.seconds += self.clock() - self._since

    wrapped.__guarded__ = True  # type: ignore[attr-defined]
    return wrapped


def stop(callback: InterpCallback, trainer: Trainer, error: Exception, hook: str) -> None:
    """Lets a callback rest whose hook has failed, and says so once."""
    if isinstance(error, UnreadableError | CheckpointedError):
        callback._give_up(trainer, error)
    else:
        callback._rest(error, hook)
    if not callback._met:  # the other ranks may wait for this one in this very hook
        callback.while_resting(hook, trainer)


def guarded_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `state_dict` and `load_state_dict`: a checkpoint must be written and read whatever happens to us.

    A state carries the number of its schema. One of a newer schema is not read: the callback begins anew, and says so.
    """

    @functools.wraps(method)
    def wrapped(self: InterpCallback, *args: Any) -> Any:
        try:
            if args and (schema := args[0].get("schema", 1)) > SCHEMA:
                self.say_once(
                    f"The checkpoint was written by a newer version of lightning-interp (schema {schema}; this version "
                    f"reads up to {SCHEMA}): {type(self).__name__} begins anew. Update to go on where it ended."
                )
                return None
            state = method(self, *args)
            return {**state, "schema": SCHEMA} if state else state
        except Exception as error:
            self._rest(error, method.__name__)
            return {}

    return wrapped
