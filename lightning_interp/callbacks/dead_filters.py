"""`DeadFilters`: which filters never fire, exactly, over a whole window, with their history."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_interp._options import check_choice, check_number, check_positive_int, select
from lightning_interp.callbacks._dead_history import history_table
from lightning_interp.callbacks._lightning import LightningModule, Trainer, accumulates
from lightning_interp.callbacks._training_look import TrainingLook
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.fallback import EagerPass, hidden_by_now
from lightning_interp.callbacks.schedule import ALWAYS, FALLBACK_STEPS, BatchHooks
from lightning_interp.callbacks.session import Session
from lightning_interp.callbacks.window import Window
from lightning_interp.functional.lifelines import FilterEvent, Lifelines
from lightning_interp.functional.tracing import Unit
from lightning_interp.functional.units import pruned_filters
from lightning_interp.records import Text


class DeadFilters(InterpCallback):
    """Counts filters whose activation is zero at every position of every input of a window.

    What a filter and its activation are for each kind of network stands in `functional/tracing.py`. The first window
    holds what the training forward sees before the first update; a filter dead in it and ever since is *born dead*.
    Later ones are a validation run, or a training epoch or `window_steps` steps, whichever is shorter. Exact over all
    batches and ranks; no cost once all filters are proven alive. What is silent in a validation is dead only if it also
    is on a few fixed samples that are normalised by the batch, as in training: running statistics may lag behind. Where
    the non-linearity has no exact zero, *dormant* units are counted too (Sokar et al. 2023).

    A compiled model can't be watched while it runs: there the fixed samples are passed through it eagerly at the end of
    each window, and the counts are exact over these. So it is with layers that never come by, since a compiled function
    calls them; that is found out at the end of the first window or, if others do come by, of the second.

    Logs:
        `interp.dead_filters/<NN>_<layer>`: count; `interp.dead_fraction/...`: share of the layer, in [0, 1].
        `interp.dormant_fraction/...`: share of units with a score at or below the threshold.
        `interp/dead_filters`, `interp/dead_fraction_max`: over all layers, also in `trainer.callback_metrics`.
        `interp.dead_filters/history`: a table of which filters died, when, and which revived.

    Source: Lu et al. 2019 (arXiv 1903.06733); CS231n, neural networks part 1; Sokar et al. 2023 (arXiv 2302.12902).
    """

    provides: ClassVar[tuple[str, ...]] = ("dead_filters", "dead_fraction", "dormant_fraction", "cost")
    measures: ClassVar[tuple[str, ...]] = (
        "dead_filters",
        "dead_fraction",
        "born_dead_fraction",
        "dormant_fraction",
        "num_filters",
        "pruned_dead",
    )

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        split: Literal["auto", "train", "val"] = "auto",
        window_steps: int = FALLBACK_STEPS,
        dormant_threshold: float = 0.025,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            split: Forwards to watch: `"train"`, `"val"`, or `"auto"`: validation if there is one in every epoch.
            window_steps: Longest window of the training split, in optimizer steps.
            dormant_threshold: A unit whose score is at most this is dormant; 0 counts silent units only.
            layers: Names or globs of the layers to report; None reports all that have filters.
            max_layers: Most layers with scalars of their own; aggregates hold all.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(layers=layers, max_layers=max_layers, name=name, on_error=on_error)
        check_choice("split", split, ("auto", "train", "val"))
        check_positive_int("window_steps", window_steps)
        check_number("dormant_threshold", dormant_threshold, low=0.0, high=1.0)
        self.split = split
        self.window_steps = window_steps
        self.dormant_threshold = float(dormant_threshold)
        self.lifelines = Lifelines()
        self._reset()

    def _reset(self) -> None:
        self._first_done = False
        self._use_validation = False
        self._window = Window()
        self._started_at = 0
        self._partial = False
        self._restored: dict[str, Any] | None = None
        self._eager: EagerPass | None = None
        self._look = TrainingLook()
        self._hidden: set[str] = set()
        self._searched = False

    # ------------------------------------------------------------------ what a user reads

    @property
    def dead(self) -> dict[str, list[int]]:
        """Layer to the indices of the filters that were dead in the last window."""
        return {layer: self.lifelines.dead(layer) for layer in self.lifelines.layers}

    @property
    def events(self) -> list[FilterEvent]:
        """All that happened: born dead, died in (after, until], revived; oldest first."""
        return list(self.lifelines.events)

    # ------------------------------------------------------------------ life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session and checks the names of the layers."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.lifelines = Lifelines()
        self._reset()
        select("layers", self.layers, [name for name, _ in pl_module.named_modules() if name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the split, and goes on with an open window after a resume."""
        self._choose_split(trainer)
        if self.split == "val" and not self._use_validation:
            self.say_once(
                'DeadFilters(split="val") has no validation to watch; it watches the training batches instead.'
            )
        if self._restored is not None:
            self._window.load_state_dict(self._restored)
            self._partial = trainer.world_size > 1 and self._window.forwards > 0
            self._restored = None
        if Session.of(trainer).observer.compiled:
            self._pass_eagerly(trainer, pl_module, "The model is compiled")
            if not self._first_done and self.may_call(trainer):
                self._close(trainer, pl_module, step=self.step_of(trainer))
        self._publish(trainer)

    def _choose_split(self, trainer: Trainer) -> None:
        has_validation = trainer.enable_validation and bool(sum(_finite(n) for n in trainer.num_val_batches))
        # A validation in every tenth epoch would tell of deaths ten epochs late.
        often = trainer.check_val_every_n_epoch in {None, 1}
        self._use_validation = has_validation and (self.split == "val" or (self.split == "auto" and often))

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """All while a window is open on the training; none where validation is watched."""
        watched = not (self._first_done and self._use_validation) or self._window.reading
        return BatchHooks(self._batch_hooks) if watched else BatchHooks((), more=ALWAYS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens the reader on batches that can still prove something."""
        if not self._first_done or not self._use_validation:
            self._open(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is over: what listens to torch functions need not hear backward and optimizer."""
        if pl_module.automatic_optimization:
            self._stop_reading(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the first window after the first update, and later ones when they are full."""
        self._stop_reading(trainer)
        if self._first_done and self._use_validation:
            return
        if self._train_window_ends(trainer):
            self._close(trainer, pl_module, step=self.step_of(trainer))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the reader on batches that can still prove something."""
        if self._use_validation:
            self._open(trainer)

    def on_validation_batch_end(  # noqa: PLR0913, PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the reader off."""
        if self._use_validation:
            self._stop_reading(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes a window of the validation split; before EarlyStopping looks at the metrics."""
        if self._use_validation:
            self._close(trainer, pl_module, step=self.step_of(trainer))
        self._publish(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes a window of the training split."""
        step = self.step_of(trainer) - 1
        if not self._use_validation and self._epoch_window_open(trainer):
            self._close(trainer, pl_module, step=step)
        self.log_cost(trainer, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A window of an endless epoch is closed where training ends."""
        if not self._use_validation and self._epoch_window_open(trainer):
            self._close(trainer, pl_module, step=max(0, self.step_of(trainer) - 1))

    def release(self) -> None:
        """Nothing of ours stays on the model; the observer drops the reader with the session."""
        self._window.close()

    # ------------------------------------------------------------------ windows

    def _train_window_ends(self, trainer: Trainer) -> bool:
        """The same on all ranks: it depends on the trainer's counters only."""
        if accumulates(trainer):
            return False
        # With the last batch, not at the end of the epoch: Lightning takes checkpoints in between, and after a resume
        # from one of them that end never comes.
        full = self.step_of(trainer) + 1 - self._started_at >= self.window_steps
        return not self._first_done or full or _is_last_batch(trainer)

    def _epoch_window_open(self, trainer: Trainer) -> bool:
        return self._first_done and self.step_of(trainer) > self._started_at

    def _open(self, trainer: Trainer) -> None:
        observer = Session.of(trainer).observer
        if self._eager is None or (self._hidden and observer.reached):
            self._window.open(observer, self._visible, self.count_seconds)

    def _stop_reading(self, trainer: Trainer) -> None:
        self._window.stop_reading()

    def _visible(self, units: dict[str, Unit]) -> list[str]:
        return [name for name in self._chosen(units) if not (self._hidden and units[name].layers <= self._hidden)]

    def _chosen(self, units: dict[str, Unit]) -> list[str]:
        names = [name for name, unit in units.items() if unit.counts]
        return names if self.layers is None else _matching(self.layers, names)

    def _close(self, trainer: Trainer, pl_module: LightningModule, *, step: int) -> None:
        """Ends the window: reduces it over ranks, updates the histories, logs."""
        opening, self._first_done = not self._first_done, True
        first = opening and step == 0  # later if the callback joined a run that was resumed: nobody saw the birth
        partial, self._partial = self._partial, False
        self.wait_for_training(trainer)
        observer = Session.of(trainer).observer

        def evidence() -> Tensor:
            self._look_for_hidden(trainer, pl_module, opening=opening)
            if self._eager is not None:
                self._eager.run(self._window, observer.units)
            names = self._chosen(observer.units)
            if self._eager is not None or (self._use_validation and not opening):  # seen in eval mode
                self._look.run(trainer, pl_module, self._window, names, observer.units)
            return self._window.pack(names, observer.units)

        packed = self.meet(trainer, evidence)
        first = first and not self._hidden  # an eager pass after the step
        names = self._chosen(observer.units)
        dead, scores = self._window.unpack(packed, names, observer.units, trainer)
        # The first window is also the beginning of the first epoch's: what has fired in it need not fire again.
        goes_on = opening and not self._use_validation and self._eager is None and self.window_steps > 1
        goes_on = goes_on and not _is_last_batch(trainer)
        if not goes_on:
            self._window = Window()
            # An eager pass at the start comes before the step, all others after it.
            self._started_at = step if opening and self._eager is not None and not self._hidden else step + 1
        elif step:
            self._started_at = step
        self._log(trainer, dead, scores, step=step, first=first, partial=partial)
        self.log_cost(trainer, step=step)

    def _look_for_hidden(self, trainer: Trainer, pl_module: LightningModule, *, opening: bool) -> None:
        """Layers that never came by, or no longer do, though the model calls them, are measured in an eager pass.

        The first are looked for once; the others where nothing comes by any more.
        """
        observer = Session.of(trainer).observer
        if self._eager is not None and not self._hidden:
            return  # all of it is
        if observer.compiled:
            self._pass_eagerly(trainer, pl_module, "The model was compiled during the training")
            return
        training = opening or not self._use_validation
        # One batch may leave out a layer, but not all of them.
        searched = self._searched or self._eager is not None or (opening and bool(observer.reached))
        if searched and (not observer.lost(training=training) or self._hidden >= observer.reached):
            return
        self._searched = not opening
        hidden, what = hidden_by_now(trainer, pl_module, training=training)
        if hidden:
            self._hidden = hidden
            self._eager = EagerPass(trainer, pl_module, hidden)
            self.say_once(
                f"DeadFilters {what}: it measures there in an eager pass over {self._eager.num_samples} fixed samples "
                "at the end of each window, exact over these."
            )

    def _pass_eagerly(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """Measures all layers so."""
        self._hidden = set()
        self._eager = EagerPass(trainer, pl_module)
        self.say_once(
            f"{why}: DeadFilters measures in an eager pass over {self._eager.num_samples} fixed samples at the end of "
            "each window, and is exact over these."
        )

    def meets(self, hook: str, trainer: Trainer) -> bool:
        """Where windows close."""
        on_training = not (self._first_done and self._use_validation)
        if hook == "on_train_start":
            self._choose_split(trainer)
            compiled = Session.begin(trainer, trainer.lightning_module).observer.compiled
            return not self._first_done and compiled and self.may_call(trainer)
        return {
            "on_train_batch_end": on_training and self._train_window_ends(trainer),
            "on_validation_epoch_end": self._use_validation,
            "on_train_epoch_end": not self._use_validation and self._epoch_window_open(trainer),
            "on_train_end": not self._use_validation and self._epoch_window_open(trainer),
        }.get(hook, False)

    # ------------------------------------------------------------------ output

    def _log(  # noqa: PLR0913
        self,
        trainer: Trainer,
        dead: dict[str, Tensor],
        scores: dict[str, Tensor],
        *,
        step: int,
        first: bool,
        partial: bool,
    ) -> None:
        session = Session.of(trainer)
        news: list[FilterEvent] = []
        pruned: dict[str, set[int]] = {}
        for layer, mask in dead.items():
            self.notebook(trainer).note("num_filters", mask.numel(), layer=layer)
            pruned[layer] = set()
            if (out := pruned_filters(session.observer.model, layer)) is not None:
                self.notebook(trainer).note("pruned_dead", float((mask & out).sum()), layer=layer)
                pruned[layer] = set(out.nonzero().flatten().tolist())
            news += self.lifelines.update(layer, mask.nonzero().flatten().tolist(), step=step, first=first)
        if session.owns_history(self):
            session.dead = self.dead
        counts = {layer: float(mask.sum()) for layer, mask in dead.items()}
        self.log_layers(trainer, "dead_filters", counts, step=step)
        self.log_layers(trainer, "dead_fraction", {n: c / dead[n].numel() for n, c in counts.items()}, step=step)
        for layer, mask in dead.items():
            if self.lifelines.saw_birth(layer):
                born = set(self.lifelines.dead_since_birth(layer)) - pruned[layer]
                self.notebook(trainer).record("born_dead_fraction", len(born) / mask.numel(), step=step, layer=layer)
        dormant = {n: (s <= self.dormant_threshold).double().mean().item() for n, s in scores.items()}
        self.log_layers(trainer, "dormant_fraction", dormant, step=step)
        if dead:
            self.log_number(trainer, "dead_filters", sum(counts.values()), step=step)
            self.log_number(
                trainer, "dead_fraction_max", max(c / dead[n].numel() for n, c in counts.items()), step=step
            )
        self._publish(trainer)
        if news:
            table = history_table(self.lifelines, partial=partial)
            self.write(
                trainer, [Text(tag=f"{self.tag('dead_filters').replace('/', '.')}/history", step=step, markdown=table)]
            )

    def _publish(self, trainer: Trainer) -> None:
        """Present from the start, so that monitoring them never kills a run."""
        if self.quiet:
            return
        history = self.notebook(trainer)
        dead = [indices for indices in self.dead.values() if indices]
        fractions = [
            len(indices) / max(1.0, history.fact("num_filters", 1.0, layer)) for layer, indices in self.dead.items()
        ]
        self.publish(
            trainer,
            {
                self.tag("dead_filters"): float(sum(map(len, dead))),
                self.tag("dead_fraction_max"): max(fractions, default=0.0),
            },
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Histories, and the evidence of the open window."""
        return {
            "lifelines": self.lifelines.state_dict(),
            "first_done": self._first_done,
            "started_at": self._started_at,
            "window": self._window.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; the window goes on in `on_train_start`."""
        self.lifelines.load_state_dict(state_dict["lifelines"])
        self._first_done = state_dict["first_done"]
        self._started_at = state_dict["started_at"]
        self._restored = state_dict["window"]


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _is_last_batch(trainer: Trainer) -> bool:
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def _finite(count: float) -> float:
    return 1 if count == float("inf") else count
