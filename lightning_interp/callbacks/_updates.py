"""How far each layer moved in one step: snapshots before, norms after, sums over layers on the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_interp.functional.updates import copies, differences, relative_norm, tensor_norms


def parameter_layers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that each module owns itself, by its name; shared ones belong to the first owner.

    Parametrisations (weight norm) belong to the module that they are put on. The model itself has the name "".
    """
    layers: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            layers.setdefault(name.split(".parametrizations.")[0].removeprefix("parametrizations."), []).extend(own)
    return layers


def held_by(optimizers: Iterable[Any]) -> set[int]:
    """Ids of all parameters of the optimizers."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def largest_rate(optimizers: Iterable[Any]) -> float | Tensor:
    """Largest learning rate of all parameter groups; on the device where one is a tensor."""
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]
    tensors = [rate.detach().float().reshape(()) for rate in rates if isinstance(rate, Tensor)]
    numbers = [float(rate) for rate in rates if not isinstance(rate, Tensor)]
    if not tensors:
        return max(numbers, default=math.nan)
    device = tensors[0].device
    return torch.stack([rate.to(device) for rate in tensors]).max().clamp(min=max(numbers, default=-math.inf))


class UpdateProbe:
    """The parameters before and after one step.

    Args:
        model: The LightningModule, with `requires_grad` as it is at the start of the batch: manual optimisation turns
            it off in between.
        optimizers: All optimizers.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        held = held_by(optimizers)
        self.layers = parameter_layers(model)
        self.trainable = {name: float(any(p.requires_grad for p in own)) for name, own in self.layers.items()}
        self.in_optimizer = {name: float(any(id(p) in held for p in own)) for name, own in self.layers.items()}
        self.parameters = [p for own in self.layers.values() for p in own if p.requires_grad]
        self._free = [p for p in self.parameters if id(p) not in held]
        self._known = {id(p) for p in self.parameters}
        self._before: dict[int, Tensor] = {}
        self._taken: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []
        self._with_gradient: list[int] = []

    def before_step(self, optimizer: Any, scale: float = 1.0) -> bool:
        """Keeps the weights and the norms of the gradients of one optimizer; the first time in a batch counts.

        Args:
            optimizer: About to step.
            scale: What its gradients are multiplied with.

        Returns:
            Whether it has any gradient; without one its step means nothing.
        """
        own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._known]
        new = [p for p in own if id(p) not in self._before]
        gradients = [(p, p.grad) for p in new if p.grad is not None]
        if not gradients:
            return bool(own) and not new
        if not self._taken:
            new += self._free
        new = [p for p in new if not is_lazy(p)]
        with torch.no_grad():
            self._before.update(zip((id(p) for p in new), copies(new), strict=True))
            norms = tensor_norms([gradient for _, gradient in gradients])
            self._gradients.append(norms / scale if scale != 1 else norms)
        self._taken += new
        self._with_gradient += [id(p) for p, _ in gradients]
        return True

    def after_step(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[int, Tensor]] | None:
        """Norms of all that was snapshotted.

        Returns:
            Tensors for the backlog: `before`, `update` (P,), `gradient` (G,); notes that say which is whose; the
            updates by id of the parameter. None if no optimizer has stepped.
        """
        if not self._taken:
            return None
        with torch.no_grad():
            before = [self._before[id(p)] for p in self._taken]
            updates = differences(self._taken, before)
            device = self._gradients[0].device
            tensors = {
                "before": tensor_norms(before),
                "update": tensor_norms(updates),
                "gradient": torch.cat([norms.to(device) for norms in self._gradients]),
            }
        position = {id(p): index for index, p in enumerate(self._taken)}
        taken = {name: [position[id(p)] for p in own if id(p) in position] for name, own in self.layers.items()}
        weights = {
            name: [position[id(p)] for p in own if id(p) in position and p.ndim >= 2]
            for name, own in self.layers.items()
        }
        notes = {
            "layers": {name: indices for name, indices in taken.items() if indices},
            "weights": {name: indices for name, indices in weights.items() if indices},
            "graded": [position[key] for key in self._with_gradient],
            "held": [position[id(p)] for p in self._taken if id(p) not in {id(free) for free in self._free}],
        }
        return tensors, notes, dict(zip(position, updates, strict=True))


@dataclass
class Movement:
    """One probed step on the host; layers by name.

    Attributes:
        update_norm: Norm of the update of all parameters that a layer owns.
        update_ratio: Norm of the update over norm of the weights of two or more axes; without layers for which it is
            not defined (zeros that moved).
        gradient_norm: Norm of the gradient of these weights, before clipping; layers outside all optimizers have none.
        total_gradient: Norm of the gradient of all parameters.
        broken: Layers with a gradient or weight that is NaN or infinite.
    """

    update_norm: dict[str, float] = field(default_factory=dict)
    update_ratio: dict[str, float] = field(default_factory=dict)
    gradient_norm: dict[str, float] = field(default_factory=dict)
    total_gradient: float = 0.0
    broken: list[str] = field(default_factory=list)

    @property
    def median_ratio(self) -> float:
        """Median of the update ratios, NaN without any."""
        return median(self.update_ratio.values()) if self.update_ratio else math.nan

    @property
    def largest_ratio(self) -> float:
        """Largest of the update ratios, NaN without any."""
        return max(self.update_ratio.values(), default=math.nan)


def movement(values: dict[str, list[float]], notes: dict[str, Any]) -> Movement | None:
    """Sums the norms of `after_step` over layers.

    Returns:
        None for a step that mixed precision skipped: nothing moved, and a gradient was not finite.
    """
    before, update = values["before"], values["update"]
    gradient = dict(zip(notes["graded"], values["gradient"], strict=True))
    if not any(update) and not all(map(math.isfinite, gradient.values())):
        return None
    held = set(notes["held"])
    result = Movement(total_gradient=_norm(gradient.values()))
    for layer, indices in notes["layers"].items():
        if not layer:  # parameters of the LightningModule itself: they count in the total only
            continue
        result.update_norm[layer] = _norm(update[i] for i in indices)
        finite = [*(update[i] for i in indices), *(gradient.get(i, 0.0) for i in indices)]
        if not all(map(math.isfinite, finite)):
            result.broken.append(layer)
    for layer, indices in notes["weights"].items():
        if not layer:
            continue
        ratio = relative_norm(_norm(update[i] for i in indices), before_norm := _norm(before[i] for i in indices))
        if before_norm != 0 or ratio == 0:
            result.update_ratio[layer] = ratio
        if held.intersection(indices):
            result.gradient_norm[layer] = _norm(gradient.get(i, 0.0) for i in indices)
    return result


def _norm(parts: Iterable[float]) -> float:
    return math.sqrt(sum(part * part for part in parts))
