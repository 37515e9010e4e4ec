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
_SMALL = 128  # values of a kernel, at most


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
    return float(_look(_kernels(weight)).smoothness)


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
    return _entropy(_look(kernels).scatter.cpu(), kernels[0].numel())


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
        smoothness, scatter = _look(kernels)
        start = starts.get(layer)
        moved = scatter.new_tensor(math.nan) if start is None else _movement(weight, start)
        parts += [smoothness.view(1), moved.view(1), scatter.flatten()]
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


class _Look(NamedTuple):
    """What one pass over the kernels of a layer gives, without waiting for the device.

    Attributes:
        smoothness: 0-d, mean of r over the kernels.
        scatter: The smaller of the (K, K) and (n, n) product matrices of the centred kernels: both have the squares
            of s.
    """

    smoothness: Tensor
    scatter: Tensor


def _look(kernels: Tensor) -> _Look:
    size, axes = kernels[0].numel(), tuple(kernels.shape[1:])
    first = _exact(kernels[0].flatten())
    if size == 1:
        return _Look(first.new_full((), math.nan), first.new_zeros(1, 1))
    few = len(kernels) < size
    blocks = (kernels,) if few else _blocks(kernels)
    neighbours = _Neighbours(axes, first)
    ones = first.new_ones(len(blocks[0]))
    scatter, column = first.new_zeros(1, 1), torch.zeros_like(first)  # the first block broadcasts it
    sums, magnitude = first.new_zeros(2), first.new_zeros(())
    memory = first.new_empty(2, *blocks[0].flatten(1).shape)  # new memory for each block takes longer than the sums
    for block in blocks:
        values, centred = memory[:, : len(block)]
        values.copy_(block.flatten(1))
        mean = neighbours.centre(values, out=centred)
        values -= first  # squares of values far from zero would drown how little they differ
        if few:
            values -= values.mean(dim=0)
            scatter = values @ values.T
        else:
            scatter = torch.addmm(scatter, values.T, values)
            column += ones[: len(block)] @ values
        products, squares = neighbours.products(centred, spare=values), centred.square_() @ neighbours.ones
        total = squares + size * mean.square()
        # A kernel that is not finite counts, and makes the mean NaN; no kernel at all is 0 / 0.
        constant = (squares <= _CONSTANT**2 * total) & squares.isfinite()
        ratios = torch.where(constant, 0.0, products / squares * (size / neighbours.pairs))
        sums = sums + torch.stack([ratios.sum(), (~constant).sum()])
        magnitude = magnitude + total.sum()
    if not few:
        scatter = torch.addmm(scatter, column.unsqueeze(1), column.unsqueeze(0), alpha=-1 / len(kernels))
    # Rounding of the mean would otherwise pass for a spread of kernels that are all the same.
    same = scatter.diagonal().sum() <= _CONSTANT**2 * magnitude
    return _Look(sums[0] / sums[1], torch.where(same, 0.0, scatter))


class _Neighbours:
    """The pairs of positions of a kernel that touch along an axis."""

    def __init__(self, axes: tuple[int, ...], like: Tensor) -> None:
        size = math.prod(axes)
        self.axes = axes
        self.ones = like.new_ones(size)
        self.pairs = sum(size // length * (length - 1) for length in axes)
        # Small kernels lie so close together that a product with a matrix is the fastest way to go over them.
        self._small = size <= _SMALL
        if self._small:
            self._centre = torch.eye(size, dtype=like.dtype, device=like.device) - 1 / size
            places = torch.arange(size, device=like.device).view(axes)
            self._matrix = like.new_zeros(size, size)
            for axis, length in enumerate(axes):
                one, other = places.narrow(axis, 0, length - 1), places.narrow(axis, 1, length - 1)
                self._matrix[one.flatten(), other.flatten()] = 1.0

    def centre(self, values: Tensor, *, out: Tensor) -> Tensor:
        """Of (n, K): the mean of each kernel, and in `out` what it differs from it."""
        mean = (values @ self.ones).div_(len(self.ones))
        if self._small:
            torch.mm(values, self._centre, out=out)
        else:
            torch.sub(values, mean.unsqueeze(1), out=out)
        return mean

    def products(self, centred: Tensor, *, spare: Tensor) -> Tensor:
        """Of (n, K): the sum of the products of all pairs, for each kernel. Writes over `spare`."""
        if self._small:
            return torch.mm(centred, self._matrix, out=spare).mul_(centred) @ self.ones
        placed = centred.view(-1, *self.axes)
        sums = centred.new_zeros(len(centred))
        for axis, length in enumerate(self.axes, start=1):
            sums += (placed.narrow(axis, 0, length - 1) * placed.narrow(axis, 1, length - 1)).flatten(1).sum(dim=1)
        return sums


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
