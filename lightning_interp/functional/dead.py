"""Dead filters of a model over a set of batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_interp._options import check_strings, select
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.liveness import Liveness
from lightning_interp.functional.tracing import ActivationTracer, End, Unit
from lightning_interp.functional.undisturbed import undisturbed


def dead_filters(
    model: nn.Module, batches: Iterable[Tensor], *, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Filters that never fire: exact over all batches.

    A filter is an output channel of a convolution, or a unit of a linear layer that a non-linearity follows; its
    activation is the output up to and including the first non-linearity that follows it alone (`tracing.py` says what
    that means for each kind of network). It is dead if the activation is zero at every position of every input; where
    the non-linearity has no exact zero, or there is none, if it is constant within each forward. The ReLU after a
    residual sum is reported under the name of its block.

    Args:
        model: `model(images)`; each module runs in the mode it is in, and is put back as it was.
        batches: Tensors of images (N, C, H, W), or whatever the model takes.
        layers: Names or globs of the layers to report, as in `named_modules()`; None reports all.

    Returns:
        Layer name to (C,) bool on the CPU, in the order in which the forward reaches the layers.

    Raises:
        ArgumentError: If there is no batch, or a name matches nothing.

    Cost: one forward per batch; after the first batch only suspects are read.
    Source: Lu et al. 2019 (arXiv 1903.06733); CS231n, neural networks part 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)), model[0].bias.data.zero_()
        >>> dead_filters(model, [torch.ones(4, 1, 3, 3)])
        {'0': tensor([False,  True])}
    """
    check_strings("layers", layers)
    liveness = Liveness()
    units: dict[str, Unit] = {}
    count = 0
    with undisturbed(model, training=None):
        for images in batches:
            _trace(model, images, liveness, units)
            liveness.narrow()
            count += 1
    if not count:
        raise ArgumentError("Expected argument `batches` to hold at least one batch, but got none.")
    found = liveness.dead()
    names = [name for name, unit in units.items() if unit.counts and name in found]
    return {name: found[name] for name in select("layers", layers, names)}


def _trace(model: nn.Module, images: Tensor, liveness: Liveness, units: dict[str, Unit]) -> None:
    # The output must live until the tracer is left: a last layer is read there.
    with ActivationTracer(model, liveness.read, units=units) as tracer:
        output = model(images)
    del output
    if tracer.error is not None:
        raise tracer.error


class MeanMagnitude:
    """Mean absolute activation of each channel over a window, for dormancy scores."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def read(self, end: End) -> None:
        """Takes note of one activation."""
        channels = end.layout.channels_first(end.tensor)
        # The inner axis first, in float32: a quarter of the time of a norm over both axes on a CPU.
        total = channels.abs().sum(dim=2, dtype=torch.float32).double().sum(dim=0)
        before = self._sums.get(end.unit)
        if before is None or before.shape != total.shape:  # new, or replaced by the user in mid-window
            self._sums[end.unit], self._counts[end.unit] = total, 0
        else:
            self._sums[end.unit] = before.to(total.device) + total
        self._counts[end.unit] += channels.shape[0] * channels.shape[2]

    def absorb(self, sums: dict[str, tuple[Tensor, int]]) -> None:
        """Adds what was summed before a resume."""
        for name, (total, count) in sums.items():
            self._sums[name] = self._sums[name] + total.to(self._sums[name].device) if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + count

    def sums(self) -> dict[str, tuple[Tensor, int]]:
        """Unit to the (C,) float64 sum of magnitudes on the CPU, and the number of values per channel."""
        return {name: (total.cpu(), self._counts[name]) for name, total in self._sums.items()}


def dormancy_scores(magnitudes: Tensor) -> Tensor:
    """Mean magnitude of each channel over the mean of its layer.

    s_i = E|h_i| / (1/H sum_k E|h_k|)

    Args:
        magnitudes: (C,), mean absolute activation of each channel; the mean is over inputs and positions.

    Returns:
        (C,), float64, unitless, at least 0; 1 is an average channel, all 0 where the whole layer is silent, all NaN
        where a magnitude is NaN or infinite: nothing can be said then.

    Source: Sokar et al. 2023 (arXiv 2302.12902), equation 1: a unit is tau-dormant if its score is at most tau.

    Example:
        >>> dormancy_scores(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0., 1., 2.], dtype=torch.float64)
    """
    magnitudes = magnitudes.double()
    mean = magnitudes.mean()
    if not mean.isfinite():
        return torch.full_like(magnitudes, torch.nan)
    return magnitudes / mean if mean > 0 else torch.zeros_like(magnitudes)
