"""`TrainingDynamics`: does the loss fall as the gradient promises, and how far does each layer move?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from lightning_interp._options import check_at_least
from lightning_interp.callbacks._backlog import Backlog, Item, single_loss
from lightning_interp.callbacks._lightning import LightningModule, Trainer, accumulates, planned_steps
from lightning_interp.callbacks._prober import Prober
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks._readings import Movement, agree, movement, same_batch
from lightning_interp.callbacks._updates import parameter_layers
from lightning_interp.callbacks.base import InterpCallback, Note, OnError
from lightning_interp.callbacks.schedule import BatchHooks, thinning_due

log = logging.getLogger(__name__)

# Values are fetched from the device so often, in steps: early, where rules must be quick, and later.
_FETCH_EARLY, _FETCH_LATE = 10, 50
_EARLY_STEPS = 50  # or as many as are all probed, where these are more
_LOOK_AHEAD = 40  # steps in which the next probe is looked for at once
_OF_EACH_BATCH = ("on_train_batch_end",)
# Most values that wait, whatever the number of micro-batches in a step.
_MOST_WAITING = 512


class TrainingDynamics(InterpCallback):
    """Loss, learning rate, gradient norm, update ratio per layer, and the same-batch step ratio.

    The *update ratio* of a layer is the real update of its weights (after minus before the step, whatever the
    optimizer, clipping and schedule did) over their norm. The *step ratio* compares the loss of one batch before and
    after the update that it caused with what its gradient promised: 1 is a short step, 1/2 on a parabola the step to
    its minimum, less than 0 an overshoot. Its second forward runs with the same inputs, modes and random numbers and
    leaves no trace; `training_step` is never called again.

    Every step is probed at the start, where a too-high learning rate does its damage, then fewer and fewer, down to
    every n-th one (see `thinning_due`). The loss of every step is kept for the rules. Steps that the gradient scaler
    skips are left out.

    The step ratio needs a loss of `torch.nn.functional` (cross-entropy, NLL, BCE, MSE, L1, smooth L1, Huber, KL)
    behind the LightningModule or its parts, or sums and multiples of such (mixed targets), returned by
    `training_step`, and one backward a batch. With accumulation and under DDP it holds for the last micro-batch of
    this process, with the gradient of that alone. Where it can't be exact there is none: compiled models, SyncBatchNorm
    over several processes, attention in eval mode. With FSDP and DeepSpeed only the loss is measured.

    Logs: `interp.update_ratio/<layer>`, `interp.gradient_norm/<layer>` (both of the weights of two or more axes; the
    gradient before clipping), `interp/update_ratio_median`, `interp/update_ratio_max`, `interp/gradient_norm` (all
    parameters), `interp/learning_rate` (the largest), `interp/step_ratio`.
    Metric: `interp/update_ratio_median`, NaN before the first.
    Source: CS231n, "Neural Networks Part 3"; Nocedal and Wright 2006, equation 4.4; Schneider et al. 2021 (Cockpit).
    """

    provides: ClassVar[tuple[str, ...]] = ("update_ratio", "gradient_norm", "step_ratio", "learning_rate", "cost")
    measures: ClassVar[tuple[str, ...]] = (
        "loss", "loss_peak", "loss_before", "loss_after", "step_ratio", "learning_rate", "gradient_norm", "update_norm",
        "update_ratio", "weight_norm", "weight_decay", "num_classes", "soft_targets", "scores_normalised",
        "planned_steps", "input_mean", "input_std", "non_finite_step", "trainable", "in_optimizer",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913 - options
        self,
        *,
        dense_steps: int = 25,
        every_n_train_steps: int | None = 200,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks and keeps the options.

        Args:
            dense_steps: So many steps at the start are all probed; the first one always is.
            every_n_train_steps: Later every n-th step is probed, and some in between at first; None probes no more.
            layers: Names or globs of the layers to look at, as in `named_modules()`; None takes all with parameters.
            max_layers: Most layers with scalars of their own; medians and maxima hold all.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and lets the callback rest; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(
            every_n_train_steps=every_n_train_steps, layers=layers, max_layers=max_layers, name=name, on_error=on_error
        )
        check_at_least("dense_steps", dense_steps, 0)
        self.dense_steps = dense_steps
        self._reset()

    def _reset(self) -> None:
        self._backlog = Backlog()
        self._prober = Prober(self._backlog, strict=self.on_error == "raise")
        self._partial: list[float] = []
        self._partial_step = -1
        self._median = math.nan
        self._fetched_at = -1

    # ------------------------------------------------------------------ life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session and checks the names of the layers."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._reset()
            self._check_layers(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what is known before the first step; after a resume, goes on with what was not written yet."""
        if is_sharded(trainer):
            self.say_once("The weights are split over processes: TrainingDynamics measures only the loss there.")
        self._check_layers(pl_module)
        self._fetched_at = self.step_of(trainer) - 1
        # Lightning copies what a step returns only if it does the optimization itself.
        self._backlog.copies = not pl_module.automatic_optimization
        self.notebook(trainer).note("planned_steps", planned_steps(trainer))
        self._report(trainer)
        self._publish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what waits."""
        self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what waits."""
        self._prober.drop()
        self._report(trainer)
        self._publish(trainer)
        self.log_cost(trainer, step=self.step_of(trainer) - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what waits, for rules that look at the end of a validation."""
        self._prober.drop()
        self._report(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the metric where EarlyStopping looks."""
        self._publish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes everything off the model, and writes what waits: the last losses before a crash matter most."""
        try:
            self._prober.drop()
            if len(self._backlog):
                self._report(trainer)
                self.flush(trainer)
        finally:
            super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes everything off the model."""
        self._prober.drop()
        super().teardown(trainer, pl_module, stage)

    def release(self) -> None:
        """Takes everything off the model."""
        self._prober.drop()

    # ------------------------------------------------------------------ one batch

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of a batch that is probed; of all others the loss, at their end."""
        if self._prober.busy or self._probes(trainer, step):
            return BatchHooks(self._batch_hooks)
        following = range(step + 1, step + 1 + min(_LOOK_AHEAD, self._until_fetch(step) - 1))
        quiet = next((i for i, later in enumerate(following) if self._probes(trainer, later)), len(following))
        return BatchHooks(_OF_EACH_BATCH, more=0 if self._backlog.sent else quiet)

    def notes_from(self, step: int) -> Note | None:
        """The loss; the step that fetches is no quiet one."""
        return self._backlog.notes_from(step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Arms the probes on batches that are due and end in an optimizer step."""
        self._prober.start(trainer, pl_module, due=self._probes(trainer, self.step_of(trainer)))

    def _probes(self, trainer: Trainer, step: int) -> bool:
        early = step < max(1, self.dense_steps)
        early = early or thinning_due(step, dense=self.dense_steps, every=self.schedule.every_n_train_steps)
        return early or self.step_due(trainer, step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is over."""
        self._prober.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are there."""
        self._prober.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keeps the weights; the gradients are unscaled and not clipped yet."""
        self._prober.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss, and finishes the probes."""
        step, loss = self.step_of(trainer), single_loss(outputs)
        scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        if loss is not None and self._backlog.copies:
            loss = loss.clone()
        if loss is not None:
            self._backlog.add("loss", step, {"loss": loss}, scale=scale, ends=not accumulates(trainer))
        if self._prober.busy:
            self._prober.finish(trainer, pl_module, None if loss is None else (loss, scale), batch)
            self.count_seconds(self._prober.take_seconds())
            if self._prober.problem:
                self.say_once(self._prober.problem)
        self._fetch(trainer, step)

    # ------------------------------------------------------------------ output

    def _fetch(self, trainer: Trainer, step: int) -> None:
        """Reports what was measured, when it is time; on a GPU one step later, in which it does not run out of work.

        `Alerts` looks one step after the fetches, and later in the same hook: it knows as much there as elsewhere.
        """
        many = len(self._backlog) >= _MOST_WAITING
        if self._until_fetch(step) <= 0 or many:
            self._fetched_at = step
            if not many and _reads_later(trainer):
                self._backlog.send()
                return
            self._report(trainer)
            self.log_cost(trainer, step=step)
        elif self._backlog.sent and step > self._fetched_at:
            self._report(trainer, sent=True)
            self.log_cost(trainer, step=step)

    def _until_fetch(self, step: int) -> int:
        """Steps from this one to the next that fetches."""
        every = _FETCH_EARLY if step < _EARLY_STEPS or step < self.dense_steps else _FETCH_LATE
        return self._fetched_at + every - step

    def _report(self, trainer: Trainer, *, sent: bool = False) -> None:
        """Fetches what waits on the device, and hands it to the history and to the loggers, each at its own step.

        Args:
            trainer: The running trainer.
            sent: Only what was sent.
        """
        history = self.notebook(trainer)
        if sent:
            started = self.clock()
            self._backlog.wait()
            self._since += self.clock() - started  # as in `wait_for_training`
        elif len(self._backlog):
            self.wait_for_training(trainer)
        for item in self._backlog.take_sent() if sent else self._backlog.take():
            if item.kind == "loss":
                self._report_loss(trainer, item)
            elif item.kind == "images":
                history.note("input_mean", item.values["mean"][0])
                history.note("input_std", item.values["std"][0])
            else:
                self._report_probe(trainer, item)

    def _report_loss(self, trainer: Trainer, item: Item) -> None:
        """The loss of a step is the mean over those of its micro-batches that returned one."""
        if self._partial and self._partial_step != item.step:
            self._close_step(trainer)
        self._partial_step = item.step
        self._partial.append(item.values["loss"][0] * item.notes["scale"])
        if item.notes["ends"]:
            self._close_step(trainer)

    def _close_step(self, trainer: Trainer) -> None:
        loss, self._partial = sum(self._partial) / len(self._partial), []
        self.notebook(trainer).record("loss", loss, step=self._partial_step)
        self.notebook(trainer).record_peak("loss_peak", loss, step=self._partial_step)
        if not math.isfinite(loss):
            self._note_broken(trainer, None, self._partial_step)

    def _report_probe(self, trainer: Trainer, item: Item) -> None:
        moved = movement(item.values, item.notes)
        if moved is None:
            return
        history, step = self.notebook(trainer), item.step
        chosen = [layer for layer in item.notes["trainable"] if layer and self._wants(layer)]
        for layer in chosen:
            history.note("trainable", item.notes["trainable"][layer], layer=layer)
            history.note("in_optimizer", item.notes["in_optimizer"][layer], layer=layer)
            if layer in moved.update_norm:
                history.record("update_norm", moved.update_norm[layer], step=step, layer=layer)
            if layer in moved.weight_norm:
                history.record("weight_norm", moved.weight_norm[layer], step=step, layer=layer)
        for layer in moved.broken:
            self._note_broken(trainer, layer, step)
        if "weight_decay" in item.notes:  # not in what an older version left in a checkpoint
            history.note("weight_decay", item.notes["weight_decay"])
        self._log_movement(trainer, moved, chosen, step)
        rate = item.values["rate"][0] if "rate" in item.values else item.notes["rate"]
        self.log_number(trainer, "learning_rate", rate, step=step, note=True)
        if "returned" in item.values:
            self._report_losses(trainer, item)

    def _log_movement(self, trainer: Trainer, moved: Movement, chosen: list[str], step: int) -> None:
        for quantity in ("update_ratio", "gradient_norm"):
            own = {layer: value for layer, value in getattr(moved, quantity).items() if layer in chosen}
            self.log_layers(trainer, quantity, own, step=step)
        self.log_number(trainer, "gradient_norm", moved.total_gradient, step=step, note=True)
        if moved.update_ratio:
            self._median = moved.median_ratio
            self.log_number(trainer, "update_ratio_median", moved.median_ratio, step=step)
            self.log_number(trainer, "update_ratio_max", moved.largest_ratio, step=step)
            self._publish(trainer)

    def _report_losses(self, trainer: Trainer, item: Item) -> None:
        """The same-batch losses, if the one that was followed is the one that was returned."""
        history, returned = self.notebook(trainer), item.values["returned"][0]
        if "classified" in item.values and agree(item.values["classified"][0], returned):
            history.note("num_classes", item.notes["num_classes"])
            history.note("soft_targets", 0.0)
            history.note("scores_normalised", item.values.get("normalised", [0.0])[0])
        if "softened" in item.values:
            history.note("soft_targets", float(agree(item.values["softened"][0], returned)))
        losses = same_batch(item.values, exact=item.notes["exact"], resolution=item.notes["resolution"])
        if losses is None:
            log.debug("step %d: no loss function leads to the returned loss %g", item.step, returned)
            return
        history.record("loss_before", losses.before, step=item.step)
        history.record("loss_after", losses.after, step=item.step)
        if not math.isnan(losses.ratio):
            self.log_number(trainer, "step_ratio", losses.ratio, step=item.step, note=True)

    def _note_broken(self, trainer: Trainer, layer: str | None, step: int) -> None:
        history = self.notebook(trainer)
        if math.isinf(history.fact("non_finite_step", math.inf, layer)):
            history.note("non_finite_step", step, layer=layer)

    def _publish(self, trainer: Trainer) -> None:
        if not self.quiet:
            self.publish(trainer, {self.tag("update_ratio_median"): self._median})

    def _check_layers(self, pl_module: LightningModule) -> None:
        names = [name for name in parameter_layers(pl_module) if name]
        if names:  # a model may also be made later, in `configure_model`
            self.choose_layers(names)

    def _wants(self, layer: str) -> bool:
        return self.layers is None or any(fnmatchcase(layer, pattern) for pattern in self.layers)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What was measured and not written yet; a resumed run neither repeats nor loses a value."""
        return {
            "backlog": self._backlog.state_dict(),
            "partial": [self._partial_step, *self._partial],
            "median": self._median,
            "images_seen": self._prober.images_seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._backlog.load_state_dict(state_dict["backlog"])
        self._partial_step, *self._partial = state_dict["partial"]
        self._median = state_dict["median"]
        self._prober.images_seen = state_dict["images_seen"]


def _reads_later(trainer: Trainer) -> bool:
    """Whether values are on their way for a step before they are read."""
    return bool(trainer.strategy.root_device.type == "cuda")
