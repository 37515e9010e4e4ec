"""Measured values that wait on the device, so that many are fetched at once, and few steps wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_interp.functional.transfer import Parcel


@dataclass
class Item:
    """What was measured at one step.

    Attributes:
        kind: What it is, for the reader.
        step: On the axis of `self.log`.
        tensors: Still on the device.
        values: On the host.
        notes: What was known on the host all along; plain Python.
    """

    kind: str
    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Backlog:
    """Items in the order in which they were measured."""

    def __init__(self) -> None:
        """Starts empty."""
        self.copies = False  # whether losses are copied: with manual optimization they may be the user's own buffer
        self._items: list[Item] = []
        self._noted: list[Any] = []  # losses that are no items yet, newer than all of those,
        self._noted_from = 0  # of the steps from this one on
        self._sent = 0  # so many items, the oldest
        self._parcel: Parcel | None = None  # with the values of those

    def __len__(self) -> int:
        return len(self._items) + len(self._noted) if self._noted else len(self._items)

    def notes_from(self, step: int) -> Callable[[Any], None]:
        """What notes the loss of batch after batch, each of them a step, from this step on; as `add`, in less time."""
        self._take_notes()
        self._noted_from = step
        return self._note

    def _note(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss = loss.detach()  # or all that it was computed from would be kept
        if self.copies and isinstance(loss, Tensor):
            loss = loss.detach().clone()
        self._noted.append(loss)

    def _take_notes(self) -> None:
        noted, self._noted = self._noted, []
        for step, value in enumerate(noted, self._noted_from):
            loss = single_loss(value)
            if loss is not None:
                self._items.append(Item("loss", step, {"loss": loss}, notes={"scale": 1, "ends": True}))
        self._noted_from += len(noted)

    def add(self, kind: str, step: int, tensors: dict[str, Tensor], **notes: Any) -> None:
        """Appends an item; the tensors must not be written to any more."""
        if self._noted:
            self._take_notes()
        self._items.append(Item(kind, step, tensors, notes=notes))

    def send(self) -> None:
        """Puts the values of all items on their way, without a wait; `take_sent` gets them."""
        self._arrive()
        self._take_notes()
        self._sent = len(self._items)
        self._parcel = Parcel([tensor for item in self._items for tensor in item.tensors.values()])

    @property
    def sent(self) -> bool:
        """Whether something is on its way."""
        return self._parcel is not None

    def wait(self) -> None:
        """Until what was sent has arrived."""
        if self._parcel is not None:
            self._parcel.wait()

    def take_sent(self) -> list[Item]:
        """The items that were sent, with their values, oldest first; waits for those that have not arrived."""
        count = self._sent
        self._arrive()
        items, self._items = self._items[:count], self._items[count:]
        return items

    def take(self) -> list[Item]:
        """All items, with their values, oldest first; the backlog is empty then."""
        self.resolve()
        items, self._items = self._items, []
        return items

    def resolve(self) -> None:
        """Fetches all values, in one transfer for each device and dtype."""
        self.send()
        self._arrive()

    def _arrive(self) -> None:
        """Waits for what was sent."""
        if self._parcel is not None:
            values = iter(self._parcel.open())
            for item in self._items[: self._sent]:
                item.values |= {name: next(values) for name in item.tensors}
                item.tensors = {}
            self._sent, self._parcel = 0, None

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain Python, safe in a checkpoint; the items stay."""
        self.resolve()
        return [{"kind": i.kind, "step": i.step, "values": i.values, "notes": i.notes} for i in self._items]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """The inverse of `state_dict`."""
        self._items = [Item(s["kind"], s["step"], values=s["values"], notes=s["notes"]) for s in state]
        self._noted = []
        self._sent, self._parcel = 0, None


def single_loss(outputs: Any) -> Tensor | None:
    """The loss in what Lightning hands back of a training step, as a 0-d tensor; None if it is not one number."""
    value = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            return None
        return value.detach() if value.ndim == 0 else value.detach().reshape(())
    return torch.tensor(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None
