"""Pictures as PNG files."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Of zlib. The usual 6 takes up to three times as long, and saves a tenth on photographs, nothing on filters, maps and
# charts (measured on what this package draws of a ResNet-18).
_LEVEL = 1


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as the content of a PNG file.

    Args:
        pixels: (H, W, 3) or, with opacity, (H, W, 4), uint8, not empty.

    Example:
        >>> encode_png(np.zeros((2, 2, 3), np.uint8))[1:4]
        b'PNG'
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=_LEVEL)
    return file.getvalue()
