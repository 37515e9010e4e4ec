"""Smoothness, entropy and movement of convolution weights."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp.functional import filters
from lightning_interp.functional.filters import filter_movement, filter_numbers, filter_smoothness, variance_entropy

KERNELS = [(3,), (1, 7), (3, 3), (4, 2), (3, 2, 5), (13, 11)]


def naive_smoothness(weight):
    """Loops over kernels, positions and axes in Python floats; None where a kernel is constant."""
    weight = weight.double().numpy()
    ratios = []
    for o, i in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        kernel = weight[o, i]
        centred = kernel - kernel.mean()
        if np.ptp(kernel) == 0:
            continue
        products = []
        for position in np.ndindex(kernel.shape):
            for axis in range(kernel.ndim):
                other = list(position)
                other[axis] += 1
                if other[axis] < kernel.shape[axis]:
                    products.append(centred[position] * centred[tuple(other)])
        ratios.append(np.mean(products) / np.mean(centred**2))
    return float(np.mean(ratios)) if ratios else math.nan


@pytest.mark.parametrize("kernel", KERNELS)
def test_smoothness_random_weight_equals_naive_loop(kernel):
    """Any number of axes, any shape."""
    weight = torch.randn(4, 3, *kernel, generator=torch.Generator().manual_seed(0))
    assert filter_smoothness(weight) == pytest.approx(naive_smoothness(weight), rel=1e-9)


@pytest.mark.parametrize("kernel", [(2,), (5,), (3, 3), (2, 4), (5, 5), (3, 3, 3)])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 7.0)])
def test_smoothness_alternating_signs_is_minus_one(kernel, scale, offset):
    """For odd sizes too, where the two signs are not equally many."""
    board = torch.tensor([(-1.0) ** sum(p) for p in np.ndindex(kernel)], dtype=torch.float64).view(1, 1, *kernel)
    assert filter_smoothness(scale * board + offset) == pytest.approx(-1.0, rel=1e-9)


@pytest.mark.parametrize("size", [3, 5, 7, 11])
def test_smoothness_linear_ramp_equals_closed_form(size):
    """From the power sums of the ramp."""
    ramp = torch.arange(size, dtype=torch.float64)
    variance = (size**2 - 1) / 12
    # Neighbours are half a step to either side of a midpoint, and the midpoints are a ramp of size - 1 values:
    # E[(u - 1/2)(u + 1/2)] = E[u^2] - 1/4.
    along = ((size - 1) ** 2 - 1) / 12 - 1 / 4
    assert filter_smoothness(ramp.view(1, 1, size)) == pytest.approx(along / variance)
    # Across the ramp neighbours are equal: autocorrelation 1; both axes have equally many pairs.
    square = ramp.view(1, 1, size, 1).expand(1, 1, size, size)
    assert filter_smoothness(square) == pytest.approx((along / variance + 1) / 2)


def test_smoothness_large_smooth_kernel_is_near_numpys_correlation():
    """Where the border is negligible the definition is Pearson's correlation of neighbours."""
    noise = np.random.default_rng(0).normal(size=(400, 400))
    kernel = sum(np.roll(noise, shift, (0, 1)) for shift in itertools.product(range(3), range(3)))
    pairs = np.concatenate(
        [
            np.stack([kernel[1:].ravel(), kernel[:-1].ravel()], 1),
            np.stack([kernel[:, 1:].ravel(), kernel[:, :-1].ravel()], 1),
        ]
    )
    expected = np.corrcoef(pairs.T)[0, 1]
    assert expected > 0.6
    assert filter_smoothness(torch.tensor(kernel)[None, None]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("kernel", [(3, 3), (5,), (2, 4), (7, 7), (2, 2, 2)])
@pytest.mark.parametrize("law", ["normal", "uniform", "skewed"])
def test_smoothness_white_noise_is_minus_one_over_k_minus_one(kernel, law):
    """Monte-Carlo, within five standard errors of the exact expectation."""
    rng = np.random.default_rng(1)
    size = math.prod(kernel)
    draws = {"normal": rng.normal, "uniform": rng.uniform, "skewed": rng.exponential}[law](size=(20_000, 1, *kernel))
    singles = [filter_smoothness(torch.tensor(block)) for block in np.split(draws, 50)]
    error = np.std(singles, ddof=1) / math.sqrt(len(singles))
    assert abs(np.mean(singles) + 1 / (size - 1)) < 5 * error
    assert error < 0.01


def test_smoothness_one_value_kernels_is_nan():
    """1x1 kernels have no neighbours."""
    assert math.isnan(filter_smoothness(torch.randn(8, 4, 1, 1)))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e-30])
