"""Images as points of a space in which those like the data are near: in their spectrum, their colours and their range.

Nothing needs to be known of the user's normalisation: one batch, as the model receives it, says it all.
Letters: K images to make, M images of data, C channels, H and W sides, F = W // 2 + 1 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The mean is kept so far from the ends of the range (of 1) that the sigmoid can leave it.
_MARGIN = 0.02
_START_SD = 0.01


class FourierPrior:
    """Images as waves that are mixed like those of the data.

    image = low + (high - low) * sigmoid(logit(mean) + gain * colours (irfft2(spectrum * amplitude)))

    `spectrum` is what one optimises; equal steps in it make changes that look like the data: large waves first, colours
    together as they go together in the data, no value beyond the data's own.

    Attributes:
        low: (C, 1, 1), smallest value of the data, per channel.
        high: (C, 1, 1), largest value.
        mean: (C, 1, 1).
        amplitude: (C, H, F), mean magnitude of each frequency, root mean square 1.
        colours: (C, C), square root of the covariance of the channels over its largest standard deviation.

    Source: Olah, Mordvintsev and Schubert 2017 (Distill, "Feature visualization"), for optimising in Fourier space with
        decorrelated colours; that all of it is estimated from the user's data is this package's own choice.
    """

    def __init__(self, data: Tensor, *, gain: float) -> None:
        """Estimates everything.

        Args:
            data: (M, C, H, W), floating point.
            gain: How strong a wave of unit strength is; more gives harder contrasts.
        """
        self.shape = tuple(data.shape[1:])
        self.gain = gain
        self.low = data.amin(dim=(0, 2, 3))[:, None, None]
        self.high = data.amax(dim=(0, 2, 3))[:, None, None]
        self.mean = data.mean(dim=(0, 2, 3))[:, None, None]
        centred = data - self.mean
        amplitude = torch.fft.rfft2(centred).abs().mean(dim=0)
        self.amplitude = amplitude / amplitude.square().mean().sqrt().clamp_min(torch.finfo(data.dtype).tiny)
        self.colours = _colours(centred)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, C, H, F, 2), small random numbers; the same for all, so that a class's image has no neighbours."""
        channels, height, width = self.shape
        one: Tensor = torch.randn(1, channels, height, width // 2 + 1, 2, generator=generator)
        return (_START_SD * one).to(self.mean).repeat(count, 1, 1, 1, 1)

    def images(self, spectrum: Tensor) -> Tensor:
        """(K, C, H, W) of a spectrum (K, C, H, F, 2)."""
        waves = torch.fft.irfft2(torch.view_as_complex(spectrum) * self.amplitude, s=self.shape[1:], norm="ortho")
        coloured = torch.einsum("cd,kdhw->kchw", self.colours, waves)
        span = self.high - self.low
        level: Tensor = ((self.mean - self.low) / span.clamp_min(torch.finfo(span.dtype).tiny)).clamp(
            _MARGIN, 1 - _MARGIN
        )
        images: Tensor = self.low + span * torch.sigmoid(level.logit() + self.gain * coloured)
        return images


def _colours(centred: Tensor) -> Tensor:
    """In float64: with channels that are copies of one another the covariance is singular."""
    pixels = centred.movedim(1, 0).flatten(1).double()
    covariance = pixels @ pixels.T / pixels.shape[1]
    values, vectors = torch.linalg.eigh(covariance.cpu())
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    colours: Tensor = (root / root.diagonal().max().clamp_min(1e-12)).to(centred)
    return colours


class PixelPrior:
    """The pixels themselves, from the mean of the data on; in units of the data's standard deviation.

    Source: Simonyan, Vedaldi and Zisserman 2013, section 2.
    """

    def __init__(self, data: Tensor) -> None:
        """Estimates mean and standard deviation, per channel.

        Args:
            data: (M, C, H, W), floating point.
        """
        self.shape = tuple(data.shape[1:])
        self.mean = data.mean(dim=(0, 2, 3))[:, None, None]
        self.scale = data.std(dim=(0, 2, 3), correction=0)[:, None, None]

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, C, H, W), zeros: the mean image."""
        return torch.zeros(count, *self.shape).to(self.mean)

    def images(self, pixels: Tensor) -> Tensor:
        """(K, C, H, W) of pixels of that shape."""
        return self.mean + self.scale * pixels
