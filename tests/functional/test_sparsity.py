"""Shares of exact zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.sparsity import sparsity, zero_fraction


def naive(activations, axis):
    """One value after the other."""
    rows = activations.movedim(axis, 0).flatten(1).tolist()
    return [sum(value == 0 for value in row) / len(row) for row in rows]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.data())
def test_sparsity_equals_a_naive_loop(shape, data):
    """Any axis, positive and negative values, zeros of either sign."""
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    seed = data.draw(st.integers(0, 99))
    numbers = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 0.3
    result = sparsity(numbers, channel_axis=axis)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(naive(numbers, axis), abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 5))
def test_a_batch_is_the_mean_of_its_images(count, width):
    """Equal parts: the whole is the mean."""
    numbers = torch.randn(count, width, 3, generator=torch.Generator().manual_seed(count)).relu()
    parts = torch.stack([sparsity(image[None]) for image in numbers]).mean(dim=0)
    assert torch.allclose(sparsity(numbers), parts)


def test_scale_does_not_matter_and_tiny_is_not_zero():
    """Only an exact zero is one."""
    numbers = torch.tensor([[1e-30, 0.0], [-1e-30, 5.0]])
    assert sparsity(numbers).tolist() == [0.0, 0.5]
    assert torch.equal(sparsity(numbers * 1e20), sparsity(numbers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_many_values_in_a_coarse_type_are_counted_exactly(dtype):
    """70000 ones do not fit into a sum in half precision."""
    numbers = torch.ones(1, 2, 70_000, dtype=dtype)
    numbers[0, 1, :35_000] = 0
    assert zero_fraction(numbers).tolist() == [0.0, 0.5]


def test_nan_is_not_hidden():
    """A channel that holds NaN has no share."""
    numbers = torch.zeros(1, 2, 2)
    numbers[0, 1, 0] = float("nan")
    assert sparsity(numbers)[0] == 1.0
    assert sparsity(numbers)[1].isnan()


@pytest.mark.parametrize(
    ("activations", "axis", "match"),
    [
        (torch.zeros(3), 0, r"`activations`.*non-empty tensor.*\(3,\)"),
        (torch.zeros(0, 2), 1, r"`activations`.*\(0, 2\)"),
        (torch.zeros(2, 2), 2, r"`channel_axis`.*\(2, 2\).*2"),
        (torch.zeros(2, 2), -3, r"`channel_axis`.*-3"),
    ],
)
def test_wrong_arguments(activations, axis, match):
    """Named, with what came."""
    with pytest.raises(ArgumentError, match=match):
        sparsity(activations, channel_axis=axis)