def test_smoothness_constant_kernels_are_skipped(value):
    """They do not pull the mean, and alone they give NaN, not a ratio of rounding errors."""
    weight = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    constant = torch.full((3, 1, 3, 3), value)
    assert filter_smoothness(torch.cat([weight, constant])) == pytest.approx(filter_smoothness(weight))
    assert math.isnan(filter_smoothness(constant))


@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), (11,)])
def test_numbers_constant_kernels_of_any_value_are_nan(kernel):
    """The mean of equal values is often not quite that value; what is left is rounding, not structure."""
    values = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    full = values.view(-1, *(1,) * len(kernel)).expand(-1, *kernel)
    assert any((one - one.mean()).abs().max() > 0 for one in full)
    for value in values:
        assert math.isnan(filter_smoothness(torch.full((1, 1, *kernel), float(value), dtype=torch.float64)))
    same = torch.rand(1, 1, *kernel, dtype=torch.float64).expand(1000, 3, *kernel)
    assert math.isnan(variance_entropy(same))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_not_finite_weight_is_nan_and_does_not_raise(bad):
    """One value spoils a layer visibly."""
    weight = torch.randn(4, 2, 3, 3)
    weight[1, 1, 0, 2] = bad
    assert math.isnan(filter_smoothness(weight))
    assert math.isnan(variance_entropy(weight))
    assert not math.isfinite(filter_movement(weight, torch.ones_like(weight)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kernel=st.sampled_from(KERNELS),
    scale=st.floats(1e-20, 1e20) | st.floats(-1e20, -1e-20),
    offset=st.floats(-2, 2),
)
def test_smoothness_and_entropy_scale_shift_and_order_of_kernels_do_not_matter(seed, kernel, scale, offset):
    """Both are about shape."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4, *kernel, generator=generator, dtype=torch.float64)
    order = torch.randperm(20, generator=generator)
    other = ((weight + offset) * scale).flatten(0, 1)[order].view(2, 10, *kernel)
    assert filter_smoothness(other) == pytest.approx(filter_smoothness(weight), abs=1e-9)
    assert variance_entropy(other) == pytest.approx(variance_entropy(weight), abs=1e-9)
    assert 0.0 <= variance_entropy(weight) <= 1.0


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (2, 3, 3, 3), (6, 5, 7), (3, 2, 2, 3, 2)])
def test_entropy_random_weight_equals_eigenvalues_of_numpys_covariance(shape):
    """More kernels than values of one, and fewer."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    size = math.prod(shape[2:])
    values = np.linalg.eigvalsh(np.cov(weight.double().reshape(-1, size).numpy().T)).clip(1e-300)
    shares = values / values.sum()
    assert variance_entropy(weight) == pytest.approx(-(shares * np.log10(shares)).sum() / math.log10(size), rel=1e-9)


def test_entropy_two_equal_directions_equals_closed_form():
    """Kernels +-a, +-b with a and b orthogonal and equally long: two shares of a half."""
    a, b = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    a[0, 0, 0], b[0, 2, 1] = 2.0, 2.0
    weight = torch.stack([a, -a, b, -b])
    assert variance_entropy(weight) == pytest.approx(math.log10(2) / math.log10(9))


def test_entropy_all_directions_equal_is_one_and_few_kernels_reach_their_bound():
    """An orthonormal basis with both signs; and n kernels at the corners of a simplex."""
    basis = torch.eye(9).view(9, 1, 3, 3)
    assert variance_entropy(torch.cat([basis, -basis])) == pytest.approx(1.0)
    assert variance_entropy(basis[:4]) == pytest.approx(math.log10(3) / math.log10(9))


@pytest.mark.parametrize("weight", [torch.ones(8, 4, 3, 3) * 0.1, torch.zeros(2, 2, 3), torch.randn(9, 9, 1, 1)])
def test_entropy_undefined_is_nan(weight):
    """Kernels that are all the same, and 1x1."""
    assert math.isnan(variance_entropy(weight))
    assert math.isnan(variance_entropy(torch.randn(1, 1, 3, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_movement_equals_naive_loop(dtype):
    """Computed in float64, whatever the type of the weights."""
    now, start = torch.randn(3, 2, 3, 3).to(dtype), torch.randn(3, 2, 3, 3).to(dtype)
    moved = math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(now.flatten(), start.flatten(), strict=True)))
    expected = moved / math.sqrt(sum(float(b) ** 2 for b in start.flatten()))
    assert filter_movement(now, start) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 3, 3, 3), (7, 5, 5), (3, 2, 7, 7), (60, 1, 1, 1), (16, 2, 2, 2, 3)])
