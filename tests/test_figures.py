"""The camera of the documentation, as far as it needs no browser."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from examples.figures import address, shrink

NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(NOISE).save(path)
    return path


def test_shrink_leaves_small_pictures_alone(picture):
    """What is small enough loses no colour."""
    before = picture.read_bytes()
    shrink(picture, limit=len(before))
    assert picture.read_bytes() == before


@pytest.mark.parametrize("limit", [150_000, 100_000])
def test_shrink_keeps_to_the_limit_and_the_size(picture, limit):
    """Fewer colours, the same pixels."""
    shrink(picture, limit=limit)
    assert picture.stat().st_size <= limit
    with Image.open(picture) as opened:
        assert opened.size == (400, 300)


def test_shrink_what_cannot_fit_says_so(picture):
    """With what to do."""
    with pytest.raises(ValueError, match=r"picture\.png takes more than 1000 bytes .* smaller window"):
        shrink(picture, limit=1000)


def test_address_carries_the_filter_for_new_and_old_dashboards():
    """Time Series reads it before the hash, Images behind it."""
    found = address("http://127.0.0.1:6006/", "images", "^interp/", dark=True)
    assert (
        found == "http://127.0.0.1:6006/?darkMode=true&smoothing=0.0&tagFilter=%5Einterp/#images&tagFilter=%5Einterp/"
    )
