"""Calls a model with other numbers in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def places_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, one entry for each place that holds one.

    Other than in `named_parameters()`, a tensor that two modules share stands under both their names, and other than
    in `named_parameters(remove_duplicate=False)`, a module that has two names stands under the first only.
    """
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    }


def call_with(model: nn.Module, state: Mapping[str, Tensor], *args: Any) -> Any:
    """Calls the model with other tensors in these places, and puts its own back, also after an exception.

    Args:
        model: Any module.
        state: New tensors under the names of `places_of`. `functional_call` itself looks for the other names of a
            shared module, swaps it twice, and leaves the new tensors in it.
        args: For the model.
    """
    return torch.func.functional_call(model, dict(state), args, tie_weights=False)
