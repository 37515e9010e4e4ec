"""When to probe a step, and what is kept of it: the probes of one batch put together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_interp.callbacks._backlog import Backlog
from lightning_interp.callbacks._lightning import accumulates, axis_step
from lightning_interp.callbacks._probe import SameBatchProbe, can_probe, image_statistics
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks._updates import UpdateProbe, largest_decay, largest_rate

# Batches that a due step waits for the optimizers that have not stepped (several optimizers that take turns).
_PATIENCE = 8


class Prober:
    """Probes the batches that are due; what it measures goes into a backlog, still on the device.

    Args:
        backlog: Gets items of the kinds `images` and `probe`.
        strict: Whether to raise what goes wrong in the second forward, instead of doing without it.

    Attributes:
        images_seen: Whether the statistics of the first images were taken.
        problem: Why there is no step ratio for this run, or an empty string.
    """

    def __init__(self, backlog: Backlog, *, strict: bool) -> None:
        self.images_seen = False
        self.problem = ""
        self._backlog = backlog
        self._strict = strict
        self._waiting: set[int] = set()
        self._patience = 0
        self._updates: UpdateProbe | None = None
        self._same_batch: SameBatchProbe | None = None
        self._seconds = 0.0
        self._rate: float | Tensor = float("nan")
        self._hidden = False  # in a compiled function, which each new hook would have compiled anew

    def __getstate__(self) -> dict[str, Any]:
        """A copy, even one made during a batch, is on no model and probes nothing of it."""
        return {**vars(self), "_updates": None, "_same_batch": None, "_waiting": set()}

    def start(self, trainer: Any, model: nn.Module, *, due: bool) -> None:
        """A batch begins; arms the probes if one is due and the batch ends in an optimizer step."""
        self.drop()  # a batch that the user's hook skipped has no end
        sharded = is_sharded(trainer)
        if due and not sharded:
            self._waiting = {id(optimizer) for optimizer in trainer.optimizers}
            self._patience = _PATIENCE
        if not self._waiting or sharded or accumulates(trainer):
            return
        self._patience -= 1
        self._updates = UpdateProbe(model, trainer.optimizers)
        if not self.problem and not self._hidden and can_probe(model, trainer.world_size):
            self._same_batch = SameBatchProbe(model, self._updates.parameters, want_images=not self.images_seen)
            self._same_batch.attach()

    @property
    def busy(self) -> bool:
        """Whether a batch is being probed, or one that was due still waits for an optimizer."""
        return bool(self._waiting) or self._updates is not None or self._same_batch is not None

    def before_backward(self, loss: Tensor) -> None:
        """The forward is over."""
        if self._same_batch is not None:
            self._same_batch.before_backward(loss)

    def after_backward(self) -> None:
        """The gradients are there."""
        if self._same_batch is not None:
            self._same_batch.after_backward()

    def before_step(self, trainer: Any, optimizer: Any) -> None:
        """An optimizer is about to step; the gradients are unscaled and not clipped yet."""
        if self._updates is None or id(optimizer) not in self._waiting:
            return
        self._rate = largest_rate(trainer.optimizers)
        if self._updates.before_step(optimizer, _gradient_scale(trainer, optimizer)):
            self._waiting.discard(id(optimizer))

    def finish(self, trainer: Any, model: Any, loss: tuple[Tensor, int] | None, batch: Any) -> None:
        """The batch has ended.

        Args:
            trainer: The running trainer.
            model: The LightningModule.
            loss: What Lightning handed back, and the factor to what `training_step` returned; None if nothing.
            batch: The batch.
        """
        updates, probe = self._updates, self._same_batch
        self.drop()
        if self._patience <= 0:
            self._waiting.clear()
        # Without a loss automatic optimisation steps with the gradients of nothing.
        if updates is None or (loss is None and model.automatic_optimization):
            return
        step = axis_step(trainer)
        if not self.images_seen:
            self.images_seen = True
            images = probe.images if probe is not None else image_statistics(batch)
            if images is not None:
                self._backlog.add("images", step, {"mean": images[0], "std": images[1]})
        measured = updates.after_step()
        if measured is None:
            return
        tensors, notes, back = measured
        notes |= {"trainable": updates.trainable, "in_optimizer": updates.in_optimizer}
        notes["weight_decay"] = largest_decay(trainer.optimizers)
        if isinstance(self._rate, Tensor):
            tensors["rate"] = self._rate
        else:
            notes["rate"] = self._rate
        if probe is not None and loss is not None:
            returned = loss[0] * loss[1]
            tensors |= {"returned": returned, **self._again(trainer, probe, returned, back)}
            # In manual optimisation another loss may go into backward than the one that is returned.
            notes["exact"] = probe.exact and bool(model.automatic_optimization)
            notes["resolution"] = probe.resolution
            if probe.num_classes is not None:
                notes["num_classes"], tensors["classified"] = probe.num_classes
            more = {"softened": probe.soft_targets, "normalised": probe.normalised}
            tensors |= {name: value for name, value in more.items() if value is not None}
        self._backlog.add("probe", step, tensors, **notes)

    def _again(
        self, trainer: Any, probe: SameBatchProbe, returned: Tensor, back: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        """The loss after the update; a model that can't be followed costs the step ratio and nothing else."""
        try:
            if probe.error is not None:
                raise probe.error
            self._hidden = probe.unheard
            return probe.measure(returned, back, trainer.precision_plugin.forward_context())
        except Exception as error:
            if self._strict:
                raise
            self.problem = (
                f"TrainingDynamics can't compute the loss of a batch a second time ({type(error).__name__}: {error}). "
                "There is no step ratio for this run; everything else is measured."
            )
            return {}

    def drop(self) -> None:
        """Takes everything off the model. May be called at any time, more than once."""
        probe, self._same_batch, self._updates = self._same_batch, None, None
        if probe is not None:
            probe.detach()
            self._seconds += probe.seconds

    def take_seconds(self) -> float:
        """What the probes have taken inside the user's steps since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _gradient_scale(trainer: Any, optimizer: Any) -> float:
    """What the gradients are still multiplied with: fused optimizers unscale them inside their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if fused and scaler is not None else 1.0
