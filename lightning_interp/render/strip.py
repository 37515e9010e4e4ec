"""One picture over time, in bounded memory."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from lightning_interp.render.color import BACKGROUND, Pixels
from lightning_interp.render.grid import tile

MAX_FRAMES = 16

# Digits of 3 x 5 pixels: a row is three bits, the leftmost the highest.
_DIGITS = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7), "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 2, 2, 2), "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7),
    "k": (4, 5, 6, 5, 5), "M": (5, 7, 7, 5, 5), ".": (0, 0, 0, 0, 2),
}  # fmt: skip
_INK = (235, 235, 235)


class FilmStrip:
    """Keeps at most 16 pictures of the same thing, spaced evenly in log(step + 1), the first and the last always.

    When there is one too many, the picture goes whose neighbours lie closest together.

    Example:
        >>> strip = FilmStrip(max_frames=3)
        >>> for step in range(100):
        ...     strip.push(step, np.zeros((2, 2, 3), np.uint8))
        >>> strip.steps[0], strip.steps[-1], len(strip.steps)
        (0, 99, 3)
    """

    def __init__(self, max_frames: int = MAX_FRAMES) -> None:
        """Starts empty.

        Args:
            max_frames: Most pictures that are kept, at least 3: the first, the last, and one that may change.

        Raises:
            ValueError: If `max_frames` is less than 3.
        """
        if max_frames < 3:
            raise ValueError(f"Expected `max_frames` to be at least 3, but got {max_frames}.")
        self.max_frames = max_frames
        self._frames: list[tuple[int, Pixels]] = []

    def push(self, step: int, picture: Pixels) -> None:
        """Adds a picture. Pictures of this step or later ones go: a run that was resumed draws them again.

        Args:
            step: At least 0.
            picture: (H, W, 3); a copy is kept. One of another size than the others begins the strip anew: the network
                has got another shape since, or the run was resumed with other options.

        Raises:
            ValueError: If `step` is negative or the shape is not that of a picture.
        """
        if step < 0:
            raise ValueError(f"Expected `step` to be at least 0, but got {step}.")
        if picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"Expected `picture` to have shape (H, W, 3), but got {picture.shape}.")
        if self._frames and self._frames[0][1].shape != picture.shape:
            self._frames.clear()
        while self._frames and self._frames[-1][0] >= step:
            self._frames.pop()
        self._frames.append((step, np.array(picture, dtype=np.uint8)))
        if len(self._frames) > self.max_frames:
            times = [math.log1p(step) for step in self.steps]
            del self._frames[min(range(1, len(times) - 1), key=lambda i: times[i + 1] - times[i - 1])]

    @property
    def steps(self) -> list[int]:
        """Steps of the pictures that are kept, ascending."""
        return [step for step, _ in self._frames]

    def frames(self) -> list[tuple[int, Pixels]]:
        """(step, picture) of all that are kept, oldest first."""
        return list(self._frames)

    def picture(self) -> Pixels:
        """All of them as one picture, in reading order, each with its step above it.

        Raises:
            ValueError: If there is none.
        """
        if not self._frames:
            raise ValueError("A film strip without pictures can't be shown: call `push` first.")
        return tile(np.stack([_labelled(step, picture) for step, picture in self._frames]), gap=2)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and bytes, safe in a checkpoint."""
        return {
            "steps": self.steps,
            "shape": list(self._frames[0][1].shape) if self._frames else [],
            "pixels": zlib.compress(b"".join(picture.tobytes() for _, picture in self._frames)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        pixels = np.frombuffer(zlib.decompress(state["pixels"]), dtype=np.uint8)
        pictures = pixels.reshape(len(state["steps"]), *state["shape"]).copy()
        self._frames = list(zip(state["steps"], pictures, strict=True))


def step_label(step: int) -> str:
    """At most five characters for a step.

    Example:
        >>> step_label(9999), step_label(12345), step_label(250_000), step_label(3_400_000)
        ('9999', '12.3k', '250k', '3.4M')
    """
    if step < 10_000:
        return str(step)
    size, letter = (1000, "k") if step < 1_000_000 else (1_000_000, "M")
    # Cut, not rounded: 999,999 must not become 1000k.
    tenths = step * 10 // size
    return f"{tenths // 10}{f'.{tenths % 10}' if tenths < 1000 and tenths % 10 else ''}{letter}"


def _labelled(step: int, picture: Pixels) -> Pixels:
    """The picture with its step above it; a narrow one is widened so that the label fits."""
    glyphs = [_DIGITS[character] for character in step_label(step)]
    width = max(picture.shape[1], 4 * 5)
    canvas = np.empty((picture.shape[0] + 7, width, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    canvas[7:, : picture.shape[1]] = picture
    for i, glyph in enumerate(glyphs):
        for y, row in enumerate(glyph):
            for x in range(3):
                if row >> (2 - x) & 1:
                    canvas[1 + y, 4 * i + x] = _INK
    return canvas
