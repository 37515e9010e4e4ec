"""Draws the patches of one layer: cut out of their images, projected, and the image made for each filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.scores import ScoreModel
from lightning_interp.functional.class_images import ascend
from lightning_interp.functional.patches import PatchRanking, project_patches
from lightning_interp.functional.reach import Units, channels_second, find_units, reach
from lightning_interp.functional.receptive_field import ReceptiveField, receptive_field
from lightning_interp.render.color import Pixels, denormalise
from lightning_interp.render.patches import Box, Excitement, cut, projection

_BATCH = 32
_IMAGE_AXES = 4
_LIMIT = "TopPatches shows whole images, or no projections, where it can't run the model on images"
BLANK: Pixels = np.full((1, 1, 3), 24, dtype=np.uint8)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Shown:
    """What is to be drawn.

    Attributes:
        layer: Name of the unit.
        ranking: Of its first filters, on the CPU; index -1 where nothing fires.
        images: Number of the image to (C, H, W), on the model's device.
        grid: Axes of the activation behind the channels.
    """

    layer: str
    ranking: PatchRanking
    images: dict[int, Tensor]
    grid: tuple[int, ...]


class LayerPictures:
    """Draws layers, and remembers their receptive fields.

    Attributes:
        fields: Layer to its receptive field, None for the whole image.
    """

    def __init__(self, k: int, mean: list[float] | None, std: list[float] | None, steps: int) -> None:
        """Takes the options.

        Args:
            k: Patches per filter.
            mean: As in `TopPatches`.
            std: As in `TopPatches`.
            steps: For the images made for filters; 0 makes none.
        """
        self.fields: dict[str, ReceptiveField | None] = {}
        self._architecture = ""
        self._units: Units | None = None
        self._told: set[tuple[str, type[BaseException]]] = set()
        self._k, self._mean, self._std, self._steps = k, mean, std, steps

    def draw(self, model: nn.Module, shown: Shown, say: Say) -> list[Excitement]:
        """One block a filter."""
        names = [f"f{index}" for index in range(len(shown.ranking.values))]
        if not shown.images:
            return [Excitement(name) for name in names]
        numbers = list(shown.images)
        images = torch.stack([shown.images[number] for number in numbers])
        if images.ndim != _IMAGE_AXES:
            raise UnreadableError(f"Expected images (N, C, H, W), but got a tensor of shape {tuple(images.shape)}.")
        pictures = dict(zip(numbers, denormalise(images.float().cpu().numpy(), self._mean, self._std), strict=True))
        field = self._field(model, shown, tuple(images.shape[1:]), say)
        projections = self._project(model, shown, say)
        made = self._maximise(model, shown, images, say) if self._steps else None
        blocks = []
        for row, name in enumerate(names):
            block = Excitement(name, maximised=None if made is None else made[row])
            for place, index in enumerate(shown.ranking.indices[row].tolist()):
                if index >= 0:
                    box = _box(field, shown.grid, int(shown.ranking.positions[row, place]))
                    block.patches.append(cut(pictures[index], box))
                    if projections is not None:
                        block.projections.append(_projected(projections[row, place], box))
            if block.patches:
                block.caption = f"{name}  {float(shown.ranking.values[row, 0]):.3g}"
            blocks.append(block)
        return blocks

    def _field(self, model: nn.Module, shown: Shown, shape: tuple[int, ...], say: Say) -> ReceptiveField | None:
        """Depends on the architecture only: found once, and again where the user has changed that."""
        if self._architecture != (now := repr(model)):
            self._architecture, self._units = now, None
            self.fields.clear()
        if shown.layer not in self.fields:
            try:
                self.fields[shown.layer] = receptive_field(model, shown.layer, shape)
            except Exception as error:  # a forward that takes something else than images
                self.fields[shown.layer] = None
                self._tell(_LIMIT, error, say)
        field = self.fields[shown.layer]
        return field if field is not None and len(field.size) == len(shown.grid) else None

    def _project(self, model: nn.Module, shown: Shown, say: Say) -> dict[tuple[int, int], Tensor] | None:
        """(filter, place) to (C, H, W)."""
        places = [tuple(place) for place in (shown.ranking.indices >= 0).nonzero().tolist()]
        call = ScoreModel(model)
        found: dict[tuple[int, int], Tensor] = {}
        try:
            for start in range(0, len(places), _BATCH):
                part = places[start : start + _BATCH]
                images = torch.stack([shown.images[int(shown.ranking.indices[place])] for place in part])
                images = images if images.is_floating_point() else images.float()  # bytes have no gradient
                filters = torch.tensor([row for row, _ in part])
                positions = torch.stack([shown.ranking.positions[place] for place in part])
                units = self._known_units(model, images, call)
                gradients, _ = project_patches(model, images, shown.layer, filters, positions, units=units, call=call)
                found.update(zip(part, gradients.float().cpu(), strict=True))
        except Exception as error:  # a forward that takes something else than images
            self._tell(_LIMIT, error, say)
            return None
        return found

    def _tell(self, what: str, error: Exception, say: Say) -> None:
        """Once for each kind of error: of another layer its text holds other sizes."""
        root = error.__cause__ or error
        if (what, type(root)) not in self._told:
            self._told.add((what, type(root)))
            say(f"{what} ({type(root).__name__}: {root}).")

    def _known_units(self, model: nn.Module, images: Tensor, call: ScoreModel) -> Units:
        """Found by a whole forward: not for each layer anew."""
        if self._units is None:
            with undisturbed(model, training=False):
                self._units = find_units(model, images[:1].repeat(2, 1, 1, 1), call=call)
        return self._units

    def _maximise(self, model: nn.Module, shown: Shown, images: Tensor, say: Say) -> Pixels | None:
        """One image a filter, by the mean of its activation over all positions."""
        count = len(shown.ranking.values)
        call = ScoreModel(model)
        rows = torch.arange(count, device=images.device)
        try:
            with undisturbed(model, training=False, gradients=True):
                units = self._known_units(model, images, call)

                def objective(made: Tensor) -> Tensor:
                    activation = channels_second(reach(model, made, shown.layer, units, call=call), count)
                    return activation[rows, rows].reshape(count, -1).mean(1)

                made = ascend(
                    objective,
                    count,
                    data=images,
                    steps=self._steps,
                    method="fourier",
                    seed=0,
                    penalty=0.0,
                    contrast=50.0,
                )
        except Exception as error:  # a forward that takes something else than images
            self._tell("TopPatches makes no images for filters", error, say)
            return None
        together: Any = torch.cat((images.to(made), made)).float().cpu().numpy()
        return denormalise(together, self._mean, self._std)[len(images) :]


def _box(field: ReceptiveField | None, grid: tuple[int, ...], position: int) -> Box | None:
    if field is None:
        return None
    rows, columns = field.box([int(i) for i in np.unravel_index(position, grid)])
    return rows, columns


def _projected(gradient: Tensor, box: Box | None) -> Pixels:
    """The scale is that of what is shown; outside the receptive field the gradient is zero anyway."""
    return cut(projection(gradient.numpy()), box)
