"""How far a step moved the weights, and whether the loss fell as the gradient had promised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def update_ratio(before: Tensor, after: Tensor) -> float:
    """Size of an update relative to what it changed: norm(after - before) / norm(before).

    Args:
        before: Any shape; a parameter before the step.
        after: Same shape; the parameter after it.

    Returns:
        Unitless, >= 0; about 1e-3 in many healthy runs. 0 if nothing moved, also where everything was zero; NaN if
        zeros moved, since there is nothing to compare with.

    Raises:
        ValueError: If the shapes differ.

    Source: Stanford CS231n notes, "Neural Networks Part 3", ratio of weights and updates.

    Example:
        >>> update_ratio(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        0.1
    """
    if before.shape != after.shape:
        raise ValueError(
            f"Expected `before` and `after` of one shape, but got {tuple(before.shape)} and {tuple(after.shape)}."
        )
    update_norm, before_norm = tensor_norms([after - before, before]).tolist()
    return relative_norm(update_norm, before_norm)


def relative_norm(update_norm: float, before_norm: float) -> float:
    """`update_norm` / `before_norm`, with the zero cases of `update_ratio`.

    Example:
        >>> relative_norm(0.5, 5.0), relative_norm(0.0, 0.0), relative_norm(0.5, 0.0)
        (0.1, 0.0, nan)
    """
    if before_norm == 0:
        return 0.0 if update_norm == 0 else math.nan
    return update_norm / before_norm


def step_ratio(loss_before: float, loss_after: float, predicted_fall: float, *, resolution: float = 0.0) -> float:
    """Fall of the loss of one batch over the fall that its gradient had promised.

    rho = (L0 - L1) / (-g . Delta), where g is the gradient at L0 and Delta the update that was made.

    Args:
        loss_before: Loss of a batch before the update, L0.
        loss_after: Loss of the same batch, under the same randomness, after it, L1.
        predicted_fall: -g . Delta, in the unit of the loss.
        resolution: Smallest predicted fall, as a fraction of `loss_before`, that the arithmetic resolves.

    Returns:
        Unitless. 1: as promised, the step was short; 1/2 on a quadratic: the step to the minimum along the line;
        0: to the other side of the valley; < 0: overshoot; -inf: the loss became infinite. NaN if the predicted fall
        is not a finite number above zero and above `resolution` (the update did not go downhill for this batch, as
        with much momentum: then a ratio means nothing).

    Source: the ratio of actual to predicted reduction of trust-region methods (Nocedal and Wright, "Numerical
    Optimization", 2006, equation 4.4), with the linear model.

    Example:
        >>> step_ratio(1.0, 0.5, 1.0), step_ratio(1.0, 1.25, 0.5), step_ratio(1.0, 0.5, -0.1)
        (0.5, -0.5, nan)
    """
    floor = resolution * abs(loss_before)
    if not (math.isfinite(predicted_fall) and predicted_fall > 0 and predicted_fall >= floor):
        return math.nan
    return (loss_before - loss_after) / predicted_fall


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, in few kernels and without waiting for the device.

    Args:
        tensors: n floating tensors of any shapes, dtypes and devices; sparse ones count their values.

    Returns:
        (n,), >= 0, on the device of the first tensor; float64 if any tensor is, else float32 (sums of half precision
        are taken in float32). Infinite where the sum of squares overflows.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(2, 2)])
        tensor([5., 0.])
    """
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    if not dense:
        return torch.empty(0)
    # The kernel sums in the dtype of its input: 16 bits would overflow at 65504, and keep three digits.
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in dense]
    result = torch.float64 if any(t.dtype == torch.float64 for t in wide) else torch.float32
    norms = torch._foreach_norm(wide, 2)
    return torch.stack([norm.to(wide[0].device, result, non_blocking=True) for norm in norms])


def predicted_fall(gradients: Iterable[Tensor], updates: Iterable[Tensor]) -> Tensor:
    """-g . Delta over all parameters: how far the loss falls if it is linear, without waiting for the device.

    Args:
        gradients: Gradients before the update, one a parameter; sparse ones are densified.
        updates: After minus before, in the same order and shapes.

    Returns:
        0-d, in the unit of the loss, summed in at least float32; zero if there are no parameters.

    Example:
        >>> g = torch.tensor([1.0, 2.0])
        >>> predicted_fall([g], [-0.1 * g])
        tensor(0.5000)
    """
    products = []
    for gradient, update in zip(gradients, updates, strict=True):
        dtype = torch.promote_types(torch.promote_types(gradient.dtype, update.dtype), torch.float32)
        dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        products.append(torch.dot(dense.to(dtype).reshape(-1), update.detach().to(dtype).reshape(-1)))
    if not products:
        return torch.zeros(())
    return -torch.stack([product.to(products[0].device) for product in products]).sum()


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Detached copies of floating tensors, in few kernels."""
    # A multiplication by one keeps each bit, and is one kernel for many tensors; there is no foreach clone everywhere.
    return list(torch._foreach_mul([t.detach() for t in tensors], 1.0)) if tensors else []


def steps_back(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Before minus after of each pair, detached, in few kernels and in the memory of `before`."""
    # New memory would cost three times as much as the arithmetic.
    back = list(before)
    if back:
        torch._foreach_sub_(back, [t.detach() for t in after])
    return back
