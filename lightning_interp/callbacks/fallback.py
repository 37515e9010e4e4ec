"""For compiled models: hooks put on them are never called, so the fixed samples are passed through them eagerly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import fixed_samples
from lightning_interp.callbacks.window import Units, Window
from lightning_interp.functional.tracing import ActivationTracer

_SAMPLES, _BATCH = 512, 64


class EagerPass:
    """Runs fixed samples through a compiled model without its compiled code, in eval mode.

    Attributes:
        num_samples: Number of samples.
    """

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._model = model
        self._images, _ = fixed_samples(trainer, model, _SAMPLES)
        self.num_samples = len(self._images)

    def run(self, window: Window, units: Units) -> None:
        """Feeds a window with the activations of all samples."""
        with undisturbed(self._model, training=False):
            for images in torch.split(self._images, _BATCH):
                with ActivationTracer(self._model, window.feed, units=units) as tracer:
                    output = self._model(images)
                del output
                if tracer.error is not None:
                    raise tracer.error
