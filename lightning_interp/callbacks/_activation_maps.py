"""The activation maps of a few images, as pictures: one for each image and each unit that has positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from lightning_interp.callbacks.batches import call_with_images
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.functional.tracing import ActivationTracer, End
from lightning_interp.render.color import Pixels, denormalise
from lightning_interp.render.maps import activation_grid

_MAX_CHANNELS = 64
_IMAGE_AXES = 4

Drawings = dict[str, Callable[[], Pixels]]


def activation_maps(
    model: nn.Module,
    images: Tensor,
    wanted: Callable[[str], bool],
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> list[Drawings]:
    """Passes images through a model, which is left undisturbed, and keeps what its units make of them.

    Args:
        model: `model(images)`.
        images: (N, C, H, W) on the device of the model; of other shapes none is shown beside its maps.
        wanted: Whether to keep the maps of the unit of this name.
        mean: Per channel, to show normalised images in true colours.
        std: Per channel, likewise.

    Returns:
        For each image the unit to what draws its maps; up to 64 channels of each.

    Raises:
        NoScoresError: If the model can't be called with them.
    """
    maps = _Maps()
    with undisturbed(model, training=False), ActivationTracer(model, maps.read) as tracer:
        output = call_with_images(model, images)
    del output
    if tracer.error is not None:
        raise tracer.error
    shown = images.float().cpu().numpy()
    colours = denormalise(shown, mean, std) if shown.ndim == _IMAGE_AXES else [None] * len(shown)
    chosen = {name: values for name, values in maps.by_unit.items() if wanted(name)}
    return [
        {name: partial(_picture, values[index], image) for name, values in chosen.items()}
        for index, image in enumerate(colours)
    ]


class _Maps:
    """Keeps the activation maps of units that have positions."""

    def __init__(self) -> None:
        self.by_unit: dict[str, Tensor] = {}

    def read(self, end: End) -> None:
        """Keeps (N, C, h, w) of the first branch of each unit; of volumes the slice in the middle."""
        layout = end.layout
        spatial = end.tensor.ndim > 2 and layout.outer == layout.inner == 1
        if end.activation is not None and spatial and end.unit not in self.by_unit:
            shown = end.tensor.movedim(layout.axis, 1).narrow(1, layout.start, min(layout.size, _MAX_CHANNELS))
            while shown.ndim > _IMAGE_AXES:
                shown = shown.select(2, shown.shape[2] // 2)
            self.by_unit[end.unit] = shown.clone()


def _picture(maps: Tensor, image: Pixels | None) -> Pixels:
    return activation_grid(maps.float().cpu().numpy(), image)
