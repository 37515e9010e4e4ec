"""The base of all callbacks: common options, shared session, error handling, cost.

A callback is one file with one class. It overrides Lightning's hooks as usual; `InterpCallback` wraps each of them so
that an error is reported once and the callback rests while training goes on, and so that its time is counted.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_interp._options import check_choice, check_positive_int, check_strings, expected, select
from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._guarding import HOOKS, IN_BATCH, STATE, guarded, guarded_state
from lightning_interp.callbacks._lightning import LightningModule, Trainer, accumulates, axis_step
from lightning_interp.callbacks._output import MOST_LAYERS, Output
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import shapeless
from lightning_interp.callbacks.schedule import ALWAYS, BatchHooks, Schedule
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.gradients import CheckpointedError
from lightning_interp.records import Scalar

OnError = Literal["warn", "raise"]
Note = Callable[[Any], None]


def _all_batch_hooks(callback: InterpCallback, *args: Any, **kwargs: Any) -> BatchHooks:
    return BatchHooks(callback._batch_hooks, more=ALWAYS)


class InterpCallback(Output):
    """Common to all callbacks; not for use by itself.

    Class attributes:
        provides: Quantities that the callback logs, each as `interp.<quantity>/...` or `interp/<quantity>...`.
        can_be_spared: Whether what it shows may be left out now and then to save time, see `spared`.
        works_alone: Whether rank zero does by itself what it does; where the weights are split over ranks, it can't.
    """

    provides: ClassVar[tuple[str, ...]] = ()
    can_be_spared: ClassVar[bool] = False
    works_alone: ClassVar[bool] = False
    _batch_hooks: ClassVar[frozenset[str]] = frozenset()  # those of a batch that the class has
    _answer: ClassVar[str] = "batch_hooks"  # the method that says in which of them there is something to do

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = HOOKS & vars(cls).keys()
        for name in own:
            setattr(cls, name, guarded(vars(cls)[name]))
        cls._batch_hooks = cls._batch_hooks | (own & IN_BATCH)
        if own & IN_BATCH and cls._answer not in vars(cls):
            # When the hooks of a parent have nothing to do says nothing about new ones.
            setattr(cls, cls._answer, _all_batch_hooks)
        for name in STATE & vars(cls).keys():
            setattr(cls, name, guarded_state(vars(cls)[name]))

    def __init__(  # noqa: PLR0913 - the common options of all callbacks, passed on by name
        self,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks and keeps the common options.

        Args:
            every_n_epochs: Due at the end of every n-th epoch; the first one always is.
            every_n_train_steps: Due every n training steps; excludes `every_n_epochs`.
            layers: Names or globs of the layers to look at, as in `named_modules()`; None takes all that apply.
            max_layers: Most layers with scalars and pictures of their own; aggregates always hold all.
            name: Tells two instances of one class apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and lets the callback rest; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__()
        self.schedule = Schedule(every_n_epochs, every_n_train_steps)
        check_strings("layers", layers)
        check_positive_int("max_layers", max_layers)
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise expected("name", "a non-empty string without a slash, or None", name)
        check_choice("on_error", on_error, ("warn", "raise"))
        self.layers = None if layers is None else list(layers)
        self.max_layers = max_layers
        self.name = name
        self.on_error = on_error
        self.resting = False
        self.spared = False  # by whoever holds it: what is due now is left out; the same on all ranks
        self.seconds = 0.0
        self._since = 0.0  # when the running hook began
        self._depth = 0
        self._met = False  # whether the ranks have met within the current hook
        self._agreed_to_rest = False

    # ------------------------------------------------------------------ identity and state

    @property
    def state_key(self) -> str:
        """Tells callbacks apart in a checkpoint: the class, and `name` where one is given."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    # ------------------------------------------------------------------ life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session of this fit."""
        if stage == "fit":
            self.resting = self._agreed_to_rest = False
            self._said.clear()
            self.forget_output()
            self.seconds = 0.0
            Session.begin(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what is on the model."""
        Session.end(trainer, closed=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes what is on the model: after an exception Lightning calls no `teardown`."""
        Session.end(trainer, closed=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Brings to the disk what the checkpoint takes for written: a resumed run does not write it again."""
        session = Session.find(trainer)
        if session is not None:
            session.flush(trainer)

    def release(self) -> None:
        """Lets go of whatever is still attached. Called when the callback begins to rest; must not raise."""

    # ------------------------------------------------------------------ ranks

    def meets(self, hook: str, trainer: Trainer) -> bool:
        """Whether the ranks meet in this hook; must depend on what is the same on all of them."""
        return False

    def meet(self, trainer: Trainer, prepare: Callable[[], Tensor], *, last: bool = True) -> Tensor:
        """Prepares what is to be reduced, and goes on only if all ranks could, with the same number of values.

        Args:
            trainer: The running trainer.
            prepare: Gives the values of this rank.
            last: Whether the ranks meet no more in this hook; else a rank that fails before the next time says so.

        Raises:
            Exception: What went wrong here or on another rank: the callback rests on all ranks or on none.
        """
        error: Exception | None = None
        try:
            values = prepare()
        except Exception as problem:  # raised again once the ranks know
            error, values = problem, torch.empty(0)
        self._met = last or error is not None
        if not _ranks.agree(trainer, ready=error is None, size=values.numel()):
            self._met = True
            self._agreed_to_rest = True
            raise error or RuntimeError("another rank failed, or saw other layers than this one")
        return values

    def while_resting(self, hook: str, trainer: Trainer) -> None:
        """Called instead of a hook while the callback rests: tells the ranks that would wait that it has failed."""
        if trainer.world_size > 1 and not self._agreed_to_rest and self.meets(hook, trainer):
            self._agreed_to_rest = True
            with contextlib.suppress(RuntimeError):  # the others are gone: how the run ends is not for us to say
                _ranks.agree(trainer, ready=False, size=0)

    # ------------------------------------------------------------------ errors

    def _rest(self, error: Exception, hook: str) -> None:
        self._outbox.clear()
        if self.on_error == "raise":
            raise error
        self.resting = True
        self.release()
        self.say_once(
            f"{type(self).__name__} failed in {hook} with {type(error).__name__}: {str(error).rstrip('.')}. Training "
            'goes on without it. Set on_error="raise" to see where it comes from.'
        )

    def _give_up(self, trainer: Trainer, error: UnreadableError | CheckpointedError) -> None:
        """A model or a data set that can't be read is no failure: it is said once, whoever else needs the same."""
        self._outbox.clear()
        self.resting = True
        self.release()
        self.say_for_all(trainer, type(error), f"has nothing to show: {error}")

    def may_call(self, trainer: Trainer) -> bool:
        """Whether the model may be called; the same on all ranks.

        Not as long as a lazy layer has no shape, which is said: our forward would draw its weights at another moment
        than the training does.
        """
        without = shapeless(trainer.lightning_module)
        if without:
            named = ", ".join(without[:4]) + (", ..." if len(without) > 4 else "")
            message = f"waits for the first forward of the training: {named} have no shape before."
            self.say_for_all(trainer, "shapeless", message)
        return not without

    def say_for_all(self, trainer: Trainer, kind: type[Exception] | str, message: str) -> None:
        """Warns of a limit that other callbacks share; the first one to meet it speaks for all."""
        said = Session.of(trainer).said
        if kind not in said:
            said.add(kind)
            self.say_once(f"{type(self).__name__}, and whatever needs the same, {message}")

    # ------------------------------------------------------------------ time and schedule

    @staticmethod
    def clock() -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    @property
    def cost(self) -> float:
        """Seconds that this callback has taken since the fit began, in the running hook too."""
        return self.seconds + (self.clock() - self._since if self._depth else 0.0)

    def count_seconds(self, seconds: float) -> None:
        """Adds what it took outside the hooks of Lightning: inside the forward."""
        self.seconds += seconds

    def log_cost(self, trainer: Trainer, *, step: int) -> None:
        """Logs the seconds that this callback has taken since the fit began; the last that a hook does."""
        self.flush(trainer)  # what it takes to write pictures counts too
        self.write(
            trainer,
            [Scalar(tag=f"interp.cost{self._suffix}/{type(self).__name__}", step=step, value=self.cost, unit="s")],
        )

    def wait_for_training(self, trainer: Trainer) -> None:
        """Called before values are fetched from a GPU, which has to do what the training has queued first.

        They would wait for that anyway; now the waiting is not counted as time of ours.
        """
        device = trainer.strategy.root_device
        if device.type == "cuda":
            started = self.clock()
            torch.cuda.current_stream(device).synchronize()
            self._since += self.clock() - started

    def step_due(self, trainer: Trainer, step: int) -> bool:
        """Whether a step schedule (or an epoch schedule without epochs) makes this step due."""
        schedule = self.schedule
        return schedule.may_be_due(step) and schedule.step_due(step, endless=trainer.num_training_batches == math.inf)

    def scheduled(self, hook: str, trainer: Trainer) -> bool:
        """Whether the schedule makes this hook due; the same on all ranks."""
        if hook == "on_train_batch_end":
            return not accumulates(trainer) and self.step_due(trainer, self.step_of(trainer))
        return hook == "on_train_epoch_end" and self.schedule.epoch_due(trainer.current_epoch)

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """The hooks of the training batch that begins in which there is something to do; a family passes on no others.

        Must name each in which something is due, and may depend only on what is the same on all ranks where they meet.

        Args:
            trainer: The running trainer.
            batch_idx: Of the batch.
            step: Step on the axis of `self.log`.
            stepping: Whether the batch ends with an optimizer step.
        """
        return BatchHooks(self._batch_hooks, more=ALWAYS)

    def notes_from(self, step: int) -> Note | None:
        """What may stand in for `on_train_batch_end`, for as long as the last answer of `batch_hooks` holds.

        It is called without the guard, and on no clock: it must be quick.

        Args:
            step: Of the first batch, on the axis of `self.log`; those after it are a step each.

        Returns:
            A method that takes the `outputs` of a batch; None if only the hook itself will do.
        """
        return None

    def scheduled_hooks(self, trainer: Trainer, step: int, *, stepping: bool) -> BatchHooks:
        """All hooks of a batch that the schedule makes due, and none of the others."""
        due = stepping and self.step_due(trainer, step)
        return BatchHooks(self._batch_hooks) if due else BatchHooks((), more=self.schedule.quiet(step))

    def shows_in(self, hook: str) -> bool:
        """Whether it is in this hook, if due, that something is shown."""
        return True

    def step_of(self, trainer: Trainer) -> int:
        """Step on the axis of `self.log`; 0 before training."""
        return axis_step(trainer)

    def shown_layers(self, trainer: Trainer, layers: Sequence[str]) -> list[str]:
        """As in `Output`; where more were asked for than there can be, that is said."""
        if min(len(layers), self.max_layers) > MOST_LAYERS:
            self.say_for_all(
                trainer,
                "too many layers",
                f"shows {MOST_LAYERS:,} layers, spread over the depth, though `max_layers={self.max_layers}` asks for "
                "more: TensorBoard can't be used with so many tags. Aggregates and alerts hold all; `layers` chooses.",
            )
        return super().shown_layers(trainer, layers)

    def choose_layers(self, available: Sequence[str]) -> list[str]:
        """Applies the option `layers`."""
        return select("layers", self.layers, available)


for _name in HOOKS & vars(InterpCallback).keys():
    setattr(InterpCallback, _name, guarded(vars(InterpCallback)[_name]))


def finite_or_nan(value: float | None) -> float:
    """NaN for what is missing."""
    return math.nan if value is None else value
