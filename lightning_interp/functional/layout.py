"""Where the channels of a filter layer lie in a tensor, followed through reshapes and permutations.

The channel axis is found, not assumed: (N, C, H, W), (N, H, W, C) after a permutation, (N, C*H*W) after `flatten`, a
slice of a concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_interp.functional import ops


class Layout(NamedTuple):
    """Channels c = 0 .. size-1 stand at index (p, start + c, r) of axis `axis`, seen as (outer, width, inner).

    Attributes:
        axis: Axis of the tensor that holds the channels, from 0.
        start: First channel within `width`.
        size: Number of channels.
        width: Channels on this axis in all, those of others in a concatenation included.
        outer: Positions merged into the axis before the channels.
        inner: Positions merged into the axis after the channels.
    """

    axis: int
    start: int
    size: int
    width: int
    outer: int = 1
    inner: int = 1

    def channels_first(self, tensor: Tensor) -> Tensor:
        """(P, C, Q): everything before the channels, the channels, everything after; a view where strides allow."""
        shape = tensor.shape
        before, after = math.prod(shape[: self.axis]) * self.outer, self.inner * math.prod(shape[self.axis + 1 :])
        channels = tensor.reshape(before, self.width, after)
        return channels if self.size == self.width else channels.narrow(1, self.start, self.size)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can have the layout."""
        return self.axis < len(shape) and shape[self.axis] == self.outer * self.width * self.inner


def reshaped(layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout | None:
    """The layout after a reshape, or None when the channels end up spread over several axes.

    Example:
        >>> reshaped(Layout(1, 0, 8, 8), (2, 8, 3, 3), (2, 72))
        Layout(axis=1, start=0, size=8, width=8, outer=1, inner=9)
        >>> reshaped(Layout(1, 0, 8, 8), (2, 8, 3, 3), (2, 4, 2, 3, 3)) is None
        True
    """
    before = math.prod(old[: layout.axis]) * layout.outer
    after = layout.inner * math.prod(old[layout.axis + 1 :])
    if math.prod(old) == 0:
        return None
    if layout.width == 1 and new:  # a single channel is everything, however it is cut
        return layout._replace(axis=0, outer=new[0], inner=1)
    lead = 1
    for axis, size in enumerate(new):
        tail = math.prod(new[axis + 1 :])
        if before % lead == 0 and after % tail == 0 and (before // lead) * layout.width * (after // tail) == size:
            return layout._replace(axis=axis, outer=before // lead, inner=after // tail)
        lead *= size
    return None


def permuted(layout: Layout, name: str, ndim: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """The layout after `permute`, `transpose` or `movedim` with these arguments (the tensor itself left out)."""
    if name == "permute":
        dims = args[0] if args and isinstance(args[0], Sequence) else args or kwargs.get("dims", ())
        order = [int(dim) % ndim for dim in dims]
    else:
        first = args[0] if args else kwargs.get("dim0", kwargs.get("axis0", kwargs.get("source")))
        second = args[1] if len(args) > 1 else kwargs.get("dim1", kwargs.get("axis1", kwargs.get("destination")))
        if name == "movedim":
            order = _after_movedim(ndim, first, second)
        elif not isinstance(first, int) or not isinstance(second, int):
            return None  # named axes
        else:
            order = list(range(ndim))
            order[first], order[second] = order[second], order[first]
    return layout._replace(axis=order.index(layout.axis)) if sorted(order) == list(range(ndim)) else None


def _after_movedim(ndim: int, source: int | Sequence[int], destination: int | Sequence[int]) -> list[int]:
    sources, targets = ((ends,) if isinstance(ends, int) else ends for ends in (source, destination))
    moved = {target % ndim: origin % ndim for origin, target in zip(sources, targets, strict=True)}
    others = iter([axis for axis in range(ndim) if axis not in moved.values()])
    return [moved[axis] if axis in moved else next(others) for axis in range(ndim)]


def reduced(layout: Layout, ndim: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """The layout after a reduction over positions; None when the channels are reduced as well."""
    dims = args[0] if args else kwargs.get("dim")
    if dims is None:
        return None
    gone = {int(dim) % ndim for dim in (dims if isinstance(dims, Sequence) else (dims,))}
    if layout.axis in gone:
        return None
    keep = bool(args[1] if len(args) > 1 else kwargs.get("keepdim", False))
    return layout if keep else layout._replace(axis=layout.axis - sum(dim < layout.axis for dim in gone))


def mover(
    name: str, shape: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Layout, Tensor], Layout | None] | None:
    """How an operation moves the channels; None when it is not one of those that keep a filter's output its own."""
    if name in ops.KEEP or name in ops.SUMS or name in ops.PRODUCTS:
        return lambda layout, result: layout
    if name in ops.RESHAPES:
        return lambda layout, result: reshaped(layout, shape, result.shape)
    if name in {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}:
        kind = "movedim" if name == "moveaxis" else name
        return lambda layout, result: permuted(layout, kind, len(shape), args, kwargs)
    if name in ops.POOLING_REDUCTIONS:
        return lambda layout, result: reduced(layout, len(shape), args, kwargs)
    return None
