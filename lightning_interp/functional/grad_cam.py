"""Grad-CAM: which feature maps speak for a class, and where."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def grad_cam(maps: Tensor, gradients: Tensor, size: tuple[int, int]) -> Tensor:
    """L = ReLU(sum_k a_k A_k), a_k = mean over positions of d score / d A_k; bilinearly enlarged.

    Args:
        maps: A, (N, K, h, w).
        gradients: d score / d A, (N, K, h, w).
        size: (H, W) of the image.

    Returns:
        (N, H, W), at least 0.

    Source: Selvaraju et al. 2017, equations 1 and 2.

    Example:
        >>> import torch
        >>> grad_cam(torch.tensor([[[[1.0]], [[2.0]]]]), torch.tensor([[[[3.0]], [[-1.0]]]]), (1, 2))
        tensor([[[1., 1.]]])
    """
    weights_NK11 = gradients.mean(dim=(2, 3), keepdim=True)
    cam_N1hw = (weights_NK11 * maps).sum(dim=1, keepdim=True).relu()
    return F.interpolate(cam_N1hw, size=size, mode="bilinear", align_corners=False)[:, 0]
