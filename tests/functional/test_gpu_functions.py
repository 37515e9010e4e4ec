"""On a GPU: the functions that take another way there give what they give on a CPU."""

import pytest
import torch

from lightning_interp.functional.jitter import jittered
from lightning_interp.functional.sparsity import sparsity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sparsity_is_that_of_a_cpu(dtype, layout):
    images = torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    images[0, 1, 2, 3], images[:, 2] = torch.nan, 0
    images[0, 3, 0, 0] = torch.inf
    there = images.cuda().contiguous(memory_format=layout)
    torch.testing.assert_close(sparsity(there).cpu(), sparsity(images), equal_nan=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_a_movement_is_that_of_a_cpu(deterministic):
    images = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for device in ("cpu", "cuda"):
            variable = images.to(device).requires_grad_(True)
            moved = jittered(variable, torch.Generator().manual_seed(2))
            assert moved.device == variable.device
            gradients.append(torch.autograd.grad((moved * weights.to(device)).sum(), variable)[0].cpu())
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(gradients[1], gradients[0])
