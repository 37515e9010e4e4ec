"""Which part of the image one position of a layer can see, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp._options import expected
from lightning_interp.functional.linearised import IrregularError, Linearised, positive_state
from lightning_interp.functional.own_state import call_with, places_of
from lightning_interp.functional.reach import Units, channels_second, check_layer, find_units, reach
from lightning_interp.functional.undisturbed import undisturbed

# A canvas grows by multiples of this: padding that depends on the size of the image stays as it is.
_STEP = 64
# A single image would look like a constant of the model.
_IMAGES = 2
# A canvas of this many times the image, and no less pixels than this, that a position still sees to the border:
# then all positions see all of the image.
_LARGEST, _LONGEST = 4, 1024


class ReceptiveField(NamedTuple):
    """What one position of a layer sees, per axis of the image: position i sees `size` pixels from i * jump + start.

    Attributes:
        size: Pixels, per axis.
        jump: Pixels from one position to the next, per axis.
        start: First pixel that position 0 sees, per axis; negative where that lies in the padding.
    """

    size: tuple[int, ...]
    jump: tuple[int, ...]
    start: tuple[int, ...]

    def box(self, position: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(first, one past the last) pixel per axis that this position sees; may lie outside the image.

        Example:
            >>> ReceptiveField((3, 3), (2, 2), (-1, -1)).box((0, 4))
            ((-1, 2), (7, 10))
        """
        firsts = [i * jump + start for i, jump, start in zip(position, self.jump, self.start, strict=True)]
        return tuple((first, first + size) for first, size in zip(firsts, self.size, strict=True))


def receptive_field(model: nn.Module, layer: str, image_shape: Sequence[int]) -> ReceptiveField | None:
    """The exact receptive field of a layer's activation, by a gradient through a linearised copy of the model.

    The copy has positive weights in float64 and no non-linearities (`functional/linearised.py`), so the gradient of a
    position is non-zero exactly where it can see. The image is enlarged until what a position in the middle sees does
    not touch the border.

    Args:
        model: Any module that takes images; nothing of it is changed.
        layer: Name in `model.named_modules()`: a layer with filters, whose activation counts, or any other module,
            whose output counts.
        image_shape: (C, *sides) of one image.

    Returns:
        Sizes in pixels, or None: the whole image. That is so behind global pooling, attention or
        squeeze-and-excitation, in linear layers behind them, and is also said where positions see regions of
        different size (behind upsampling), and where the model refuses larger images.

    Raises:
        ArgumentError: If the model has no such layer.

    Cost: about ten forwards and backwards of one image with one channel a group.
    Source: Araujo, Norris and Sim 2019 (Distill), for what is measured; by gradient instead of layer by layer, since
        that also holds for branches, functional pooling and padding of any kind.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))
        >>> receptive_field(net, "3", (1, 28, 28))
        ReceptiveField(size=(8, 8), jump=(2, 2), start=(-1, -1))
    """
    if len(image_shape) < 2 or min(image_shape) < 1:
        raise expected("image_shape", "(channels, *sides)", tuple(image_shape))
    probe = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with undisturbed(model, training=False, gradients=True):
        units = find_units(model, torch.zeros(_IMAGES, *image_shape, dtype=probe.dtype, device=probe.device))
        check_layer(model, layer, units)
        try:
            copy = _Copy(model, layer, units, tuple(image_shape))
            axes = [_axis(copy, axis) for axis in range(len(image_shape) - 1)] if copy.has_grid else [None]
        except IrregularError:
            return None
    if any(found is None for found in axes):
        return None
    size, jump, start = zip(*(found for found in axes if found is not None), strict=True)
    return ReceptiveField(size, jump, start)


class _Copy:
    """The linearised model, on canvases of any size."""

    def __init__(self, model: nn.Module, layer: str, units: Units, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._model, self._layer, self._units = model, layer, units
        self._state = positive_state(places_of(model))
        self._pools: list[tuple[tuple[int, ...], tuple[int, ...]]] | None = None
        self.has_grid = self._is_grid()
        if not self.has_grid and layer in dict(model.named_modules()):
            # Flattened before anything else came: the layer's own output still has its positions.
            self._units, self._pools = {}, None
            self.has_grid = self._is_grid()

    def _is_grid(self) -> bool:
        image, activation = self.run(self.shape[1:])
        return activation.ndim == image.ndim

    def run(self, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A positive batch with these sides, and the activation (N, C, *grid) of the layer."""
        device = next((value.device for value in self._state.values()), torch.device("cpu"))
        image = torch.ones(_IMAGES, self.shape[0], *sides, dtype=torch.float64, device=device, requires_grad=True)
        with Linearised(self._pools) as mode:
            reached = reach(self._model, image, self._layer, self._units, call=self._call)
        if self._pools is None:
            self._pools = mode.pools
        return image, channels_second(reached, _IMAGES)

    def _call(self, image: Tensor) -> object:
        return call_with(self._model, self._state, image)


def _axis(copy: _Copy, axis: int) -> tuple[int, int, int] | None:
    """(size, jump, start) along one axis of the image, None for the whole image.

    The canvas grows along this axis only, so the cost grows with its length and not with its area.
    """
    side = copy.shape[1 + axis]
    longest = max(_LONGEST, _LARGEST * side)
    step, last, ones = _STEP, None, 0
    canvas = side
    while canvas <= 2 * longest + step:
        try:
            positions, found = _measure(copy, axis, canvas)
        except IrregularError:
            raise
        except Exception:  # the model takes images of its own size only
            return None
        ones += positions == 1
        if ones == 3 or (found is None and canvas > longest):  # nothing grows with the image, or too far
            return None
        # Twice the same: holes in what a position sees could have hidden that it touches the border.
        if found is not None and found == last:
            if step % found[1] == 0:
                return found
            step, last, canvas = math.lcm(step, found[1]), None, side
            continue
        last = found
        canvas = side + max(step, 2 * (canvas - side))
    return None


def _measure(copy: _Copy, axis: int, canvas: int) -> tuple[int, tuple[int, int, int] | None]:
    """Number of positions, and (size, jump, start) unless what is seen touches the border of this canvas."""
    sides = list(copy.shape[1:])
    sides[axis] = canvas
    image, activation = copy.run(sides)
    positions = activation.shape[2 + axis]
    middle = [count // 2 for count in activation.shape[2:]]
    if positions < 4:
        return positions, None
    boxes = []
    for offset in range(3):
        middle[axis] = positions // 2 - 1 + offset
        here = activation[0]
        for index in middle:
            here = here[:, index]
        seen = _seen(image, here.sum(), axis)
        if seen is None or seen[0] == 0 or seen[1] == canvas:
            return positions, None
        boxes.append(seen)
    jumps = {after[0] - before[0] for before, after in pairwise(boxes)}
    sizes = {end - first for first, end in boxes}
    if len(jumps) > 1 or len(sizes) > 1 or min(jumps) < 1:
        raise IrregularError("neighbouring positions see regions of different size, or the same one")
    jump, size = jumps.pop(), sizes.pop()
    return positions, (size, jump, boxes[0][0] - (positions // 2 - 1) * jump)


def _seen(image: Tensor, output: Tensor, axis: int) -> tuple[int, int] | None:
    """(first, one past the last) index along the axis with a gradient; None where there is none at all."""
    if not output.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(output, image, retain_graph=True, allow_unused=True)
    if gradient is None:
        return None
    others = [dim for dim in range(gradient.ndim) if dim != 2 + axis]
    indices = gradient.abs().sum(others).nonzero().flatten().tolist()
    return (indices[0], indices[-1] + 1) if indices else None