@pytest.mark.parametrize("block", [1, 30, 100])
def test_numbers_in_blocks_equal_those_of_the_whole(shape, block, monkeypatch):
    """Blocks of less than a kernel, of some that don't divide the weight, and of one of the axes kept otherwise."""
    generator = torch.Generator().manual_seed(6)
    weight, start = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    whole = filter_numbers({"a": weight}, {"a": start})["a"]
    monkeypatch.setattr(filters, "_BLOCK", block)
    assert filter_numbers({"a": weight}, {"a": start})["a"] == pytest.approx(whole, rel=1e-12, nan_ok=True)
    turned = weight.transpose(0, -1).contiguous().transpose(0, -1)
    assert filter_numbers({"a": turned}, {"a": start})["a"] == pytest.approx(whole, rel=1e-12, nan_ok=True)


def test_numbers_in_blocks_a_spread_in_one_block_alone_counts_and_so_does_a_nan(monkeypatch):
    """All kernels the same but for one of the last block; then one value that is not finite, first and last."""
    weight = torch.full((50, 1, 3, 3), 0.1)
    weight[-1, 0, 1, 1] = 0.2
    whole = filter_smoothness(weight), variance_entropy(weight)
    monkeypatch.setattr(filters, "_BLOCK", 20)
    assert (filter_smoothness(weight), variance_entropy(weight)) == pytest.approx(whole, rel=1e-9)
    assert not math.isnan(whole[1])
    for place in (0, -1):
        spoilt = weight.clone()
        spoilt[place, 0, 0, 0] = math.nan
        assert math.isnan(filter_smoothness(spoilt))
        assert math.isnan(variance_entropy(spoilt))
        assert math.isnan(filter_movement(spoilt, weight))


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 1, 5), (4, 2, 3, 3), (2, 3, 1, 1), (1, 4, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_leave_the_weights_as_they_are(shape, dtype):
    """Of float64, the type that is computed in, and of a single kernel views may be taken for copies."""
    weight, start = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    before = weight.clone(), start.clone()
    filter_numbers({"a": weight}, {"a": start})
    filter_smoothness(weight), variance_entropy(weight), filter_movement(weight, start)
    assert torch.equal(weight, before[0])
    assert torch.equal(start, before[1])


def test_movement_zeros_equals_the_stated_limits():
    """Nothing to nothing is no movement; away from nothing is infinite; to nothing is one's own length."""
    zero, one = torch.zeros(2, 1, 3), torch.ones(2, 1, 3)
    assert filter_movement(zero, zero) == 0.0
    assert filter_movement(one, zero) == math.inf
    assert filter_movement(zero, one) == 1.0
    assert filter_movement(one, one) == 0.0
    assert filter_movement(torch.zeros(3, 0), torch.zeros(3, 0)) == 0.0
    assert filter_movement(torch.tensor(3.0), torch.tensor(2.0)) == 0.5


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 5),
        nn.Conv3d(2, 4, (2, 3, 3)),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
)
def test_filter_numbers_many_layers_equals_one_by_one(module):
    """One copy from the device gives the same as three calls a layer."""
    start = {"a": torch.randn_like(module.weight)}
    weights = {"a": module.weight, "b": torch.randn(4, 4, 1, 1), "c": torch.randn(2, 2, 3, 3)}
    numbers = filter_numbers(weights, start)
    assert list(numbers) == ["a", "b", "c"]
    assert numbers["a"] == pytest.approx(
        (
            filter_smoothness(module.weight),
            variance_entropy(module.weight),
            filter_movement(module.weight, start["a"]),
        ),
        rel=1e-12,
    )
    assert all(math.isnan(number) for number in numbers["b"])
    assert numbers["c"].smoothness == pytest.approx(filter_smoothness(weights["c"]))
    assert math.isnan(numbers["c"].movement)
    assert filter_numbers({}, {}) == {}


@pytest.mark.parametrize(
    "weight", [torch.randn(3, 3), torch.ones(2, 2, 3, dtype=torch.long), torch.randn(2, 2, 3) * 1j, torch.ones(0, 2, 3)]
)
def test_smoothness_and_entropy_wrong_weight_is_refused_with_shape_and_type(weight):
    """Linear weights, integers, complex numbers, nothing."""
    with pytest.raises(ValueError, match=r"Expected `weight` to be .* got shape \("):
        filter_smoothness(weight)
    with pytest.raises(ValueError, match=r"Expected `weight` to be .* got shape \("):
        variance_entropy(weight)


def test_movement_wrong_arguments_are_refused():
    """Shapes that would broadcast, and types without fractions."""
    with pytest.raises(ValueError, match=r"shape of `weight`, \(2, 3\), but got \(1, 3\)"):
        filter_movement(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"floating-point tensors, but got torch.int64"):
        filter_movement(torch.ones(2, dtype=torch.long), torch.ones(2))
