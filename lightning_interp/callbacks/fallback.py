"""For compiled code: hooks in it are never called, so the fixed samples are passed through the model eagerly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks.guard import shapeless, undisturbed
from lightning_interp.callbacks.samples import fixed_samples
from lightning_interp.callbacks.session import Session
from lightning_interp.callbacks.window import Units, Window
from lightning_interp.functional.tracing import ActivationTracer

_SAMPLES, _BATCH, _NAMED = 512, 64, 3


class EagerPass:
    """Runs fixed samples through a model without its compiled code, in eval mode.

    Attributes:
        num_samples: Number of samples.
    """

    def __init__(self, trainer: Any, model: nn.Module, layers: set[str] | None = None) -> None:
        """Reads the samples.

        Args:
            trainer: The running trainer.
            model: The LightningModule.
            layers: Names of the layers to follow; None follows all.
        """
        self._model = model
        self._layers = layers
        self._images, _ = fixed_samples(trainer, model, _SAMPLES)
        self.num_samples = len(self._images)

    def run(self, window: Window, units: Units) -> None:
        """Feeds a window with the activations of all samples."""
        with undisturbed(self._model, training=False):
            for images in torch.split(self._images, _BATCH):
                with ActivationTracer(self._model, window.feed, units=units, follow=self._layers) as tracer:
                    output = self._model(images)
                del output
                if tracer.error is not None:
                    raise tracer.error


def hidden_layers(trainer: Any, model: nn.Module, gone: Collection[str] = ()) -> set[str]:
    """Layers that the model calls, though none of the watched forwards seemed to: they run in a compiled function.

    Found with a sample that is passed through the model eagerly. Where that can't be done, all layers are hidden if
    none was ever seen, and none is otherwise.

    Args:
        trainer: The running trainer.
        model: The LightningModule.
        gone: Layers that came by earlier and no longer do, see `Observer.lost`.
    """
    observer = Session.of(trainer).observer
    missing = observer.unreached().union(gone)
    # Where weights are split, a forward on one rank waits for the others; lazy layers are for the training to shape.
    if not missing or is_sharded(trainer) or shapeless(model):
        return set()
    try:
        images, _ = fixed_samples(trainer, model, 1)
        with (
            undisturbed(model, training=False),
            ActivationTracer(model, lambda end: None, follow=set(missing)) as tracer,
        ):
            model(images)
    except Exception:  # no samples, or a forward that takes something else
        return set(gone) if observer.reached else missing
    return missing & tracer.reached


def hidden_by_now(trainer: Any, model: nn.Module, *, training: bool) -> tuple[set[str], str]:
    """As `hidden_layers`, with those that were hidden in mid-run; and in words, whether they were ever seen."""
    observer = Session.of(trainer).observer
    lost = observer.lost(training=training)
    hidden = hidden_layers(trainer, model, observer.reached if lost else ())
    seen = "no longer sees" if lost else "never saw"
    return hidden, f"{seen} {named(hidden)}, which a compiled function seems to call"


def named(layers: Collection[str]) -> str:
    """The first few names, for a message."""
    first = sorted(layers)[:_NAMED]
    more = len(layers) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
