"""What `Influence` draws: images beside what was computed of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_interp.callbacks._embedded import Embedded, Lenient
from lightning_interp.callbacks._influential import Effect, Hanging, Influential
from lightning_interp.callbacks._points import Points
from lightning_interp.functional.embeddings import EmbeddingPlace, embedding_tap
from lightning_interp.functional.influence_perturbation import perturbation_direction
from lightning_interp.render.color import Pixels, denormalise
from lightning_interp.render.influence import Influenced, LeftOut
from lightning_interp.render.perturbation import MAX_PAIRS, Perturbed

_IMAGE_AXES = 3
_DARK: Pixels = np.zeros((1, 1, 3), dtype=np.uint8)


class Side(NamedTuple):
    """The training points, or the test points, with the images of those that are shown.

    Attributes:
        points: Which samples they are.
        embedded: What the model makes of them.
        images: Row to its image (C, H, W), as the model receives it.
        pictures: Row to the same as it is seen.
    """

    points: Points
    embedded: Embedded
    images: dict[int, Tensor]
    pictures: dict[int, Pixels]

    def label(self, row: int) -> int:
        """Class of a point."""
        return int(self.embedded.labels[row])


def pictures(images: Sequence[Tensor], mean: Sequence[float] | None, std: Sequence[float] | None) -> list[Pixels]:
    """Images (C, H, W) as they are seen, all stretched alike where they are of one size; what is none is left dark."""
    if not all(map(is_picture, images)):
        return [_DARK for _ in images]
    if not images:
        return []
    if len({image.shape for image in images}) == 1:
        return list(denormalise(torch.stack(list(images)).float().numpy(), mean, std))
    return [denormalise(image[None].float().numpy(), mean, std)[0] for image in images]


def is_picture(image: Tensor) -> bool:
    """Whether it can be drawn, other than a signal (C, L) or a volume (C, D, H, W)."""
    return image.ndim == _IMAGE_AXES


def influenced(tests: Sequence[Hanging], train: Side, test: Side, name: Callable[[int], str]) -> list[Influenced]:
    """The test points with what they hang on, for the sheet and the table.

    Args:
        tests: The influences.
        train: The training points.
        test: The test points.
        name: Names a class.
    """

    def left_out(effects: list[Effect]) -> list[LeftOut]:
        indices = train.points.indices
        return [
            LeftOut(train.pictures[e.row], indices[e.row], name(train.label(e.row)), e.predicted, e.actual)
            for e in effects
        ]

    return [
        Influenced(
            test.pictures[each.row],
            test.points.indices[each.row],
            name(test.label(each.row)),
            name(each.predicted),
            each.loss,
            left_out(each.helpful),
            left_out(each.harmful),
        )
        for each in tests
    ]


def perturbed(  # noqa: PLR0913, PLR0917 - a model, where to listen to it, and what the pictures are made of
    model: nn.Module,
    place: EmbeddingPlace,
    found: Influential,
    train: Side,
    test: Side,
    name: Callable[[int], str],
) -> list[Perturbed]:
    """For the first test images the most helpful training image, and how changing it would raise the test loss.

    Args:
        model: The user's model; to be called inside `undisturbed`, with gradients.
        place: Of the embedding.
        found: The influences.
        train: The training points.
        test: The test points.
        name: Names a class.
    """
    scored = Lenient(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def embed(images: Tensor) -> Tensor:
        with embedding_tap(scored, place) as tap:
            scored(images)
            return found.features(tap.rows(len(images)).cpu())

    pairs = []
    for each in [hanging for hanging in found.tests if hanging.helpful][:MAX_PAIRS]:
        row, labels = each.helpful[0].row, (train.label(each.helpful[0].row), test.label(each.row))
        classes = found.class_of(torch.tensor(labels)).tolist()
        image, asked = train.images[row].to(device).float(), found.features(test.embedded.rows[each.row])
        direction = perturbation_direction(embed, image, classes[0], found.influence, asked, classes[1])
        drawn, change, seen = (
            tensor.detach().float().cpu().numpy() for tensor in (image, direction, test.images[each.row])
        )
        indices = train.points.indices[row], test.points.indices[each.row]
        pairs.append(Perturbed(drawn, change, seen, indices[0], name(labels[0]), indices[1], name(labels[1])))
    return pairs


def rows_shown(tests: Sequence[Hanging]) -> list[int]:
    """Rows of the training points that appear in the pictures, each once."""
    return sorted({effect.row for each in tests for effect in (*each.helpful, *each.harmful)})
