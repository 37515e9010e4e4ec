"""Real and generated images, small enough for runs of seconds."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

TRAIN, VAL, SIDE = 1200, 300, 12


class Data(NamedTuple):
    """Images with zero mean and unit standard deviation.

    Attributes:
        images, targets: (N, C, H, W) and (N,) classes, or (N, 2) numbers for a regression.
        val_images, val_targets: Likewise.
        outputs: Classes, or numbers to regress.
    """

    images: Tensor
    targets: Tensor
    val_images: Tensor
    val_targets: Tensor
    outputs: int

    @property
    def regression(self) -> bool:
        """Whether the targets are numbers."""
        return self.targets.is_floating_point()

    @property
    def guess(self) -> float:
        """Loss of a model that has learned nothing: ln C, or the variance of the targets."""
        return float(self.targets.var(0).mean()) if self.regression else math.log(self.outputs)


def load(name: str) -> Data:
    """`digits`: 1,797 real ones, 8x8. `photos`: from which of two photographs and which quarter of it a crop is.

    `positions`: where in its photograph a crop is (regression). `textures`: three gratings and three shapes in noise.
    `glyphs`: eight letters in all faces of the fonts that matplotlib ships. `turns`: by how many right angles a crop
    of a photograph was turned. `zooms`: at which of four scales a crop was taken. `counts`: one to five discs in noise.
    """
    return {
        "digits": _digits, "photos": _photos, "positions": _positions, "textures": _textures, "glyphs": _glyphs,
        "turns": _turns, "zooms": _zooms, "counts": _counts,
    }[name]()  # fmt: skip


def _split(images: Tensor, targets: Tensor, train: int, outputs: int) -> Data:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], targets[order]
    images = (images - images[:train].mean()) / images[:train].std()
    return Data(images[:train], targets[:train], images[train:], targets[train:], outputs)


@cache
def _digits() -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    return _split(images, torch.tensor(digits.target), TRAIN, 10)


@cache
def _crops(shrink: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of the photographs made so many times smaller, (N, 3, SIDE, SIDE), the photograph of each, and its place.

    A place is (N, 2) in [0, 1].
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(1)
    crops, places, sources = [], [], []
    for source, photo in enumerate(load_sample_images().images):
        small = F.avg_pool2d(torch.tensor(photo.copy()).float().permute(2, 0, 1)[None], shrink)[0]
        room = torch.tensor(small.shape[1:]) - SIDE
        for _ in range((TRAIN + VAL) // 2):
            place = torch.rand(2, generator=generator)
            row, column = (place * room).round().long().tolist()
            crops.append(small[:, row : row + SIDE, column : column + SIDE])
            places.append(place)
            sources.append(source)
    return torch.stack(crops), torch.tensor(sources), torch.stack(places)


@cache
def _photos() -> Data:
    crops, sources, places = _crops()
    quarter = (places > 0.5).long()
    return _split(crops, 4 * sources + 2 * quarter[:, 0] + quarter[:, 1], TRAIN, 8)


@cache
def _positions() -> Data:
    crops, _, places = _crops()
    return _split(crops, (places - 0.5) * math.sqrt(12), TRAIN, 2)


@cache
def _turns() -> Data:
    crops, _, _ = _crops(12)  # large enough a part of the scene to tell which way is up
    turns = torch.randint(4, (len(crops),), generator=torch.Generator().manual_seed(5))
    turned = [torch.rot90(crop, int(turn), (1, 2)) for crop, turn in zip(crops, turns, strict=True)]
    return _split(torch.stack(turned), turns, TRAIN, 4)


@cache
def _zooms() -> Data:
    scales = [_crops(shrink)[0] for shrink in (3, 6, 12, 20)]
    zooms = torch.randint(len(scales), (TRAIN + VAL,), generator=torch.Generator().manual_seed(7))
    return _split(torch.stack([scales[zoom][i] for i, zoom in enumerate(zooms.tolist())]), zooms, TRAIN, len(scales))


@cache
def _counts() -> Data:
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(5, (TRAIN + VAL,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    cells = torch.tensor([(row, column) for row in (2, 6, 10) for column in (2, 6, 10)])
    images = []
    for label in labels.tolist():
        image = 0.4 * torch.randn(SIDE, SIDE, generator=generator)
        for row, column in cells[torch.randperm(len(cells), generator=generator)[: label + 1]].tolist():
            shift, size = (
                torch.rand(2, generator=generator) - 0.5,
                1.2 + 0.8 * float(torch.rand(1, generator=generator)),
            )
            image += 1.0 * ((rows - row - shift[0]) ** 2 + (columns - column - shift[1]) ** 2 < size**2)
        images.append(image)
    return _split(torch.stack(images)[:, None], labels, TRAIN, 5)


@cache
def _glyphs() -> Data:
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    letters, generator = "ABEFRSgk", torch.Generator().manual_seed(6)
    faces = sorted(
        path for path in (Path(get_data_path()) / "fonts/ttf").glob("DejaVu*.ttf") if "Display" not in path.name
    )
    labels = torch.randint(len(letters), (TRAIN + VAL,), generator=generator)
    images = []
    for label in labels.tolist():
        face, size, x, y, turn = torch.rand(5, generator=generator).tolist()
        canvas = Image.new("L", (3 * SIDE, 3 * SIDE))
        font = ImageFont.truetype(faces[int(face * len(faces))], int(20 + 10 * size))
        place = (3 * SIDE * (0.4 + 0.2 * x), 3 * SIDE * (0.4 + 0.2 * y))
        ImageDraw.Draw(canvas).text(place, letters[label], 255, font, "mm")
        small = canvas.rotate(30 * turn - 15).resize((SIDE, SIDE), Image.Resampling.BOX)
        images.append(
            torch.tensor(np.asarray(small)).float() / 255 + 0.15 * torch.randn(SIDE, SIDE, generator=generator)
        )
    return _split(torch.stack(images)[:, None], labels, TRAIN, len(letters))


@cache
def _textures() -> Data:
    generator = torch.Generator().manual_seed(2)
    count = TRAIN + VAL
    labels = torch.randint(6, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    images = []
    for label in labels.tolist():
        shift, scale, contrast = torch.rand(3, generator=generator).tolist()
        if label < 3:
            angle = math.pi * (label / 3 + 0.1 * (scale - 0.5))
            wave = rows * math.cos(angle) + columns * math.sin(angle)
            image = torch.sin(2 * math.pi * ((2 + scale) * wave + shift))
        else:
            centre, size = 0.35 + 0.3 * shift, 0.18 + 0.14 * scale
            x, y = (columns - centre).abs(), (rows - 0.7 + 0.4 * shift).abs()
            far = {3: torch.maximum(x, y), 4: (x**2 + y**2).sqrt(), 5: torch.minimum(x, y) + size * 0.6}[label]
            image = 2.0 * (far < size) - 1.0
        images.append((0.4 + contrast) * image + 0.5 * torch.randn(SIDE, SIDE, generator=generator))
    return _split(torch.stack(images)[:, None], labels, TRAIN, 6)
