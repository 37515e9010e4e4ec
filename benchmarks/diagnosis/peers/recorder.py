"""Records what the re-expressed peers look at, while a network trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.diagnosis.data import Data

FIRST, EVERY = 20, 10  # a peer that saves tensors at an interval saves these steps
START = 10  # of these, also what judges the initialisation
ACTIVE = 1e-5


class WeightStep(NamedTuple):
    """The weight of a convolution or linear layer at one step; the gradient is the one before clipping.

    Attributes:
        weight_mean, weight_norm: Mean absolute value and L2 norm before the step.
        update_mean, update_norm: The same of what the step changed.
        grad_mean, grad_norm: The same of the gradient; NaN where there is none.
        grad_spread: 95th minus 5th percentile of the gradient, at the first ten steps; NaN later.
        finite: Whether gradient and weight are numbers.
        unchanged: Whether the weight is the one of the saved step before, to 1e-5; False between saved steps.
    """

    weight_mean: float
    weight_norm: float
    update_mean: float
    update_norm: float
    grad_mean: float
    grad_norm: float
    grad_spread: float = math.nan
    finite: bool = True
    unchanged: bool = False


class Epoch(NamedTuple):
    """One epoch; accuracies are NaN in a regression."""

    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float


@dataclass
class Recording:
    """The numbers of a run.

    Attributes:
        epochs_planned: Length of the run.
        classes: 0 in a regression.
        inputs: Mean, standard deviation, minimum and maximum of the training images.
        initial_spread: Standard deviation of each weight at the start.
        losses: Of each step.
        weights: By layer, of each step.
        zero_gradients: Share of gradient elements that are exactly 0, over all parameters, of each step.
        active: By module, of each step: for each unit the share of positions and images above 1e-5. Modules only, since
            a hook on modules, which is what the peers have, can't see a functional ReLU.
        relu_input_variance: By module, of the first ten steps.
        epochs: As they end.
    """

    epochs_planned: int
    classes: int
    inputs: tuple[float, float, float, float] = (0.0, 1.0, -1.0, 1.0)
    initial_spread: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    weights: dict[str, list[WeightStep]] = field(default_factory=dict)
    zero_gradients: list[float] = field(default_factory=list)
    active: dict[str, list[list[float]]] = field(default_factory=dict)
    relu_input_variance: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def saved(self) -> list[int]:
        """The steps that a peer with a save interval sees."""
        return [step for step in range(len(self.losses)) if is_saved(step)]


def is_saved(step: int) -> bool:
    """Whether a peer with a save interval sees this step."""
    return step < FIRST or step % EVERY == 0


class Recorder:
    """Call `before_step` between backward and clipping, `after_step` after the optimizer, `detach` at the end."""

    def __init__(self, net: nn.Module, data: Data, epochs: int) -> None:
        images = data.images
        inputs = (float(images.mean()), float(images.std()), float(images.min()), float(images.max()))
        self.recording = Recording(epochs, 0 if data.regression else data.outputs, inputs)
        layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        # A pruned layer trains `weight_orig`; its `weight` is made of it in each forward.
        self._weights: dict[str, Tensor] = {name: getattr(m, "weight_orig", m.weight) for name, m in layers.items()}
        self._parameters = list(net.parameters())
        self._before: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}
        self._gradients: dict[str, list[float]] = {}
        self.recording.initial_spread = {name: float(w.detach().std()) for name, w in self._weights.items()}
        self.recording.weights = {name: [] for name in self._weights}
        relus = {name: m for name, m in net.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6)}
        self.recording.active = {name: [] for name in relus}
        self.recording.relu_input_variance = {name: [] for name in relus}
        self._names: dict[nn.Module, str] = {module: name for name, module in relus.items()}
        self._hooks = [module.register_forward_hook(self._hear) for module in relus.values()]

    def _hear(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not module.training:
            return
        with torch.no_grad():
            units = output.detach().flatten(2) if output.dim() > 2 else output.detach().unsqueeze(2)
            name = self._names[module]
            self.recording.active[name].append((units > ACTIVE).float().mean((0, 2)).tolist())
            if len(self.recording.losses) < START:
                self.recording.relu_input_variance[name].append(float(inputs[0].detach().float().var()))

    @torch.no_grad()
    def before_step(self) -> None:
        """Reads the gradients and keeps the weights."""
        early = len(self.recording.losses) < START
        for name, weight in self._weights.items():
            self._before[name] = weight.detach().clone()
            self._gradients[name] = _gradient(weight.grad, early)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        zeros, total = sum(int((g == 0).sum()) for g in gradients), sum(g.numel() for g in gradients)
        self.recording.zero_gradients.append(zeros / max(1, total))

    @torch.no_grad()
    def after_step(self, loss: float) -> None:
        """Reads what the step changed."""
        step = len(self.recording.losses)
        self.recording.losses.append(loss)
        for name, weight in self._weights.items():
            before, gradient = self._before[name], self._gradients[name]
            update = weight - before
            means = [float(t.abs().mean()) for t in (before, update)]
            norms = [float(torch.linalg.vector_norm(t)) for t in (before, update)]
            finite = math.isfinite(norms[0] + norms[1]) and (gradient == [] or math.isfinite(gradient[1]))
            unchanged = is_saved(step) and name in self._saved and torch.allclose(weight, self._saved[name], 1e-5, 1e-8)
            if is_saved(step):
                self._saved[name] = weight.detach().clone()
            mean, norm, spread = gradient or [math.nan] * 3
            moved = WeightStep(means[0], norms[0], means[1], norms[1], mean, norm, spread, finite, unchanged)
            self.recording.weights[name].append(moved)

    def end_epoch(self, train: tuple[float, float], val: tuple[float, float]) -> None:
        """Keeps loss and accuracy of an epoch."""
        self.recording.epochs.append(Epoch(len(self.recording.losses) - 1, *train, *val))

    def detach(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _gradient(gradient: Tensor | None, early: bool) -> list[float]:
    """Mean absolute value, norm and spread; nothing where there is no gradient."""
    if gradient is None:
        return []
    low, high = torch.quantile(gradient, torch.tensor([0.05, 0.95])).tolist() if early else (math.nan, math.nan)
    return [float(gradient.abs().mean()), float(torch.linalg.vector_norm(gradient)), high - low]
