"""How far each parameter moved in one step: snapshots before, norms after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_interp.functional.updates import copies, steps_back, tensor_norms


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


def largest_decay(optimizers: Iterable[Any]) -> float:
    """Largest weight decay of all parameter groups; 0 if none has one, NaN if one is on the device."""
    decays = [group.get("weight_decay") for optimizer in optimizers for group in optimizer.param_groups]
    if any(isinstance(decay, Tensor) for decay in decays):
        return math.nan
    return max((float(decay) for decay in decays if decay is not None), default=0.0)


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
            way back by id of the parameter, before minus after. None if no optimizer has stepped.
        """
        if not self._taken:
            return None
        with torch.no_grad():
            before = [self._before[id(p)] for p in self._taken]
            lengths, device = tensor_norms(before), self._gradients[0].device
            back = steps_back(before, self._taken)
            tensors = {
                "before": lengths,
                "update": tensor_norms(back),
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
        return tensors, notes, dict(zip(position, back, strict=True))
