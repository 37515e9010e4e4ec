"""Keeps the feature maps that a forward makes: of a named layer, or of the last one that still has positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp._options import select
from lightning_interp.functional import ops

_CONVOLUTIONS = frozenset({"conv2d", "conv_transpose2d"})
_FOLLOWED = (
    ops.NON_LINEARITIES
    | ops.SUMS
    | ops.PRODUCTS
    | ops.CONCATENATIONS
    | {"batch_norm", "group_norm", "instance_norm", "layer_norm", "contiguous", "clone", "dropout", "feature_dropout"}
)


class NoFeatureMapsError(ValueError):
    """Grad-CAM needs feature maps with positions, and the model, or the layer that was named, makes none."""


class FeatureMaps(TorchFunctionMode):
    """Enter it around a forward; then `maps` holds (N, K, h, w).

    With `layer`: the output of that module, the last one if it is called more than once. Without: what the last
    convolution with more than one position becomes by the normalisations, sums, concatenations and activations that
    follow it, up to the first pooling (ResNet: the output of `layer4`; VGG: the last ReLU before the last pooling;
    DenseNet: the last ReLU). The model is not changed, and the forward gives the same values.

    Attributes:
        maps: Part of the graph; None if there are none.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        """Takes the name of a layer as in `model.named_modules()`, or None.

        Raises:
            ArgumentError: If there is no layer of that name.
        """
        super().__init__()
        self.maps: Tensor | None = None
        self._layer: nn.Module | None = None
        self._handle: Any = None
        if layer is not None:
            modules = {name: module for name, module in model.named_modules() if name}
            self._layer = modules[select("layer", [layer], list(modules))[0]]

    def __enter__(self) -> FeatureMaps:
        """Begins to listen."""
        if self._layer is not None:
            self._handle = self._layer.register_forward_hook(self._keep)
        else:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops listening; no hook is left."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        else:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise NoFeatureMapsError(
                f"Expected `layer` to be one whose output is (N, K, h, w), but its output is {shape}."
            )
        self.maps = output
        return output.clone()  # what follows may write over it: an in-place ReLU

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function as it is, and notes maps that it makes."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 4 and result.shape[2] * result.shape[3] > 1:
            name = ops.base_name(func)
            if name in _CONVOLUTIONS or (name in _FOLLOWED and self._follows(name, args, result)):
                self.maps = result
        return result

    def _follows(self, name: str, args: tuple[Any, ...], result: Tensor) -> bool:
        if self.maps is None or not args:
            return False
        if name in ops.CONCATENATIONS:
            same = (self.maps.shape[0], *self.maps.shape[2:]) == (result.shape[0], *result.shape[2:])
            return same and any(item is self.maps for item in args[0])
        return self.maps.shape == result.shape and any(item is self.maps for item in args)
