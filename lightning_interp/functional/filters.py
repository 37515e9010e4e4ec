"""Numbers about convolution kernels: how smooth, how varied, how far from where they started.

Shape letters: O filters, I input channels of a filter, n kernels (n = O * I), K values of one kernel.

All three take the weight of any convolution, transposed ones too: the kernels are what lies in the axes after the
second, and which of the first two is which does not matter. None of them tells a good filter from a bad one: a run that
blew up has smoother filters than a healthy one, so compare a layer with its own value at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# A kernel whose values differ by less than this part of its largest one is constant: far above the rounding of float64,
# far below the rounding of float32 weights.
_CONSTANT = 1e-12
# Values of a weight that are looked at together: a megabyte of float64. Half of it to twice as much is as fast.
_BLOCK = 1 << 17


class FilterNumbers(NamedTuple):
    """The three numbers of one layer.

    Attributes:
        smoothness: See `filter_smoothness`.
        entropy: See `variance_entropy`.
        movement: See `filter_movement`; NaN when there is no start to compare with.
    """

    smoothness: float
    entropy: float
    movement: float


def filter_smoothness(weight: Tensor) -> float:
    """Mean lag-1 spatial autocorrelation of the kernels.

    For one kernel with its mean removed, c, and the P pairs of positions that touch along an axis:

    r = (sum over pairs of c_i c_j / P) / (sum over positions of c_i^2 / K)

    and the result is the mean of r over the kernels that are not constant.

    Args:
        weight: (O, I, *kernel), of a convolution with one or more spatial axes.

    Returns:
        Unitless. Alternating signs give -1 and values that change slowly approach 1 as the kernel grows (a short kernel
        can exceed these by a few hundredths to a tenth, since its border has fewer pairs). White noise, of any
        distribution, has the expectation -1 / (K - 1) exactly: -1/8 for 3x3. NaN if no kernel has two different values
        (1x1 always) and if a weight is not finite.

    Raises:
        ValueError: If `weight` is not a real floating-point tensor with three or more axes.

    Source: Moran 1950 (the statistic I with neighbours along the axes), as a mean over kernels.

    Example:
        >>> round(filter_smoothness(torch.tensor([[[[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]]])), 6)
        -1.0
    """
    return float(_smoothness(_kernels(weight)))


def variance_entropy(weight: Tensor) -> float:
    """How evenly the kernels of a layer use the K directions of kernel space.

    The kernels are the rows of an (n, K) matrix with centred columns and singular values s; with p_i = s_i^2 / sum s^2

    H = -sum p_i log10(p_i) / log10(K)

    The source leaves out the division, so its 3x3 kernels reach 0.954; divided, kernels of all sizes share one range.

    Args:
        weight: (O, I, *kernel), of a convolution with one or more spatial axes.

    Returns:
        In [0, 1]: 0 when all kernels lie on one line, 1 when no direction is preferred, as in a fresh layer of many
        kernels. Few kernels can't reach 1: n of them at most log10(n - 1) / log10(K). NaN for 1x1, for fewer than two
        different kernels, and if a weight is not finite.

    Raises:
        ValueError: If `weight` is not a real floating-point tensor with three or more axes.

    Source: Gavrikov and Keuper 2022 (CNN Filter DB), variance entropy; there in base 10 and not divided.

    Example:
        >>> scale = torch.arange(8.0).view(4, 2, 1, 1)
        >>> abs(round(variance_entropy(scale * torch.ones(3, 3)), 6))
        0.0
    """
    kernels = _kernels(weight)
    return _entropy(_scatter(kernels).cpu(), kernels[0].numel())


def filter_movement(weight: Tensor, start: Tensor) -> float:
    """How far a layer has moved: norm(W - W0) / norm(W0).

    Args:
        weight: Any shape, the weight now.
        start: Same shape, the weight at the start.

    Returns:
        At least 0, unitless: 0 has not moved (also when both are zero), 1 has moved by its own length, infinity has
        left a start at zero. NaN if a value is not finite.

    Raises:
        ValueError: If the shapes differ or either is not a real floating-point tensor.

    Example:
        >>> filter_movement(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == 4 / 3
        True
    """
    return float(_movement(weight, start))


def filter_numbers(weights: Mapping[str, Tensor], starts: Mapping[str, Tensor]) -> dict[str, FilterNumbers]:
    """`filter_smoothness`, `variance_entropy` and `filter_movement` of many layers with one copy from the device.

    Args:
        weights: Layer to weight (O, I, *kernel), all on one device or on several.
        starts: Layer to weight at the start, on any device; layers may be missing.

    Returns:
        Layer to numbers, in the order of `weights`.

    Raises:
        ValueError: As in the three functions.
    """
    parts: list[Tensor] = []
    shapes: list[tuple[int, int]] = []
    for layer, weight in weights.items():
        kernels = _kernels(weight)
        scatter = _scatter(kernels)
        start = starts.get(layer)
        moved = scatter.new_tensor(math.nan) if start is None else _movement(weight, start)
        parts += [_smoothness(kernels).view(1), moved.view(1), scatter.flatten()]
        shapes.append((len(scatter), kernels[0].numel()))
    if not parts:
        return {}
    device = parts[0].device
    flat = torch.cat([part.to(device) for part in parts]).cpu()
    numbers, at = {}, 0
    for layer, (rank, size) in zip(weights, shapes, strict=True):
        scatter = flat[at + 2 : at + 2 + rank * rank].view(rank, rank)
        numbers[layer] = FilterNumbers(float(flat[at]), _entropy(scatter, size), float(flat[at + 1]))
        at += 2 + rank * rank
    return numbers


def _kernels(weight: Tensor) -> Tensor:
    """(n, *kernel)."""
    if weight.ndim < 3 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            "Expected `weight` to be a non-empty floating-point tensor (filters, channels, *kernel), but got shape "
            f"{tuple(weight.shape)} of {weight.dtype}."
        )
    return weight.detach().flatten(0, 1)


def _exact(tensor: Tensor) -> Tensor:
    """In float64 and in the order of its axes, on the CPU where the device has none; may be the tensor itself."""
    there = tensor.cpu() if tensor.device.type == "mps" else tensor
    return there.to(torch.float64, memory_format=torch.contiguous_format)


def _blocks(kernels: Tensor) -> tuple[Tensor, ...]:
    """Pieces along the first axis, so small that on a CPU what is computed of a block stays in the cache."""
    if kernels.device.type != "cpu" or not kernels.ndim:
        return (kernels,)
    return torch.split(kernels, max(1, _BLOCK * len(kernels) // max(1, kernels.numel())))


def _smoothness(kernels: Tensor) -> Tensor:
    """Mean of r over the kernels, without waiting for the device."""
    if kernels[0].numel() == 1:
        return _exact(kernels.new_full((), math.nan))
    sums = torch.stack([_autocorrelation(block) for block in _blocks(kernels)]).sum(dim=0)
    return sums[0] / sums[1]


def _autocorrelation(kernels: Tensor) -> Tensor:
    """(2,): the sum of r over the kernels that are not constant, and their number."""
    size, axes = kernels[0].numel(), kernels.shape[1:]
    values = _exact(kernels.flatten(1).T).contiguous()  # (K, n): what follows is arithmetic on n kernels side by side
    largest = torch.maximum(values.amax(dim=0), -values.amin(dim=0))
    values = values - values.mean(dim=0)  # not in place: of float64 it may be the weight itself
    squares = values.square().sum(dim=0)
    products, pairs = torch.zeros_like(squares), 0
    for axis, length in enumerate(axes):
        if length > 1:
            placed = values.view(*axes, -1)
            product = placed.narrow(axis, 0, length - 1) * placed.narrow(axis, 1, length - 1)
            products += product.flatten(0, -2).sum(dim=0)
            pairs += size // length * (length - 1)
    constant = squares <= size * (_CONSTANT * largest).square()
    # NaN compares false, so a kernel that is not finite counts and makes the mean NaN; no kernel at all is 0 / 0.
    ratios = torch.where(constant, 0.0, (products / pairs) / (squares / size))
    return torch.stack([ratios.sum(), (~constant).sum()])


def _scatter(kernels: Tensor) -> Tensor:
    """The smaller of the (K, K) and (n, n) product matrices of the centred kernels: both have the squares of s."""
    rows = kernels.flatten(1)
    if len(rows) < rows.shape[1]:
        values = _exact(rows)
        centred = values - values.mean(dim=0)
        scatter, spread, largest = centred @ centred.T, _largest(centred), _largest(values)
    else:
        blocks = _blocks(rows)
        mean = torch.stack([_exact(block).sum(dim=0) for block in blocks]).sum(dim=0) / len(rows)
        scatter, spread, largest = mean.new_zeros(len(mean), len(mean)), mean.new_zeros(()), mean.new_zeros(())
        for block in blocks:
            values = _exact(block)
            largest = torch.maximum(largest, _largest(values))
            centred = values - mean
            spread = torch.maximum(spread, _largest(centred))
            scatter.addmm_(centred.T, centred)
    # Rounding of the mean would otherwise pass for a spread of kernels that are all the same.
    return torch.where(spread <= _CONSTANT * largest, 0.0, scatter)


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude, without a copy."""
    low, high = values.aminmax()
    return torch.maximum(high, -low)


def _entropy(scatter: Tensor, size: int) -> float:
    """Entropy of the eigenvalues of a scatter matrix on the CPU."""
    if size == 1 or not bool(torch.isfinite(scatter).all()):
        return math.nan
    values = torch.linalg.eigvalsh(scatter).clamp(min=0.0)
    total = values.sum()
    if total == 0:
        return math.nan
    shares = values / total
    return float(torch.special.entr(shares).sum() / math.log(size))


def _movement(weight: Tensor, start: Tensor) -> Tensor:
    """norm(W - W0) / norm(W0), without waiting for the device."""
    if weight.shape != start.shape:
        raise ValueError(
            f"Expected `start` to have the shape of `weight`, {tuple(weight.shape)}, but got {tuple(start.shape)}."
        )
    if not (weight.is_floating_point() and start.is_floating_point()):
        raise ValueError(f"Expected floating-point tensors, but got {weight.dtype} and {start.dtype}.")
    now = weight.detach()
    before = start.detach().to(now.device, non_blocking=now.is_cuda)
    norms = []
    for block, other in zip(_blocks(now), _blocks(before), strict=True):
        values = _exact(other)
        norms.append(torch.stack([torch.linalg.vector_norm(_exact(block) - values), torch.linalg.vector_norm(values)]))
    moved, length = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return torch.where(moved == 0, 0.0, moved / length)
