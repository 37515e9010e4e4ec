"""Dead and dormant units by brute force over all training images: the label, measured by other means than ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

EXACT = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.hardtanh, torch.Tensor.relu}
SMOOTH = {F.gelu, F.silu}
DORMANT = 0.025  # Sokar et al. 2023


class Census(NamedTuple):
    """Largest share, over the activations of the network, of units that are dead or dormant.

    Dead: zero for all images, which a GELU is too where its input is far below zero. Dormant: GELU and SiLU only.
    """

    dead: float
    dormant: float


class _Listener(TorchFunctionMode):
    """Notes, for each call of an activation in order, the largest and the mean magnitude of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, Tensor, Tensor]] = []
        self._projected: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._projected = output
        if func in EXACT or func in SMOOTH:
            # What a linear layer gives has its units last, also in the four dimensions of a ConvNeXt block.
            units = output.dim() - 1 if args[0] is self._projected else 1
            rest = [axis for axis in range(output.dim()) if axis != units]
            self.seen.append((func in EXACT, output.abs().amax(rest), output.abs().mean(rest)))
        return output


@torch.no_grad()
def census(net: nn.Module, images: Tensor) -> Census:
    """Passes all images at once, in evaluation mode.

    A unit whose filter is pruned (a mask of zeros on the convolution before it) can't be dead.

    Args:
        net: Its activations must be among `EXACT` and `SMOOTH`; each is called once in a forward.
        images: (N, C, H, W).

    Returns:
        The shares, in [0, 1]; 0 where there is no such activation.
    """
    training = net.training
    net.eval()
    with _Listener() as listener:
        net(images)
    net.train(training)
    masks = _pruned(net)
    dead, dormant = [0.0], [0.0]
    for i, (exact, largest, magnitude) in enumerate(listener.seen):
        kept = masks[i] if i < len(masks) and len(masks) == len(listener.seen) else torch.ones_like(largest).bool()
        dead.append(float((largest <= 0)[kept].float().mean()))
        if not exact:
            dormant.append(float((magnitude <= DORMANT * magnitude.mean())[kept].float().mean()))
    return Census(max(dead), max(dormant))


def _pruned(net: nn.Module) -> list[Tensor]:
    """For each convolution which units are left."""
    masks = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            mask = getattr(module, "weight_mask", torch.ones_like(module.weight))
            masks.append(mask.flatten(1).sum(1) > 0)
    return masks
