"""`ActivationSparsity`: how many activations are zero, how that spreads over channels, and the maps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_interp._options import check_bool, check_positive_int, check_scaling, select
from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._activation_maps import activation_maps
from lightning_interp.callbacks._lightning import LightningModule, Trainer, accumulates
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.batches import NoScoresError, UnreadableError
from lightning_interp.callbacks.fallback import hidden_by_now
from lightning_interp.callbacks.observer import Observer
from lightning_interp.callbacks.samples import fixed_samples
from lightning_interp.callbacks.schedule import BatchHooks
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.sparsity import zero_fraction
from lightning_interp.functional.tracing import End
from lightning_interp.records import Histogram

_SAMPLE_EVERY = 50
# Not the first: Lightning has just logged then, and a GPU, which has worked off its queue for that, would wait for us.
_SAMPLE_AT = 5
_BINS = 20
_COMPILED = "The model is compiled, so ActivationSparsity can't watch its batches; maps are still shown."


class ActivationSparsity(InterpCallback):
    """Measures the share of exact zeros behind each non-linearity, and shows the activation maps of fixed images.

    Sampled: the first batch of the training, then in each epoch the sixth and every 50th after it (of an epoch that is
    shorter, or of unknown length, the first and every 50th; with a step schedule the batches that are due). High
    sparsity is no fault in itself; `DeadFilters` tells what is. Each activation counts the same, whatever the sizes of
    the batches, and on whichever rank.

    Logs:
        `interp.sparsity/<NN>_<layer>`: share of zeros over channels and positions, in [0, 1].
        `interp.sparsity_channels/...`: histogram over channels.
        `interp/sparsity_mean`: mean over layers, also in `trainer.callback_metrics`.
        `interp.activation_maps/...`: the maps of each layer for the first fixed sample, the input beside them.

    Source: Glorot, Bordes, Bengio 2011; CS231n, understanding and visualizing CNNs.
    """

    provides: ClassVar[tuple[str, ...]] = ("sparsity", "sparsity_channels", "sparsity_mean", "activation_maps", "cost")
    measures: ClassVar[tuple[str, ...]] = ("sparsity",)
    can_be_spared: ClassVar[bool] = True  # the maps; the numbers go on

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        maps: bool = True,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        layers: Sequence[str] | None = None,
        max_layers: int = 32,
        num_samples: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            maps: Whether to show activation maps.
            every_n_epochs: Due at the end of every n-th epoch; the first one always is. Every epoch by default.
            every_n_train_steps: Due every n training steps instead.
            layers: Names or globs of the layers to measure; None takes all that a non-linearity follows.
            max_layers: Most layers with scalars and pictures of their own; aggregates hold all.
            num_samples: Images whose maps are shown.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            layers=layers,
            max_layers=max_layers,
            name=name,
            on_error=on_error,
        )
        check_bool("maps", maps)
        check_positive_int("num_samples", num_samples)
        self.maps = maps
        self.num_samples = num_samples
        self.mean, self.std = check_scaling(mean, std)
        self._reset()

    def _reset(self) -> None:
        self._zeros: dict[str, tuple[Tensor, int]] = {}  # zeros of each channel, and values of each
        self._older: dict[str, tuple[Tensor, int]] = {}  # of a checkpoint that did not count values: mean, batches
        self._images: Tensor | None = None
        self._sparsity = float("nan")
        self._observer: Observer | None = None
        self._reports = 0
        self._said_lost = False

    # ------------------------------------------------------------------ life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session and checks the names of the layers."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._reset()
            select("layers", self.layers, [name for name, _ in pl_module.named_modules() if name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the fixed samples and shows the state before the first step."""
        self._publish(trainer)
        if Session.of(trainer).observer.compiled:
            self.say_once(_COMPILED)
        maps = self.maps and not self.quiet
        if maps and _ranks.is_sharded(trainer):
            maps = False
            self.say_once("The weights are split over processes: ActivationSparsity shows numbers there, and no maps.")
        if maps and trainer.is_global_zero:
            try:
                self._images, _ = fixed_samples(trainer, pl_module, self.num_samples)
            except UnreadableError as error:
                self.say_for_all(trainer, type(error), f"has no pictures to show: {error}")
        if self.step_of(trainer) == 0:
            self._show_maps(trainer, pl_module, step=0)

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of a batch that is sampled, or whose step is due."""
        due = step == 0 or self.step_due(trainer, step) or self._observer is not None
        if due or self._sampled(trainer, batch_idx):
            return BatchHooks(self._batch_hooks)
        to_sample = (_sampled_at(trainer) - 1 - batch_idx) % _SAMPLE_EVERY
        return BatchHooks((), more=min(self.schedule.quiet(step), to_sample))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens the reader on sampled batches."""
        session = Session.of(trainer)
        if self._sampled(trainer, batch_idx) and not session.observer.compiled:
            self._observer = session.observer
            self._observer.open(self._read, count=self.count_seconds)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is over: what listens to torch functions need not hear backward and optimizer."""
        if pl_module.automatic_optimization:
            Session.of(trainer).observer.close_reader(self._read)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the reader off; reports the first step, and what a step schedule makes due."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.close_reader(self._read)
        if accumulates(trainer):
            return  # the batches of one step make one point
        step = self.step_of(trainer)
        due = self.step_due(trainer, step)
        if step == 0 or due:
            self._report(trainer, step=step)
        if due and not self.spared:
            self._show_maps(trainer, pl_module, step=step)
        if step == 0 or due:
            self.log_cost(trainer, step=step)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the metric present for EarlyStopping."""
        self._publish(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports an epoch that is due."""
        step = self.step_of(trainer) - 1
        if self.schedule.epoch_due(trainer.current_epoch):
            self._report(trainer, step=step)
            if not self.spared:
                self._show_maps(trainer, pl_module, step=step)
        self.log_cost(trainer, step=step)

    def meets(self, hook: str, trainer: Trainer) -> bool:
        """Where it reports."""
        if hook == "on_train_batch_end" and not accumulates(trainer):
            step = self.step_of(trainer)
            return step == 0 or self.step_due(trainer, step)
        return hook == "on_train_epoch_end" and self.schedule.epoch_due(trainer.current_epoch)

    def release(self) -> None:
        """Takes the reader off."""
        if self._observer is not None:
            self._observer.discard(self._read)

    # ------------------------------------------------------------------ measuring

    def _sampled(self, trainer: Trainer, batch_idx: int) -> bool:
        step = self.step_of(trainer)
        if self.schedule.every_n_epochs is None:
            return step == 0 or self.step_due(trainer, step)
        if step == batch_idx == 0:
            return True
        endless = trainer.num_training_batches == float("inf")
        now = batch_idx % _SAMPLE_EVERY == _sampled_at(trainer)
        return now and (endless or self.schedule.epoch_due(trainer.current_epoch))

    def _wanted(self, unit: str) -> bool:
        return self.layers is None or any(fnmatchcase(unit, pattern) for pattern in self.layers)

    def _read(self, end: End) -> None:
        if end.activation is not None and self._wanted(end.unit):
            channels = end.layout.channels_first(end.tensor)
            values = channels.shape[0] * channels.shape[2]
            zeros = zero_fraction(channels) * values
            kept = [self._zeros[end.unit]] if end.unit in self._zeros else []
            if end.unit in self._older:
                mean, batches = self._older.pop(end.unit)
                kept.append((mean * (batches * values), batches * values))  # as if they had been like this one
            for before, count in kept:
                if before.shape == zeros.shape:  # else new, or replaced by the user since the last report
                    zeros = zeros + before.to(zeros.device)  # what a checkpoint brought back lies on the CPU
                    values += count
            self._zeros[end.unit] = (zeros, values)

    def _sampled_so_far(self) -> dict[str, tuple[Tensor, int]]:
        older = {name: (mean * batches, batches) for name, (mean, batches) in self._older.items()}
        return {**older, **self._zeros}

    def _report(self, trainer: Trainer, *, step: int) -> None:
        """Reduces over ranks and logs. Every rank gets here at the same steps."""
        zeros, self._zeros, self._older = self._sampled_so_far(), {}, {}
        self.wait_for_training(trainer)
        parts = [part for part, _ in zeros.values()]

        def evidence() -> Tensor:
            if not parts:
                return torch.empty(0)
            counts = torch.tensor([count for _, count in zeros.values()], dtype=torch.float64)
            # One transfer for all layers.
            return torch.cat([torch.cat([part.to(parts[-1].device) for part in parts]).cpu().double(), counts])

        flat = _ranks.total(trainer, self.meet(trainer, evidence))
        self._look_for_hidden(trainer)
        if not parts:
            return
        *sums, counts = torch.split(flat, [*(len(part) for part in parts), len(parts)])
        shares = [(part / count).clamp(max=1.0) for part, count in zip(sums, counts, strict=True)]  # but for rounding
        by_layer = dict(zip(zeros, shares, strict=True))
        values = {name: part.mean().item() for name, part in by_layer.items()}
        self.log_layers(trainer, "sparsity", values, step=step)
        self._sparsity = sum(values.values()) / len(values)
        self.log_number(trainer, "sparsity_mean", self._sparsity, step=step)
        self._publish(trainer)
        edges = np.linspace(0.0, 1.0, _BINS + 1)
        session = Session.of(trainer)
        self.write(
            trainer,
            [
                Histogram(
                    tag=session.layer_tag("sparsity_channels", name, self.name),
                    step=step,
                    counts=np.histogram(by_layer[name].numpy(), bins=edges)[0].astype(np.float64),
                    edges=edges,
                )
                for name in self.shown_layers(trainer, list(by_layer))
            ],
        )

    def _look_for_hidden(self, trainer: Trainer) -> None:
        """Says which layers never come by, or no longer do, though the model calls them.

        The first are looked for once, or until something comes by; the others where nothing comes by any more.
        """
        observer = Session.of(trainer).observer
        self._reports += 1
        if observer.compiled:
            self.say_once(_COMPILED)
            return
        lost = observer.lost(training=True) and not self._said_lost
        if not lost and (self._reports > 2 or (self._reports == 1 and observer.reached)):
            return
        hidden, what = hidden_by_now(trainer, trainer.lightning_module, training=True)
        if hidden:
            self._reports, self._said_lost = max(2, self._reports), lost
            self.say_once(f"ActivationSparsity {what}: its numbers are without them; maps are still shown.")

    def _publish(self, trainer: Trainer) -> None:
        if not self.quiet:
            self.publish(trainer, {self.tag("sparsity_mean"): self._sparsity})

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What was sampled since the last report."""
        zeros = {name: [part.cpu(), count] for name, (part, count) in self._sampled_so_far().items()}
        return {"zeros": zeros, "sparsity": self._sparsity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._zeros = {name: (part, count) for name, (part, count) in state_dict.get("zeros", {}).items()}
        fractions = state_dict.get("fractions", {})  # schema 2: their sum over the batches, and the number of these
        if state_dict.get("schema", 1) < 2:  # the batches themselves
            fractions = {name: (torch.stack(batches).sum(0), len(batches)) for name, batches in fractions.items()}
        self._older = {name: (total / count, count) for name, (total, count) in fractions.items()}
        self._sparsity = state_dict["sparsity"]

    # ------------------------------------------------------------------ pictures

    def _show_maps(self, trainer: Trainer, pl_module: LightningModule, *, step: int) -> None:
        """The activation maps of the fixed samples, one picture per layer and sample."""
        if self._images is None or not self.may_call(trainer):
            return
        self.wait_for_training(trainer)
        try:
            drawings = activation_maps(pl_module, self._images, self._wanted, mean=self.mean, std=self.std)
        except NoScoresError as error:
            self._images = None
            self.say_for_all(trainer, type(error), f"has no pictures to show: {error}. Numbers go on.")
            return
        for index, pictures in enumerate(drawings):
            quantity = "activation_maps" if len(drawings) == 1 else f"activation_maps_{index}"
            self.log_pictures(trainer, quantity, pictures, step=step)


def _sampled_at(trainer: Trainer) -> int:
    """Of each fifty batches of an epoch, which one is sampled."""
    count = trainer.num_training_batches
    return _SAMPLE_AT if _SAMPLE_AT < count < float("inf") else 0
