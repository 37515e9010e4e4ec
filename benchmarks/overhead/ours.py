"""Our own watches of a training step, each in one of its states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.overhead.watch import Watch, finite, require
from lightning_interp.callbacks._probe import SameBatchProbe
from lightning_interp.callbacks._updates import UpdateProbe
from lightning_interp.callbacks.activation_sparsity import _SAMPLE_EVERY, ActivationSparsity
from lightning_interp.callbacks.observer import Observer
from lightning_interp.callbacks.training_dynamics import TrainingDynamics
from lightning_interp.callbacks.window import Window
from lightning_interp.functional.units import Unit


class DeadFilters(Watch):
    """The reading of `DeadFilters` in one batch: the first one of a window, or a later one."""

    ours: ClassVar[bool] = True

    def __init__(self, name: str, *, first: bool = False, dead: float = 0.0) -> None:
        self.name, self.first, self.dead = f"DeadFilters, {name}", first, dead
        self._window = Window()

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._observer = Observer(model)

    def before_forward(self) -> None:
        if self.first:
            self._window = Window()
        self._window.open(self._observer, _counting)

    def before_backward(self, loss: Tensor) -> None:
        self._window.stop_reading()

    def check(self) -> None:
        """Of the filters that were silenced, and of no others, there must be no sign of life."""
        units = self._observer.units
        names = _counting(units)
        require(names, self.name)
        packed, start = self._window.pack(names, units), 0
        for name in names:
            count = units[name].num_filters
            silent = count - int(packed[start + 2 : start + 2 + count].sum())
            judged = bool(packed[start]) and silent == round(self.dead * count)
            require(judged, f"{self.name}: with {silent} of {count} filters of {name!r} silent, it")
            start += 2 + 2 * count


class Sparsity(Watch):
    """A batch that `ActivationSparsity` samples."""

    ours: ClassVar[bool] = True
    name = "ActivationSparsity, a sampled batch"
    looks_at = _SAMPLE_EVERY

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._callback, self._observer = ActivationSparsity(), Observer(model)

    def before_forward(self) -> None:
        self._callback._zeros.clear()
        self._observer.open(self._callback._read)

    def before_backward(self, loss: Tensor) -> None:
        self._observer.close_reader(self._callback._read)

    def check(self) -> None:
        shares = [float(total.mean()) / count for total, count in self._callback._zeros.values()]
        require(shares and all(0 <= share <= 1 for share in shares) and sum(shares), self.name)


class Dynamics(Watch):
    """A step that `TrainingDynamics` probes: update ratios, gradient norms and the loss of the batch a second time."""

    ours: ClassVar[bool] = True
    name = "TrainingDynamics, a probed step"
    looks_at = TrainingDynamics().schedule.every_n_train_steps or 1

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._model, self._optimizer = model, optimizer
        self._measured: dict[str, Tensor] = {}

    def before_forward(self) -> None:
        self._updates = UpdateProbe(self._model, [self._optimizer])
        self._probe = SameBatchProbe(self._model, self._updates.parameters)
        self._probe.attach()

    def before_backward(self, loss: Tensor) -> None:
        self._probe.before_backward(loss)

    def before_step(self) -> None:
        self._probe.after_backward()
        self._updates.before_step(self._optimizer)

    def after_step(self, loss: Tensor) -> None:
        measured = self._updates.after_step()
        if measured is not None:
            self._measured = {**measured[0], **self._probe.measure(loss.detach(), measured[2], nullcontext())}

    def check(self) -> None:
        require(self._measured.keys() >= {"before", "update", "gradient", "value", "again", "fall"}, self.name)
        require(finite(self._measured["gradient"]) and float(self._measured["gradient"].max()) > 0, self.name)
        require(finite([self._measured["again"]]), self.name)


def _counting(units: dict[str, Unit]) -> list[str]:
    """The layers that have filters."""
    return [name for name, unit in units.items() if unit.counts]


FIRST = "first batch of a window"
NONE_DEAD = "later in it, no filter dead"
SOME_DEAD = "later in it, 30 % dead"


def watches() -> list[Callable[[], Watch]]:
    """All of them."""
    states: list[tuple[str, dict[str, Any]]] = [(FIRST, {"first": True}), (NONE_DEAD, {}), (SOME_DEAD, {"dead": 0.3})]
    found: list[Callable[[], Watch]] = [
        lambda name=name, state=state: DeadFilters(name, **state)  # type: ignore[misc]
        for name, state in states
    ]
    return [*found, Sparsity, Dynamics]
