"""Small random movements of images: what a network still recognises under them it has not been tricked into."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT = 0.07  # of the side
SCALE = 0.1
DEGREES = 10.0


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to 7 % of the side, scaled by 0.9 to 1.1, rotated by up to 10 degrees.

    All images alike. Bilinear; what comes in from outside is mirrored. The draws are made on the CPU: the same ones on
    every device. Differentiable, and where torch is told to be deterministic, deterministic: on a GPU the gradient of
    `grid_sample` is not, so that then all of it is done on the CPU.

    Args:
        images: (N, C, H, W), floating point.
        generator: Of the CPU.
    """
    draws = torch.rand(4, generator=generator) * 2 - 1
    height, width = images.shape[-2:]
    angle = math.radians(DEGREES) * float(draws[0])
    scale = 1 + SCALE * float(draws[1])
    # In the grid a side is 2 long, whatever its pixels; a rotation must not shear an image that is not square.
    shifts = [2 * SHIFT * float(draw) for draw in draws[2:]]
    cosine, sine, aspect = math.cos(angle) / scale, math.sin(angle) / scale, height / width
    theta = torch.tensor([[cosine, -sine * aspect, shifts[0]], [sine / aspect, cosine, shifts[1]]])
    deterministic = images.requires_grad and torch.are_deterministic_algorithms_enabled()
    there = images.cpu() if deterministic else images
    grid = F.affine_grid(theta.to(there)[None], [1, *images.shape[1:]], align_corners=False)
    moved = F.grid_sample(
        there, grid.expand(len(images), -1, -1, -1), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return moved.to(images.device)
