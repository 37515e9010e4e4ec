"""Masks and boxes of objects, in whatever a batch holds."""

import pytest
import torch

from lightning_interp.callbacks._masks import read_masks

IMAGES = torch.zeros(2, 3, 4, 5)
MASK = torch.zeros(2, 4, 5)
MASK[0, 1:3, 2:4] = 1
MASK[1, 0, 0] = 7
BOX = torch.tensor([[2, 1, 4, 3], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    "batch",
    [
        {"image": IMAGES, "mask": MASK},
        {"image": IMAGES, "masks": MASK[:, None]},
        {"image": IMAGES, "segmentation": MASK.long()},
        {"image": IMAGES, "bbox": BOX},
        {"image": IMAGES, "boxes": BOX[:, None].float()},
        (IMAGES, torch.zeros(2), MASK),
    ],
)
def test_masks_are_found(batch):
    """True on the object."""
    assert torch.equal(read_masks(batch, IMAGES), MASK != 0)


def test_several_boxes_are_joined():
    """A pixel counts if any box holds it."""
    boxes = torch.stack((BOX, BOX + 1), dim=1)
    expected = read_masks({"box": BOX}, IMAGES) | read_masks({"box": BOX + 1}, IMAGES)
    assert torch.equal(read_masks({"box": boxes}, IMAGES), expected)


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, torch.zeros(2)),
        (IMAGES, torch.zeros(2), torch.zeros(2)),
        {"image": IMAGES, "mask": torch.zeros(2, 8, 8)},
        {"image": IMAGES, "mask": "none"},
        {"image": IMAGES, "box": torch.zeros(2, 5)},
    ],
)
def test_what_does_not_fit_the_images_is_no_mask(batch):
    """Rather none than a wrong one."""
    assert read_masks(batch, IMAGES) is None


def test_vectors_have_no_masks():
    """Only images do."""
    assert read_masks({"mask": MASK}, torch.zeros(2, 5)) is None
