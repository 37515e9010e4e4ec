"""Embeddings: what a network makes of an image before its last layer turns it into class scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp._options import check_positive_int, did_you_mean, expected
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.hooks import QuietHook
from lightning_interp.functional.ops import OWNERS
from lightning_interp.functional.undisturbed import undisturbed

# Layers whose three-dimensional output is (N, channels, length); that of all others is (N, tokens, features).
_CHANNELS_SECOND = (
    nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.AvgPool1d, nn.MaxPool1d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d,
)  # fmt: skip
_MATRIX, _TOKENS = 2, 3


class NoEmbeddingError(ValueError):
    """A model gives no embedding; the message says what to do."""


@dataclass(frozen=True)
class EmbeddingPlace:
    """Where in a model the embedding is.

    Attributes:
        layer: Name as in `model.named_modules()`.
        before: Whether it is what the layer takes (the head), not what it returns.
        gives_scores: Whether the layer's output (N, classes) is what the model returns: then it is the head itself.
    """

    layer: str
    before: bool
    gives_scores: bool = False


def embed(model: nn.Module, images: Tensor, *, layer: str | None = None, batch_size: int = 256) -> Tensor:
    """The embedding of each image: the features from which the last layer computes the class scores.

    Feature maps are averaged over their positions, tokens over their number. The model runs in eval mode and is left
    as it was.

    Args:
        model: Any module that can be called with the images.
        images: (N, C, H, W), floating.
        layer: Takes what this layer returns, a name as in `model.named_modules()`; None takes what goes into the last
            Linear layer that is called (into the last convolution where there is none).
        batch_size: Most images in a forward.

    Returns:
        (N, D) in float32 or float64, detached, on the device of the model's output.

    Raises:
        ArgumentError: If an argument is wrong.
        NoEmbeddingError: If no layer is found, or the features are not one row an image.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> images = torch.ones(5, 1, 2, 2)
        >>> torch.equal(embed(net, images), net[:3](images))
        True
    """
    _check(images)
    check_positive_int("batch_size", batch_size)
    with undisturbed(model, training=False):
        place = find_embedding(model, images[:1], layer)
        rows = []
        for part in torch.split(images, batch_size):
            with embedding_tap(model, place) as tap:
                model(part)
            rows.append(tap.rows(len(part)).detach())
    return torch.cat(rows)


def find_embedding(model: nn.Module, images: Tensor, layer: str | None = None) -> EmbeddingPlace:
    """Where the embedding is, found by one forward; to be called where the model may run.

    Args:
        model: Any module that can be called with the images.
        images: (N, ...), a few will do.
        layer: Name of a layer whose output is the embedding; None looks for the head.

    Raises:
        ArgumentError: If there is no layer of that name.
        NoEmbeddingError: If no layer with weights gives one row an image.
    """
    modules = dict(model.named_modules())
    if layer is not None:
        if layer not in modules or not layer:
            near = did_you_mean(layer, list(modules))
            raise ArgumentError(f"No layer is called {layer!r}, given as argument `layer`. {near}".rstrip())
        return EmbeddingPlace(layer, before=False)
    called: list[tuple[str, nn.Module, torch.Size]] = []

    def hear(name: str) -> QuietHook:
        return QuietHook(lambda module, _, output: called.append((name, module, output.shape)))

    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, OWNERS):
                stack.callback(module.register_forward_hook(hear(name)).remove)
        output = model(images)
    fitting = [(name, module, shape) for name, module, shape in called if shape[:1] == images.shape[:1]]
    linear = [each for each in fitting if isinstance(each[1], nn.Linear)]
    if not fitting:
        raise NoEmbeddingError(
            "Expected a model whose last layer is a Linear layer or a convolution, but none of these was called. Name "
            "a layer whose output is the embedding: `layer=`."
        )
    name, _, shape = (linear or fitting)[-1]
    scores = isinstance(output, Tensor) and output.shape == shape and len(shape) == _MATRIX
    return EmbeddingPlace(name, before=True, gives_scores=scores)


class EmbeddingTap:
    """What went past a place while the model ran."""

    def __init__(self, place: EmbeddingPlace, module: nn.Module) -> None:
        """Begins empty; see `embedding_tap`."""
        self.place = place
        self._module = module
        self._rows: Tensor | None = None
        self._heard = "nothing"

    def hear(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook; a layer that is called several times is heard the last time."""
        found = (args[0] if args else None) if self.place.before else output
        self._rows = None
        self._heard = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        if isinstance(found, Tensor) and found.ndim >= _MATRIX and found.numel():
            self._rows = self._one_row_an_image(found)

    def rows(self, count: int) -> Tensor:
        """The embedding (N, D) of the last forward, in float32 or float64; with its graph, if one was recorded.

        Args:
            count: N, the number of images that went in.

        Raises:
            NoEmbeddingError: If nothing was heard, or it is not one row an image.
        """
        rows, self._rows = self._rows, None
        if rows is None or len(rows) != count:
            raise NoEmbeddingError(
                f"Expected the {'input' if self.place.before else 'output'} of layer {self.place.layer!r} to hold "
                f"features of {count} images, (N, D) or more axes, but got {self._heard}. Name another layer: `layer=`."
            )
        return rows

    def _one_row_an_image(self, found: Tensor) -> Tensor:
        """The mean over positions, a new tensor in any case: what follows may write into the old one."""
        found = found if found.dtype == torch.float64 else found.float()
        if found.ndim == _MATRIX:
            return found.clone()
        if self.place.before and isinstance(self._module, nn.Linear):
            second = False  # the features are the last axis of what a Linear layer takes
        else:
            second = found.ndim > _TOKENS or isinstance(self._module, _CHANNELS_SECOND)
        return found.flatten(2).mean(dim=2) if second else found.flatten(1, -2).mean(dim=1)


@contextmanager
def embedding_tap(model: nn.Module, place: EmbeddingPlace) -> Iterator[EmbeddingTap]:
    """While it is entered, each forward of the model leaves its embedding in the tap.

    Args:
        model: The model in which the place was found.
        place: From `find_embedding`.
    """
    module = dict(model.named_modules())[place.layer]
    tap = EmbeddingTap(place, module)
    handle = module.register_forward_hook(QuietHook(tap.hear))
    try:
        yield tap
    finally:
        handle.remove()


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim < _MATRIX or not images.is_floating_point() or not images.numel():
        found = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise expected("images", "a floating tensor (N, C, H, W)", found)
