"""In which direction a training image would have to change to make a test image's loss rise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_interp._options import expected
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.gradients import gradients_of
from lightning_interp.functional.influence_head import HeadInfluence


class NoPixelGradientError(ArgumentError):
    """No gradient reaches the pixels of the image."""


def perturbation_direction(  # noqa: PLR0913, PLR0917 - a training image, and a test image
    embed: Callable[[Tensor], Tensor],
    image: Tensor,
    label: int,
    influence: HeadInfluence,
    test_embedding: Tensor,
    test_label: int,
) -> Tensor:
    """Gradient of a test image's loss with regard to the pixels of one training image, through the refitted head.

    phi(x) = -g_test^T H^-1 g(x) / n, with g(x) the gradient of the training image's loss with regard to the head; the
    result is d phi / d x. A small step along it, followed by refitting the head, raises the test loss most; the rise is
    the scalar product of step and result. The network below the head stays as it is.

    Args:
        embed: Images (1, C, H, W) to embeddings (1, d), differentiable; those that `influence` was made of, and from a
            network in the same mode.
        image: (C, H, W), floating; one of the training images of `influence`.
        label: Its label.
        influence: Of the head on the training embeddings.
        test_embedding: (d,).
        test_label: Its label.

    Returns:
        (C, H, W), in nats per unit of a pixel, in the dtype of `image` and on its device. Where max-pooling or a ReLU
        has a kink, one of the two slopes.

    Raises:
        ArgumentError: If an argument is wrong.
        NoPixelGradientError: If the embedding does not depend on the image, as far as autograd knows; an ArgumentError.
        CheckpointedError: If the network is checkpointed with `use_reentrant=True`.

    Cost: one forward and backward of `embed`, one solution with the Hessian.
    Source: Koh and Liang 2017, equation 5.

    Example:
        >>> images, labels = torch.tensor([-1.0, -2.0, 1.0]).view(3, 1, 1, 1), torch.tensor([0, 0, 1])
        >>> influence = HeadInfluence(images.flatten(1), labels)
        >>> perturbation_direction(lambda x: x.flatten(1), images[2], 1, influence, torch.tensor([2.0]), 1) > 0
        tensor([[[True]]])
    """
    if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
        found = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise expected("image", "a floating tensor (C, H, W)", found)
    classes = influence.loss.num_classes
    for name, value in (("label", label), ("test_label", test_label)):
        if not 0 <= int(value) < classes:
            raise expected(name, f"a class in [0, {classes})", value)
    solved = influence.inverse_gradient(test_embedding.reshape(1, -1), torch.tensor([int(test_label)]))[0]
    with torch.inference_mode(False), torch.enable_grad():
        # Clones: what was made in inference mode can't be saved for a backward.
        weight, solved = influence.head.weight.clone(), solved.clone()
        pixels = image.detach().clone()[None].requires_grad_()
        embedding = embed(pixels)
        if embedding.shape != (1, weight.shape[1] - 1):
            raise expected("embed", f"a function to (1, {weight.shape[1] - 1})", f"{tuple(embedding.shape)}")
        features = embedding[0].to(weight.device, torch.float64)
        features = torch.cat([features, features.new_ones(1)])
        given = torch.nn.functional.one_hot(torch.tensor(int(label), device=weight.device), classes)
        residual = torch.softmax(weight @ features, dim=0) - given
        phi = -(residual * (solved @ features)).sum() / len(influence)
        (gradient,) = gradients_of(phi, [pixels]) if phi.requires_grad else (None,)
    if gradient is None:
        raise NoPixelGradientError(
            "Expected an embedding that is differentiable by the pixels of the image, but no gradient reaches them: "
            "something on the way is detached, quantised, or runs under `torch.no_grad()`."
        )
    return gradient[0].detach()
