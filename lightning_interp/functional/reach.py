"""Runs a model as far as the activation of one layer, and no further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_interp._options import select
from lightning_interp.functional.hooks import QuietHook
from lightning_interp.functional.layout import Layout
from lightning_interp.functional.strands import StrandBook
from lightning_interp.functional.tracing import ActivationTracer, End
from lightning_interp.functional.units import Strand, Unit

Units = dict[str, Unit]

# How PyTorch's channels lie in what a module that is no layer with filters returns: (N, C, ...).
_CHANNELS_SECOND = 1


class Reached(NamedTuple):
    """The activation of one layer.

    Attributes:
        tensor: As the model has it, with its graph where autograd records.
        layout: Where its channels are.
    """

    tensor: Tensor
    layout: Layout


class _Stop(BaseException):
    """Ends a forward; no `Exception`, so that no handler of the model's or of the tracer's catches it."""

    def __init__(self, reached: Reached) -> None:
        super().__init__()
        self.reached = reached


class _StoppingBook(StrandBook):
    """Leaves the forward with the first activation of one unit, which still has its graph."""

    def __init__(self, units: Units, wanted: str) -> None:
        super().__init__(units, _ignore)
        self._wanted = wanted

    def hand_over(self, strand: Strand, activation: str | None, tensor: Tensor) -> None:
        """Stops, if it is the one."""
        if strand.unit == self._wanted and strand.layout.fits(tensor.shape) and tensor.numel():
            raise _Stop(Reached(tensor, strand.layout))


class _StoppingTracer(ActivationTracer):
    """Follows all layers: what a shortcut adds must be known as a map, or the sum is not seen."""

    def __init__(self, model: nn.Module, unit: str, units: Units) -> None:
        super().__init__(model, _ignore, units=units)
        self._book = _StoppingBook(self.units, unit)


def find_units(model: nn.Module, images: Tensor, *, call: Callable[[Tensor], Any] | None = None) -> Units:
    """All layers with filters that the forward of these images reaches; the model must be kept undisturbed outside.

    Two images at least: what has one entry on the axis of the images counts as a constant of the model.
    """
    units: Units = {}
    with torch.no_grad(), ActivationTracer(model, _ignore, units=units) as tracer:
        output = (call or model)(images)
    del output  # a last layer is read when the tracer is left, and must live until then
    if tracer.error is not None:
        raise tracer.error
    return units


def check_layer(model: nn.Module, layer: str, units: Units) -> None:
    """Refuses what is neither a layer with filters nor a module.

    Raises:
        ArgumentError: With a suggestion.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer not in units and layer not in names:
        select("layer", [layer], names)  # raises


def reach(
    model: nn.Module, images: Tensor, layer: str, units: Units, *, call: Callable[[Tensor], Any] | None = None
) -> Reached:
    """The activation of `layer`: of its filters where it has any, else what the module returns.

    The forward is left there: what comes behind costs nothing and may not even fit.

    Args:
        model: Any module, kept undisturbed outside.
        images: (N, ...).
        layer: Name of a unit or a module.
        units: From `find_units`.
        call: How to run the model, if not by calling it.

    Raises:
        RuntimeError: If the forward does not get there.
    """
    unit, call = units.get(layer), model if call is None else call
    try:
        if unit is not None and unit.counts:
            with _StoppingTracer(model, layer, dict(units)) as tracer:
                output = call(images)
            del output
            if tracer.error is not None:
                raise tracer.error
        else:
            handle = _stop_behind(model.get_submodule(layer))
            try:
                call(images)
            finally:
                handle.remove()
    except _Stop as stop:
        return stop.reached
    raise RuntimeError(f"The forward of these images does not reach the layer {layer!r}.")


def channels_second(reached: Reached, num_images: int) -> Tensor:
    """(N, C, *grid): the grid keeps the axes of the activation, except where it was flattened into the channels.

    Raises:
        ValueError: If the activation's first axis is not that of the images.
    """
    tensor, layout = reached
    shape = tensor.shape
    if layout.axis == 0 or shape[0] != num_images:
        raise ValueError(
            f"Expected an activation whose first axis is that of the {num_images} images, but got {tuple(shape)}."
        )
    before, after = shape[1 : layout.axis], shape[layout.axis + 1 :]
    split = tensor.reshape(shape[0], *before, layout.outer, layout.width, layout.inner, *after)
    channels = split.movedim(len(before) + 2, 1).narrow(1, layout.start, layout.size)
    inner = 2 + len(before) + 1
    squeezed = [axis for axis, size in ((inner - 1, layout.outer), (inner, layout.inner)) if size == 1]
    return channels.squeeze(squeezed) if squeezed else channels


def _stop_behind(module: nn.Module) -> RemovableHandle:
    def stop(_: nn.Module, args: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else next(item for item in output if isinstance(item, Tensor))
        axis = min(_CHANNELS_SECOND, tensor.ndim - 1)
        raise _Stop(Reached(tensor, Layout(axis, 0, tensor.shape[axis], tensor.shape[axis])))

    return module.register_forward_hook(QuietHook(stop))


def _ignore(end: End) -> None:
    """Reads nothing."""
