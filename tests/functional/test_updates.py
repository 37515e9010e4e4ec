"""Update ratios, step ratios and norms against closed forms and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.functional.updates import (
    copies,
    predicted_fall,
    relative_norm,
    step_ratio,
    steps_back,
    tensor_norms,
    update_ratio,
)

SHAPES = [(5,), (4, 3), (2, 3, 1, 5), (1, 1, 3, 3)]


def _random(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensor_norms_of_any_dtype_equal_a_naive_loop(dtype):
    """Each norm is the root of the sum of squares, taken in at least float32."""
    tensors = _random(0, dtype)
    expected = [math.sqrt(sum(float(v) ** 2 for v in t.flatten())) for t in tensors]
    norms = tensor_norms(tensors)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(expected, norms.tolist(), rtol=1e-6)


def test_tensor_norms_of_half_precision_do_not_overflow():
    """300 squared is above the largest float16."""
    assert tensor_norms([torch.full((4,), 300.0, dtype=torch.float16)]).tolist() == [600.0]


def test_tensor_norms_of_mixed_dtypes_are_float64():
    """One double among the tensors keeps its precision."""
    norms = tensor_norms([torch.ones(4), torch.full((1,), 1 / 3, dtype=torch.float64)])
    assert norms.tolist() == [2.0, 1 / 3]


def test_tensor_norms_of_a_sparse_gradient_counts_repeated_rows_once():
    """Uncoalesced entries of one row add up before the square."""
    sparse = torch.sparse_coo_tensor([[1, 1]], [[3.0], [1.0]], (3, 1), check_invariants=True)
    assert tensor_norms([sparse]).tolist() == [4.0]


def test_tensor_norms_keep_what_is_not_finite():
    """NaN and infinity are what one looks for."""
    norms = tensor_norms([torch.tensor([1.0, math.nan]), torch.tensor([math.inf])]).tolist()
    assert math.isnan(norms[0])
    assert norms[1] == math.inf


def test_tensor_norms_of_nothing_is_empty():
    """A model without trainable parameters has no norms."""
    assert tensor_norms([]).shape == (0,)


def test_update_ratio_of_plain_sgd_is_rate_times_gradient_over_weight():
    """Closed form: norm(-lr g) / norm(w)."""
    weight, gradient = _random(1)[1], _random(2)[1]
    expected = 0.1 * gradient.norm().item() / weight.norm().item()
    assert update_ratio(weight, weight - 0.1 * gradient) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("before", "after", "expected"), [(0.0, 0.0, 0.0), (2.0, 2.0, 0.0), (2.0, 3.0, 0.5)])
def test_update_ratio_in_the_zero_cases_is_defined(before, after, expected):
    """What did not move has ratio 0, also where it is zero itself."""
    assert update_ratio(torch.tensor([before]), torch.tensor([after])) == expected


def test_update_ratio_of_zeros_that_moved_is_nan():
    """There is nothing to compare with."""
    assert math.isnan(update_ratio(torch.zeros(3), torch.ones(3)))


def test_update_ratio_of_different_shapes_is_refused():
    """Broadcasting would give a number that means nothing."""
    with pytest.raises(ValueError, match=r"one shape, but got \(3,\) and \(1,\)"):
        update_ratio(torch.zeros(3), torch.zeros(1))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_relative_norm_does_not_depend_on_the_scale(update, before, factor):
    """A property of a ratio."""
    assert relative_norm(update * factor, before * factor) == pytest.approx(relative_norm(update, before))


def _quadratic(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian = root @ root.T / 6 + torch.eye(6, dtype=torch.float64)
    return hessian, torch.randn(6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_ratio_of_gradient_descent_on_a_quadratic_has_a_closed_form(rate, seed):
    """L = w'Hw/2: rho = 1 - lr g'Hg / (2 g'g)."""
    hessian, w = _quadratic(seed)
    g = hessian @ w
    moved = -rate * g

    def loss(v):
        return (v @ hessian @ v / 2).item()

    ratio = step_ratio(loss(w), loss(w + moved), predicted_fall([g], [moved]).item())
    assert ratio == pytest.approx(1 - rate * (g @ hessian @ g).item() / (2 * (g @ g).item()), rel=1e-9, abs=1e-9)


def test_step_ratio_at_the_minimum_along_the_line_is_one_half():
    """The step g'g / g'Hg ends in the minimum of the parabola."""
    hessian, w = _quadratic(3)
    g = hessian @ w
    moved = -(g @ g) / (g @ hessian @ g) * g
    after = w + moved
    ratio = step_ratio((w @ g / 2).item(), (after @ hessian @ after / 2).item(), -(g @ moved).item())
    assert ratio == pytest.approx(0.5)


@pytest.mark.parametrize("fall", [0.0, -1.0, math.nan, math.inf])
def test_step_ratio_without_a_predicted_fall_is_nan(fall):
    """A step that was not to go down says nothing."""
    assert math.isnan(step_ratio(1.0, 0.5, fall))


def test_step_ratio_below_the_resolution_is_nan():
    """A fall that drowns in rounding says nothing; on the edge it counts."""
    assert math.isnan(step_ratio(2.0, 1.0, 0.9e-6, resolution=0.5e-6))
    assert step_ratio(2.0, 1.0, 1e-6, resolution=0.5e-6) == pytest.approx(1e6)


def test_step_ratio_of_a_loss_that_blew_up_is_minus_infinity():
    """An overflow is the worst overshoot."""
    assert step_ratio(1.0, math.inf, 0.1) == -math.inf
    assert math.isnan(step_ratio(1.0, math.nan, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_predicted_fall_equals_a_naive_loop(dtype):
    """Minus the sum of all products."""
    gradients, updates = _random(4, dtype), _random(5, dtype)
    expected = -sum(
        float(a) * float(b)
        for g, u in zip(gradients, updates, strict=True)
        for a, b in zip(g.flatten(), u.flatten(), strict=True)
    )
    assert predicted_fall(gradients, updates).item() == pytest.approx(expected, rel=1e-5)


def test_predicted_fall_of_sparse_gradient_equals_the_dense_one():
    """Embeddings give sparse gradients."""
    sparse = torch.sparse_coo_tensor([[0, 2]], [[1.0], [2.0]], (3, 1), check_invariants=True)
    update = torch.tensor([[1.0], [5.0], [-1.0]])
    assert predicted_fall([sparse], [update]).item() == 1.0


def test_predicted_fall_of_lists_that_do_not_match_is_refused():
    """One update for each gradient."""
    with pytest.raises(ValueError, match="zip"):
        predicted_fall([torch.ones(1)], [])


def test_predicted_fall_of_nothing_is_zero():
    """No parameters, no fall."""
    assert predicted_fall([], []).item() == 0


def test_copies_keep_each_bit_and_share_no_memory():
    """Signed zeros, NaN, infinities and subnormals come through."""
    source = torch.tensor([-0.0, math.nan, math.inf, 1e-42, 1.0], requires_grad=True)
    [copy] = copies([source])
    assert copy.view(torch.int32).tolist() == source.detach().view(torch.int32).tolist()
    assert not copy.requires_grad
    with torch.no_grad():
        source.fill_(7.0)
    assert copy[4] == 1.0


def test_steps_back_are_before_minus_after():
    """In the memory of what was before, and the weights stay as they are."""
    after, before = _random(6), _random(7)
    kept, expected = copies(after), [b - a for a, b in zip(after, before, strict=True)]
    back = steps_back(before, after)
    assert all(torch.equal(got, value) for got, value in zip(back, expected, strict=True))
    assert all(got is b for got, b in zip(back, before, strict=True))
    assert all(torch.equal(a, k) for a, k in zip(after, kept, strict=True))
    assert steps_back([], []) == copies([]) == []
