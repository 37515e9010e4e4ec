"""Reads class scores out of whatever a model returns.

| `module(images)` returns | scores |
|---|---|
| (N, classes) | as they are |
| (N,) or (N, 1): a binary score z | two columns, -z/2 and z/2, whose softmax is 1 - sigmoid(z) and sigmoid(z) |
| tuple or list | its first item that is not a number; else its only item that holds scores |
| dict or other mapping | the first of `SCORE_KEYS` that it has; else its only value that holds scores |
| object with an attribute `logits` | that |
| anything else | what `interp_scores(images)` of the LightningModule returns, in one of these forms |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_interp.callbacks._regression import read_regression
from lightning_interp.callbacks.batches import NoScoresError, UnreadableError
from lightning_interp.functional.own_state import call_with, places_of
from lightning_interp.functional.spatial import NoFeatureMapsError

__all__ = ["ScoreModel", "UnreadableError", "class_probabilities", "read_scores", "read_targets", "sample_losses"]

SCORE_KEYS = ("logits", "logit", "scores", "score", "output", "outputs", "out", "prediction", "predictions", "y_hat")
_WAY_OUT = "Give the LightningModule a method `interp_scores(images)` that returns (N, classes)."

_HALF = (torch.float16, torch.bfloat16)


class ScoreModel(nn.Module):
    """`scores = ScoreModel(module)(images)`: (N, ...) -> (N, classes), whatever the module takes and returns.

    Short-lived: make a new one for each measurement. The module is not touched; `named_modules()` gives its own names,
    so layers are named as the user knows them. Where parameters are in half precision, the forward runs on float32
    copies of them, taken when this object is made: gradients in bfloat16 correlate with those in float32 by 0.97 only.

    Attributes:
        module: The user's module.
    """

    module: nn.Module
    _copies: dict[str, Tensor]

    def __init__(self, module: nn.Module) -> None:
        """Wraps a module.

        Args:
            module: Its method `interp_scores(images)` wins over its `forward` if it has one.
        """
        super().__init__()
        self.__dict__["module"] = module  # not registered: names and parameters come through `named_modules`
        self.__dict__["_copies"] = _float32_copies(module)
        self.training = module.training

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, classes) in float32 or float64.

        Raises:
            UnreadableError: If the module can't be called with images, or no scores are found in its output.
        """
        try:
            output = self._call(images)
        except (torch.OutOfMemoryError, UnreadableError, NoFeatureMapsError):
            raise
        except Exception as error:
            raise NoScoresError(
                f"Calling {type(self.module).__name__} with images {tuple(images.shape)} raised "
                f"{type(error).__name__}: {str(error).rstrip('.')}. {_WAY_OUT}"
            ) from error
        scores = read_scores(output, len(images))
        return scores.float() if scores.dtype in _HALF else scores

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the wrapped module, under their own names."""
        yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def _call(self, images: Tensor) -> Any:
        caller = _Caller(self.module)
        if self._copies:
            try:
                return call_with(caller, self._copies, images.float())
            except RuntimeError:  # a forward that casts by itself, to `self.dtype` for example
                self._copies.clear()
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), images.dtype)
        return caller(images.to(dtype) if images.is_floating_point() else images)


class _Caller(nn.Module):
    """Calls the module, or its `interp_scores`; a module of its own, since `call_with` calls `forward` only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        own = getattr(self.module, "interp_scores", None)
        return self.module(images) if own is None else own(images)


def read_scores(output: Any, count: int) -> Tensor:
    """Finds class scores in the output of a model.

    Args:
        output: See the table at the head of this file.
        count: N, the number of images.

    Returns:
        (N, classes), at least two classes.

    Raises:
        UnreadableError: If there are none, or it is not clear which ones they are.

    Example:
        >>> read_scores({"loss": torch.tensor(1.0), "logits": torch.tensor([[2.0]])}, 1)
        tensor([[-1.,  1.]])
    """
    found = _find(output, count)
    if found is None:
        raise NoScoresError(
            f"Expected scores of {count} images, (N, classes) or (N,), alone or in a tuple or dict, but got "
            f"{_describe(output)}. {_WAY_OUT}"
        )
    if found.ndim == 1 or found.shape[1] == 1:
        half = found.reshape(count) / 2
        return torch.stack((-half, half), dim=1)
    return found


