"""What the callbacks of one Trainer share: the history that the rules read, the observer that owns the hooks, tags."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_interp import sinks
from lightning_interp.callbacks._lightning import log_directory
from lightning_interp.callbacks.observer import Observer
from lightning_interp.functional.ops import OWNERS
from lightning_interp.records import Embedding, Record, safe_tag
from lightning_interp.rules.history import History

_sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()


class Session:
    """Shared by all callbacks of one `fit`.

    Attributes:
        history: The numbers so far, for the rules.
        observer: Owner of all hooks on the model.
        depths: Position of each layer with weights in the whole model, in the order of `named_modules()`.
        directory: Folder of the run's own files, None when nothing is to be written.
        dead: Layer to the indices of its dead filters in the last window.
        published: What of ours is in `trainer.callback_metrics`, by name: the very tensors.
        said: Kinds of limits that were reported already, for all callbacks.
    """

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self.history = History()
        self.observer = Observer(model)
        self.depths = layer_depths(model)
        self.directory = log_directory(trainer)
        self.dead: dict[str, list[int]] = {}
        self.published: dict[str, Tensor] = {}
        self.said: set[type[Exception] | str] = set()
        self._owners: dict[type, object] = {}
        self._last_steps: dict[tuple[str, bool], int] = {}
        self._ended = False
        self._closed = False
        self._waiting = False

    @classmethod
    def begin(cls, trainer: Any, model: nn.Module) -> Session:
        """The session of a fit that is being set up; the first callback to ask makes it."""
        session = _sessions.get(trainer)
        if session is None or session._ended or session.observer.model is not model:
            session = _sessions[trainer] = cls(trainer, model)
        return session

    @classmethod
    def of(cls, trainer: Any) -> Session:
        """The session of a running fit."""
        return _sessions[trainer]

    @classmethod
    def find(cls, trainer: Any) -> Session | None:
        """The session of the latest fit; None if there was none."""
        return _sessions.get(trainer)

    @classmethod
    def end(cls, trainer: Any, *, closed: bool) -> None:
        """Removes all hooks, also after an exception. May be called more than once.

        The history stays within reach, and after an exception the loggers too: other callbacks may still have something
        to write. Not so when the fit is over: Lightning closes the logs, and a late word would open a second file.

        Raises:
            Exception: What of ours could not be written. Lightning would run into it when it closes the logs.
        """
        session = _sessions.get(trainer)
        if session is None:
            return
        session._ended = True
        session.observer.close()
        session._owners.clear()
        session.observer = Observer(nn.Identity())  # the model knows the trainer, which must not live for ever
        try:
            session.flush(trainer)
        finally:
            session._closed |= closed

    def owns_history(self, callback: object) -> bool:
        """Whether a callback writes what the rules read: the first of its class does, or they would read it twice."""
        return self._owners.setdefault(type(callback), callback) is callback

    def write(self, trainer: Any, records: Iterable[Record]) -> None:
        """Hands records to all loggers, on rank zero.

        A record whose tag already has one at its step or later is left out: TensorBoard's fast back end would delete
        the earlier ones.
        """
        if self._closed or not trainer.is_global_zero:
            return
        fresh = []
        for record in records:
            tag = safe_tag(record.tag)
            key = (tag, isinstance(record, Embedding))  # the projector has tags of its own
            if self._last_steps.get(key, -1) < record.step:
                self._last_steps[key] = record.step
                fresh.append(record if tag == record.tag else replace(record, tag=tag))
        self._waiting = self._waiting or bool(fresh)
        sinks.write(trainer.loggers, fresh)

    def flush(self, trainer: Any) -> None:
        """Has the loggers write what they still hold of ours, on rank zero."""
        if self._waiting and not self._closed and trainer.is_global_zero:
            self._waiting = False
            sinks.flush(trainer.loggers)

    def layer_tag(self, quantity: str, layer: str, name: str | None) -> str:
        """`interp.<quantity>[.<name>]/<NN>_<layer>`: one group a quantity, in depth order.

        A unit that is no layer with weights (the ReLU after a residual sum, named after its block) takes the number
        of the last layer inside its block, so that it sorts beside it.
        """
        depth = self.depths.get(layer)
        if depth is None:
            inside = [d for n, d in self.depths.items() if n.startswith(f"{layer}.")] or list(self.depths.values())
            depth = max(inside, default=0)
        width = max(2, len(str(len(self.depths))))
        group = f"interp.{quantity}" + (f".{name}" if name else "")
        return f"{group}/{depth:0{width}d}_{layer}"


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Numbers the modules that own a weight of two or more axes (convolutions, linear layers), from 0."""
    names = [name for name, module in model.named_modules() if isinstance(module, OWNERS) or _has_matrix(module)]
    return {name: depth for depth, name in enumerate(names)}


def _has_matrix(module: nn.Module) -> bool:
    """Looks into the table of parameters: reading `module.weight` of a parametrised module may change it."""
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(weight, UninitializedParameter) and weight.ndim > 1
