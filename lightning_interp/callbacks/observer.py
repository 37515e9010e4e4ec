"""Owner of everything that is put on a model while it trains.

All callbacks of a fit share one observer: however many of them read a layer, it is followed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lightning_interp.functional.hooks import is_compiled, work_of_compiler
from lightning_interp.functional.ops import OWNERS
from lightning_interp.functional.tracing import ActivationTracer, End, Reader, Unit

_MISSES = 2  # batches that must show nothing


class Observer:
    """Hands the activations of the running forward to its readers.

    A reader opens at the start of a batch that is due and closes at its end; between due batches nothing is on the
    model.

    Attributes:
        model: The LightningModule.
        units: All units found so far, in the order in which the forward reaches them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.units: dict[str, Unit] = {}
        self._reached: set[str] = set()
        self._seeing: set[bool] = set()  # whether training, or validation, has been seen; or not, and never will be
        self._blind: set[bool] = set()
        self._training = True
        self._following_all = False
        # By training or not: of the compiler, when something was seen last; watched batches that showed nothing since.
        self._work: dict[bool, int] = {}
        self._misses = {True: 0, False: 0}
        self._readers: dict[Reader, set[str] | None] = {}
        self._counts: dict[Reader, Callable[[float], None] | None] = {}
        self._errors: dict[Reader, Exception] = {}
        self._counted = 0.0
        self._tracer: ActivationTracer | None = None

    def __reduce__(self) -> Any:
        """A copy, even one made during a batch, is on no model; else the user's would be copied with it."""
        return Observer, (nn.Identity(),)

    @property
    def compiled(self) -> bool:
        """Whether a part of the model is compiled: hooks put on it now would never be called, silently."""
        return any(is_compiled(module) for module in self.model.modules())

    @property
    def reached(self) -> set[str]:
        """Layers that the watched forwards have called."""
        return self._reached if self._tracer is None else self._reached | self._tracer.reached

    def lost(self, *, training: bool) -> bool:
        """Whether nothing comes by any more in this mode, though it did: the forward was compiled in mid-run."""
        return training in self._blind and training in self._seeing

    def unreached(self) -> set[str]:
        """Names of the layers with filters that no watched forward has called so far."""
        return {name for name, module in self.model.named_modules() if isinstance(module, OWNERS)} - self.reached

    def open(
        self,
        reader: Reader,
        units: Collection[str] | None = None,
        *,
        count: Callable[[float], None] | None = None,
    ) -> None:
        """Gives a reader the activations of these units (None: of all) until it is closed.

        All readers must open before the forward begins; one that opens during a forward waits for the next batch.
        Where a compiled function hides all layers, from the start or since it was compiled, nothing is opened any more:
        each new hook would have it compiled anew, which its limit may not allow.

        Args:
            reader: Called with each activation.
            units: Names of units.
            count: Called with the seconds that this took on the host, which all open readers share evenly.
        """
        if self.model.training in self._blind:
            return
        self._training = self.model.training
        self._count()
        self._counts[reader] = count
        self._readers[reader] = None if units is None else set(units)
        self._restart()

    def close_reader(self, reader: Reader) -> None:
        """Takes a reader off, and with the last one everything else.

        Raises:
            Exception: What went wrong while reading, since it could not be raised inside the user's forward.
        """
        self._count()
        self._counts.pop(reader, None)
        own = self._errors.pop(reader, None)
        if self._readers.pop(reader, ...) is ...:
            if own is not None:
                raise own
            return
        error = own or (self._tracer.error if self._tracer is not None else None)
        if not self._readers:
            self._look_back()
            self._stop()
        if error is not None:
            raise error

    def discard(self, reader: Reader) -> None:
        """Takes a reader off, whatever went wrong while it read."""
        self._counts.pop(reader, None)
        self._errors.pop(reader, None)
        self._readers.pop(reader, None)
        if not self._readers:
            self._stop()

    def close(self) -> None:
        """Takes everything off the model. May be called at any time, more than once."""
        self._readers.clear()
        self._counts.clear()
        self._errors.clear()
        self._stop()

    def _count(self) -> None:
        """Tells the readers what they have cost since the last time."""
        if self._tracer is None or not self._readers:
            return
        seconds, self._counted = self._tracer.seconds - self._counted, self._tracer.seconds
        for reader in self._readers:
            if (count := self._counts.get(reader)) is not None:
                count(seconds / len(self._readers))

    def _look_back(self) -> None:
        """The forward is over: has anything been seen?

        Where something was seen before, one batch that shows nothing may have been skipped by the user, so the next one
        is followed in full. Only if that shows nothing either, and there was work for the compiler, is all hidden.
        """
        training, work = self._training, work_of_compiler()
        if self._tracer is not None and self._tracer.reached:
            self._seeing.add(training)
            self._work[training], self._misses[training] = work, 0
        elif training not in self._seeing:
            if work:
                self._blind.add(training)
        elif work != self._work[training]:
            self._misses[training] += 1
            if self._misses[training] >= _MISSES and self._following_all:
                self._blind.add(training)

    def _restart(self) -> None:
        self._stop()
        wanted = list(self._readers.values())
        follow: set[str] | None = set()
        for units in wanted:
            if units is None or self._misses[self._training]:
                follow = None
                break
            known = [self.units[name] for name in units if name in self.units]
            follow |= {layer for unit in known for layer in unit.layers}  # type: ignore[operator]
        self._following_all = follow is None
        self._tracer = ActivationTracer(self.model, self._dispatch, units=self.units, follow=follow)
        self._tracer.__enter__()

    def _stop(self) -> None:
        if self._tracer is not None:
            tracer, self._tracer, self._counted = self._tracer, None, 0.0
            tracer.__exit__(None, None, None)
            self._reached |= tracer.reached

    def _dispatch(self, end: End) -> None:
        for reader, units in self._readers.items():
            if (units is None or end.unit in units) and reader not in self._errors:
                try:
                    reader(end)
                except Exception as error:  # its own affair: the other readers go on
                    self._errors[reader] = error
