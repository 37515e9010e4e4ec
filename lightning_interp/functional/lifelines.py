"""The life of each filter over a run: born dead, died between two steps, revived. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_EVENTS = 10_000


@dataclass(frozen=True)
class FilterEvent:
    """Something that happened to one filter.

    Attributes:
        layer: Name of the layer.
        filter: Index of the filter, from 0.
        kind: `born_dead` (dead in the window before the first update; if by chance, `revived` follows), `died` or
            `revived`.
        after: Step of the last window in which the filter was still as before; -1 for `born_dead`.
        until: Step at the end of the window in which the change was seen: it happened in (after, until].
    """

    layer: str
    filter: int
    kind: Literal["born_dead", "died", "revived"]
    after: int
    until: int


@dataclass
class _Life:
    """One layer: which filters are dead, since when, and when the layer was last looked at."""

    dead: set[int] = field(default_factory=set)
    born_dead: set[int] = field(default_factory=set)
    died_between: dict[int, tuple[int, int]] = field(default_factory=dict)
    revived: set[int] = field(default_factory=set)
    last: int = -1
    saw_birth: bool = False


class Lifelines:
    """Follows all filters from window to window.

    Attributes:
        events: All events, oldest first; the newest `MAX_EVENTS` are kept.
    """

    def __init__(self) -> None:
        self.events: list[FilterEvent] = []
        self._lives: dict[str, _Life] = {}

    def update(self, layer: str, dead: Sequence[int], *, step: int, first: bool = False) -> list[FilterEvent]:
        """Takes note of a window.

        Args:
            layer: Name of the layer.
            dead: Indices of the filters that were dead in the window.
            step: Step at its end.
            first: Whether it is the window before the first update.

        Returns:
            What changed. A filter that is dead when its layer is first seen, later than that, died in (-1, step].
        """
        life = self._lives.setdefault(layer, _Life())
        life.saw_birth |= first
        now = set(dead)
        new: list[FilterEvent] = []
        for index in sorted(now - life.dead):
            if first:
                life.born_dead.add(index)
            else:
                life.died_between[index] = (life.last, step)
            new.append(FilterEvent(layer, index, "born_dead" if first else "died", life.last, step))
        for index in sorted(life.dead - now):
            life.revived.add(index)
            life.died_between.pop(index, None)
            new.append(FilterEvent(layer, index, "revived", life.last, step))
        life.dead, life.last = now, step
        if new:
            self.events = [*self.events, *new][-MAX_EVENTS:]
        return new

    @property
    def layers(self) -> list[str]:
        """Layers seen so far."""
        return list(self._lives)

    def dead(self, layer: str) -> list[int]:
        """Filters that were dead in the last window."""
        return sorted(self._lives[layer].dead)

    def born_dead(self, layer: str) -> list[int]:
        """Filters that were dead before the first update."""
        return sorted(self._lives[layer].born_dead)

    def saw_birth(self, layer: str) -> bool:
        """Whether the layer was looked at before the first update."""
        return self._lives[layer].saw_birth

    def dead_since_birth(self, layer: str) -> list[int]:
        """Filters that have been dead in every window, the one before the first update included.

        One that is silent in that window, which is a single batch, and fires in a later one was not born dead.
        """
        life = self._lives[layer]
        return sorted((life.dead & life.born_dead) - life.revived)

    def died_between(self, layer: str) -> dict[int, tuple[int, int]]:
        """Filter to (a, b] for those that are dead now and were alive before: they died after step a, by step b."""
        return dict(sorted(self._lives[layer].died_between.items()))

    def revived(self, layer: str) -> list[int]:
        """Filters that were dead in an earlier window and alive in a later one."""
        return sorted(self._lives[layer].revived)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, safe in a checkpoint."""
        return {
            "events": [list(asdict(event).values()) for event in self.events],
            "lives": {
                layer: {
                    "dead": sorted(life.dead),
                    "born_dead": sorted(life.born_dead),
                    "died_between": [[index, *span] for index, span in life.died_between.items()],
                    "revived": sorted(life.revived),
                    "last": life.last,
                    "saw_birth": life.saw_birth,
                }
                for layer, life in self._lives.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.events = [FilterEvent(*values) for values in state["events"]]
        self._lives = {
            layer: _Life(
                dead=set(life["dead"]),
                born_dead=set(life["born_dead"]),
                died_between={index: (after, until) for index, after, until in life["died_between"]},
                revived=set(life["revived"]),
                last=life["last"],
                saw_birth=life.get("saw_birth", bool(life["born_dead"])),  # not in checkpoints of old
            )
            for layer, life in state["lives"].items()
        }
