"""Images and labels out of whatever a loader delivers."""

from __future__ import annotations

import re
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_interp.callbacks.batches import IMAGE_KEYS, LABEL_KEYS, UnreadableError, read_batch

IMAGES, LABELS = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
Pair = namedtuple("Pair", "picture answer")


@pytest.mark.parametrize(
    ("batch", "labelled"),
    [
        (IMAGES, False),
        ([IMAGES], False),
        ((IMAGES, LABELS), True),
        ([IMAGES, LABELS, "paths"], True),
        ([IMAGES, ["cat", "dog"]], False),
        (Pair(IMAGES, LABELS), True),
        *[({key: IMAGES, "label": LABELS}, True) for key in IMAGE_KEYS],
        *[({"image": IMAGES, key: LABELS}, True) for key in LABEL_KEYS],
        ({"image": IMAGES, "label": ["cat", "dog"]}, False),
        ({"id": ["a", "b"], "x": IMAGES}, False),
        ({"image": ["a.png", "b.png"], "pixel_values": IMAGES, "labels": LABELS}, True),
        (OrderedDict(y=LABELS, x=IMAGES), True),
        (UserDict(img=IMAGES, target=LABELS), True),
    ],
)
def test_images_and_labels_are_found(batch, labelled):
    """The tensors themselves, not copies; labels only if they are a tensor."""
    images, labels = read_batch(nn.Identity(), batch)
    assert images is IMAGES
    assert labels is (LABELS if labelled else None)


@dataclass
class Own:
    picture: torch.Tensor


class Reader(nn.Module):
    def interp_batch(self, batch):
        return batch.picture, None


def test_method_of_the_module_wins():
    """For batches of any type."""
    assert read_batch(Reader(), Own(IMAGES)) == (IMAGES, None)


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        (Own(IMAGES), "Own"),
        ({"picture": IMAGES, "n": 1}, "dict with keys ['picture', 'n']"),
        ({"image": "a.png"}, "dict with keys ['image']"),
        ([], "list"),
        ((["a.png"], LABELS), "tuple"),
        ("a.png", "str"),
        (None, "NoneType"),
    ],
)
def test_what_can_not_be_read_is_said_with_the_ways_out(batch, came):
    """What was expected, what came, and `interp_batch`."""
    with pytest.raises(UnreadableError, match=f"got {re.escape(came)}.*`interp_batch"):
        read_batch(nn.Identity(), batch)