def _find(output: Any, count: int) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if _holds_scores(output, count) else None
    if isinstance(output, Mapping):
        named = [output[key] for key in SCORE_KEYS if key in output]
        return _first_or_only(named[:1] or list(output.values()), count, first=bool(named))
    if isinstance(output, list | tuple):
        return _first_or_only(list(output), count, first=True)
    inner = getattr(output, "logits", None)
    return None if inner is None else _find(inner, count)


def _first_or_only(values: list[Any], count: int, *, first: bool) -> Tensor | None:
    """The first tensor that is not a single number (a loss), if it holds scores; else the only one that does."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    candidates = [tensor for tensor in tensors if _holds_scores(tensor, count)]
    if first and candidates and candidates[0] is tensors[0]:
        return candidates[0]
    return candidates[0] if len(candidates) == 1 else None


def _holds_scores(tensor: Tensor, count: int) -> bool:
    return tensor.ndim in (1, 2) and tensor.shape[0] == count and tensor.numel() > 0 and tensor.is_floating_point()


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)} and type {output.dtype}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with keys {list(output)!r}"
    if isinstance(output, list | tuple):
        return f"a {type(output).__name__} of {', '.join(_describe(item) for item in output) or 'nothing'}"
    return f"a {type(output).__name__}"


def read_targets(labels: Tensor | None, scores: Tensor) -> Tensor | None:
    """One class per image.

    Args:
        labels: (N,) or (N, 1) indices (also 0.0 and 1.0 of a binary task); (N, classes) one-hot, soft or multi-label:
            of the classes with the largest label the one with the highest score.
        scores: (N, classes).

    Returns:
        (N,) integers in [0, classes), or None if there are no labels that say so (negative ones are "ignore"; those of
        a regression are no classes).
    """
    if labels is None or labels.shape[:1] != scores.shape[:1] or read_regression(scores, labels) is not None:
        return None
    if labels.shape == scores.shape:
        best = labels == labels.amax(dim=1, keepdim=True)
        return scores.detach().masked_fill(~best.to(scores.device), -torch.inf).argmax(dim=1)
    if labels.numel() != len(scores):
        return None
    flat = labels.reshape(-1).to(scores.device)
    targets = (flat.round() if flat.is_floating_point() else flat).long()
    return targets if bool(((targets >= 0) & (targets < scores.shape[1])).all()) else None


def class_probabilities(scores: Tensor, labels: Tensor | None = None) -> Tensor:
    """Softmax; sigmoid for multi-label tasks, which are known by labels that don't sum to one.

    Args:
        scores: (N, classes).
        labels: As in `read_targets`.

    Returns:
        (N, classes) in [0, 1].
    """
    return scores.sigmoid() if _multi_label(scores, labels) else scores.softmax(dim=1)


def sample_losses(scores: Tensor, labels: Tensor | None) -> Tensor | None:
    """Cross-entropy of each image (nats; the mean over classes for multi-label tasks), None without labels of classes.

    Returns:
        (N,), at least 0.
    """
    if labels is not None and _multi_label(scores, labels):
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="none").mean(dim=1)
    targets = read_targets(labels, scores)
    if targets is None:
        return None
    return F.cross_entropy(scores, targets, reduction="none") + 0.0  # that of a sure prediction is -0.0


def _multi_label(scores: Tensor, labels: Tensor | None) -> bool:
    if labels is None or labels.shape != scores.shape or read_regression(scores, labels) is not None:
        return False
    return not torch.allclose(labels.double().sum(dim=1), torch.ones((), dtype=torch.float64, device=labels.device))


def _float32_copies(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers in float32 under the names that `_Caller` gives them; empty where none is in half."""
    if not any(parameter.dtype in _HALF for parameter in module.parameters()):
        return {}
    return {
        f"module.{name}": tensor.detach().float() if tensor.dtype in _HALF else tensor
        for name, tensor in places_of(module).items()
    }
