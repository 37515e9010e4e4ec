"""What has filters, and when the output of a filter has become its activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

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
    """

    unit: str | None
    layout: Layout
