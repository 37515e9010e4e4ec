"""Recognises the loss functions that a training step calls, so that the same loss can be computed again."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_interp.functional.hooks import in_backward, leave_mode

LOSSES: frozenset[Callable[..., Tensor]] = frozenset({
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.huber_loss, F.kl_div,
})  # fmt: skip
"""The functions that are recognised; the modules (`nn.CrossEntropyLoss` and so on) call them."""

_CLASSIFICATION = (F.cross_entropy, F.nll_loss)
_MOST_CALLS = 256
_SIGNATURES = {function: inspect.signature(function) for function in LOSSES}


@dataclass(frozen=True, eq=False)
class LossCall:
    """One call of a loss function.

    Attributes:
        function: One of `LOSSES`.
        arguments: All arguments but `input`, by name: targets, class weights, label smoothing, ...
        value: What it returned, detached; 0-d unless `reduction="none"`.
        num_classes: Number of classes C, where a blind guess costs ln C: known for the mean cross-entropy (or negative
            log-likelihood) of targets that are class indices, else None.
    """

    function: Callable[..., Tensor]
    arguments: Mapping[str, Any]
    value: Tensor
    num_classes: int | None
    _scores: weakref.ref[Tensor]

    @property
    def name(self) -> str:
        """Name of the function, for example `cross_entropy`."""
        return str(self.function.__name__)

    @property
    def scores(self) -> Tensor | None:
        """The tensor that went in as `input`, or None once nothing else keeps it."""
        return self._scores()

    def again(self, scores: Tensor) -> Tensor:
        """The same loss of other scores.

        Args:
            scores: Shape of the first ones.

        Returns:
            Shape of `value`; with a graph if autograd records.
        """
        return self.function(scores, **self.arguments)


class LossCapture(TorchFunctionMode):
    """While it is on, notes the calls of loss functions; it changes no result.

    What runs inside autograd's backward and inside `torch.func` transformations is left out.

    Attributes:
        calls: In the order in which they were made, at most 256.
        error: What went wrong while noting; it is never raised inside the user's code.

    Example:
        >>> scores, target = torch.zeros(4, 10), torch.arange(4)
        >>> with LossCapture() as capture:
        ...     loss = torch.nn.CrossEntropyLoss()(scores, target)
        >>> capture.calls[0].name, capture.calls[0].num_classes
        ('cross_entropy', 10)
        >>> bool(capture.calls[0].again(scores) == loss)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self.error: Exception | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function as it is, and notes it if it is a loss."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in LOSSES and self.error is None and not torch.compiler.is_compiling():
            try:
                self._note(func, args, kwargs, output)
            except Exception as error:  # an error of ours must not become one of the user's
                self.error = error
        return output

    def _note(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if len(self.calls) >= _MOST_CALLS or in_backward() or not isinstance(output, Tensor) or _transformed(output):
            return
        arguments = dict(_SIGNATURES[func].bind(*args, **kwargs).arguments)
        scores = arguments.pop("input")
        classes = _num_classes(func, scores, arguments)
        self.calls.append(LossCall(func, arguments, output.detach(), classes, weakref.ref(scores)))

    def close(self) -> None:
        """Takes the mode off the stack wherever it is; may be called when it is not on."""
        leave_mode(self)


def _num_classes(function: Callable[..., Tensor], scores: Tensor, arguments: Mapping[str, Any]) -> int | None:
    target = arguments.get("target")
    averaged = arguments.get("size_average") in (None, True) and arguments.get("reduce") in (None, True)
    if function not in _CLASSIFICATION or not averaged or arguments.get("reduction", "mean") != "mean":
        return None
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    return int(scores.shape[1] if scores.ndim > 1 else scores.shape[0])


def _transformed(tensor: Tensor) -> bool:
    """Whether a tensor lives inside a `torch.func` transformation, and must not leave it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
