"""What has filters, and when the output of a filter has become its activation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lightning_interp.functional import ops
from lightning_interp.functional.layout import Layout


class End(NamedTuple):
    """The output of a layer with filters has become its activation.

    Attributes:
        unit: Name of the unit: of the layer in `named_modules()`, or of the block of a residual sum.
        activation: Name of the non-linearity, or None where something else ended the chain.
        tensor: The activation itself; must not be kept.
        layout: Where its channels are.
    """

    unit: str
    activation: str | None
    tensor: Tensor
    layout: Layout


Reader = Callable[[End], None]


@dataclass
class Unit:
    """What is known of a layer with filters, or of the non-linearity after a residual sum.

    Attributes:
        name: Name of the layer, or of the block that sums.
        kind: `conv`, `linear` or `sum`.
        num_filters: Channels.
        activations: Names of the non-linearities that end its branches; empty if there are none.
        layers: The layers that must be followed to see this unit.
    """

    name: str
    kind: Literal["conv", "linear", "sum"]
    num_filters: int
    activations: set[str] = field(default_factory=set)
    layers: frozenset[str] = frozenset()

    @property
    def counts(self) -> bool:
        """Whether it has filters by the definition: a linear layer or a sum needs a non-linearity behind it."""
        return self.kind == "conv" or bool(self.activations)

    @property
    def exact_zero(self) -> bool:
        """Whether each of its non-linearities has an exact zero."""
        return bool(self.activations) and self.activations <= ops.EXACT_ZERO


class Strand(NamedTuple):
    """A unit's channels inside a tensor, on the way to their non-linearity.

    Attributes:
        unit: Name of the unit, None past the non-linearity (the layout is still wanted, for a later sum).
        layout: Where the channels are.
        sources: The layers that it came from.
        call: Number of the layer's call within the forward.
    """

    unit: str | None
    layout: Layout
    sources: frozenset[str] = frozenset()
    call: int = 0


def sum_unit(units: dict[str, Unit], layers: frozenset[str], channels: int, *, new: bool) -> str | None:
    """Name of the unit for the sum of these layers' outputs, after the block that makes it.

    Args:
        units: Those known; a new one is added.
        layers: The layers whose outputs are summed.
        channels: Channels of the sum.
        new: Whether a sum that is not known may be added.

    Returns:
        What the names of the layers begin with, or `sum`, with a number where that is taken; None if it is not known.

    Example:
        >>> sum_unit({}, frozenset({"layer2.0.conv2", "layer2.0.downsample.0"}), 128, new=True)
        'layer2.0'
    """
    parts = [name.split(".")[:-1] for name in layers]
    block = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))
    base = ".".join(words[0] for words in block) or "sum"
    taken = itertools.count(2)
    name = base
    while name in units:
        unit = units[name]
        if unit.kind == "sum" and unit.layers == layers:
            unit.num_filters = channels  # the user may have put other layers in their place
            return name
        name = f"{base}#{next(taken)}"
    if not new:
        return None
    units[name] = Unit(name, "sum", channels, layers=layers)
    return name


def pruned_filters(model: nn.Module, layer: str) -> Tensor | None:
    """The filters of a layer that `torch.nn.utils.prune` has taken out whole: dead on purpose.

    Args:
        model: Holds the layer.
        layer: Its name in `named_modules()`; the block of a residual sum has no mask.

    Returns:
        (C,) of bool on the CPU, or None without a mask.
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:  # a sum that no module makes
        return None
    mask = getattr(module, "weight_mask", None)
    if not isinstance(mask, Tensor):
        return None
    axis = 1 if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0
    return (mask.detach().transpose(0, axis).flatten(1) == 0).all(1).cpu()
