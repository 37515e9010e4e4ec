"""Images that a network takes for a class, and how much it takes them for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp._options import check_choice, check_positive_int, expected
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.gradients import NO_PIXEL_GRADIENT, gradients_of
from lightning_interp.functional.image_prior import FourierPrior, PixelPrior
from lightning_interp.functional.jitter import jittered
from lightning_interp.functional.undisturbed import undisturbed

Method = Literal["fourier", "simonyan"]
METHODS: tuple[Method, ...] = ("fourier", "simonyan")

_RATE = {"fourier": 0.05, "simonyan": 0.05}
_PENALTY = {"fourier": 2.0, "simonyan": 0.1}
_GAIN = 1.0
# One draw more than these would change the mean probability by less than 0.02.
_DRAWS = 16


def maximize_class(  # noqa: PLR0913 - options, by keyword
    model: nn.Module,
    classes: Sequence[int],
    *,
    data: Tensor,
    steps: int = 128,
    method: Method = "fourier",
    seed: int = 0,
) -> Tensor:
    """One image for each class that makes its score large.

    I* = argmax S_c(T(I)) - penalty * |I - mean|^2, S_c before the softmax, by Adam

    | method | I | T |
    |---|---|---|
    | `fourier` | with the data's spectrum and colours (`FourierPrior`) | small shift, scale, rotation, each step anew |
    | `simonyan` | pixels in units of the data's standard deviation | nothing |

    `simonyan` reaches the higher scores and probabilities, mostly with noise that nobody else recognises; see
    `class_evidence` for the number that tells. All classes are optimised in one batch and don't influence one another;
    the same seed gives the same images.

    Args:
        model: `model(images) -> (N, classes)`, scores before the softmax; runs in eval mode, nothing of it is changed.
        classes: Indices, K of them.
        data: (M, C, H, W), a batch as the model receives it, M of 16 or more; labels are not needed.
        steps: Steps of Adam.
        method: See above.
        seed: Of the generator of its own.

    Returns:
        (K, C, H, W), in the model's input space, on the device of `data`.

    Raises:
        ArgumentError: If an argument is wrong.

    Cost: `steps` forwards and backwards of K images.
    Source: Simonyan, Vedaldi and Zisserman 2013, section 2; Olah, Mordvintsev and Schubert 2017 (Distill).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> maximize_class(net, [0, 2], data=torch.rand(16, 1, 8, 8), steps=4).shape
        torch.Size([2, 1, 8, 8])
    """
    check_choice("method", method, METHODS)
    indices = _checked(classes, data)

    def scores(images: Tensor) -> Tensor:
        found: Tensor = model(images)
        if found.ndim != 2 or max(classes) >= found.shape[1]:
            raise ArgumentError(
                f"Expected argument `classes` to hold indices of the model's scores, but got {list(classes)} and "
                f"scores of shape {tuple(found.shape)}."
            )
        return found.gather(1, indices[:, None])[:, 0]

    with undisturbed(model, training=False, gradients=True):
        return ascend(scores, len(indices), data=data, steps=steps, method=method, seed=seed)


def ascend(  # noqa: PLR0913
    objective: Callable[[Tensor], Tensor],
    count: int,
    *,
    data: Tensor,
    steps: int,
    method: Method,
    seed: int,
    penalty: float | None = None,
    contrast: float = 1.0,
) -> Tensor:
    """Images that make an objective large; gradients must be recorded outside.

    Args:
        objective: (count, C, H, W) -> (count,), one number for each image.
        count: Number of images.
        data: As in `maximize_class`.
        steps: Likewise.
        method: Likewise.
        seed: Likewise.
        penalty: On the mean squared distance to the mean, in units of the variance; None takes that for class scores.
        contrast: Of the image to start from; a larger one for what does not respond to a plain image.

    Raises:
        RuntimeError: If the objective does not depend on the pixels in a way that autograd knows.
    """
    check_positive_int("steps", steps)
    data = data.detach().float() if data.dtype != torch.float64 else data.detach()
    prior = FourierPrior(data, gain=_GAIN) if method == "fourier" else PixelPrior(data)
    spread = data.std(dim=(0, 2, 3), correction=0)[:, None, None].clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed)
    weight = _PENALTY[method] if penalty is None else penalty
    variable = contrast * prior.start(count, generator)
    adam = _Adam(_RATE[method])
    arrived: list[bool] = []  # gradients of the objective, and not only of the penalty
    for _ in range(steps):
        variable.requires_grad_(True)
        images = prior.images(variable)
        seen = jittered(images, generator) if method == "fourier" else images.view_as(images)
        distance = ((images - prior.mean) / spread).square().mean(dim=(1, 2, 3))
        seen.register_hook(lambda _: arrived.append(True))  # type: ignore[no-untyped-call]
        loss = (weight * distance - objective(seen)).sum()
        (gradient,) = gradients_of(loss, [variable])
        if not arrived:
            raise RuntimeError(NO_PIXEL_GRADIENT)
        variable = adam.step(variable.detach(), torch.zeros_like(variable) if gradient is None else gradient)
    with torch.no_grad():
        return prior.images(variable)


class ClassEvidence(NamedTuple):
    """How much a network takes images for their classes.

    Attributes:
        score: (K,), before the softmax.
        probability: (K,), in [0, 1]; noise reaches 1 as well.
        augmented: (K,), mean probability under small shifts, scalings and rotations: the honest one.
    """

    score: Tensor
    probability: Tensor
    augmented: Tensor


def class_evidence(
    model: nn.Module, images: Tensor, classes: Sequence[int], *, draws: int = _DRAWS, seed: int = 1
) -> ClassEvidence:
    """Score, probability, and probability under small random movements, of each image for its class.

    Args:
        model: `model(images) -> (N, classes)`; runs in eval mode, nothing of it is changed.
        images: (K, C, H, W).
        classes: K indices.
        draws: Movements, the same ones for all images.
        seed: Of the generator of its own; another one than `maximize_class` has had by default.

    Raises:
        ArgumentError: If an argument is wrong.

    Cost: 1 + `draws` forwards of K images.
    """
    check_positive_int("draws", draws)
    indices = _checked(classes, images)[:, None]
    if len(indices) != len(images):
        raise expected("classes", f"{len(images)} indices, one for each image", list(classes))
    generator = torch.Generator().manual_seed(seed)
    with undisturbed(model, training=False):
        scores = model(images)
        moved = [model(jittered(images, generator)).softmax(dim=1) for _ in range(draws)]
        augmented = torch.stack(moved).mean(dim=0)
    return ClassEvidence(
        scores.gather(1, indices)[:, 0],
        scores.softmax(dim=1).gather(1, indices)[:, 0],
        augmented.gather(1, indices)[:, 0],
    )


class _Adam:
    """Kingma and Ba 2015, algorithm 1; torch's own would call optimizer hooks that a user has registered globally."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._steps = 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None

    def step(self, value: Tensor, gradient: Tensor) -> Tensor:
        self._steps += 1
        self._mean = 0.1 * gradient + (0.9 * self._mean if self._mean is not None else 0)
        self._square = 0.001 * gradient.square() + (0.999 * self._square if self._square is not None else 0)
        mean = self._mean / (1 - 0.9**self._steps)
        square = self._square / (1 - 0.999**self._steps)
        return value - self.rate * mean / (square.sqrt() + 1e-8)


def _checked(classes: Sequence[int], images: Tensor) -> Tensor:
    if not len(classes) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in classes):
        raise expected("classes", "a list of at least one class index", classes)
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise expected("data", "(M, C, H, W) of floating point numbers", (tuple(images.shape), images.dtype))
    return torch.tensor(list(classes), device=images.device)
