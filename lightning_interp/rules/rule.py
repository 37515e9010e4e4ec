"""The base of all rules.

A rule is one file: a frozen dataclass whose fields are its thresholds and whose `check` reads a `History` and returns
what it finds wrong *now*. It keeps no state; raising once, clearing once, patience and hysteresis are the business of
`AlertBook`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar

from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History

Key = tuple[str, str | None]


class Rule(ABC):
    """Reads the numbers of a run and says what is wrong.

    Subclasses are frozen dataclasses (this base is not one: jsonargparse refuses subclasses of a dataclass).

    Class attributes:
        name: As in `Alert.rule`, in the tags and in `mute`.
        needs: Quantities and facts that the rule reads; the callback `Alerts` brings what measures them.
        patience: Checks in a row on which the finding must hold, or be gone, before it is raised, or cleared.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    patience: ClassVar[int] = 1

    @abstractmethod
    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """What is wrong now.

        Args:
            history: The numbers so far.
            active: Keys (rule, layer) of the alerts that are up now: compare these with the milder of two
                thresholds, so that a value that wavers about a threshold does not raise and clear for ever.

        Returns:
            One alert per layer concerned, with `step` and `epoch` left to the book.
        """

    def join(self, alerts: Sequence[Alert], active: Collection[Key]) -> Iterable[Alert]:
        """Puts together what is better said at once; does nothing by default.

        Args:
            alerts: What `check` has returned, without what is muted.
            active: As in `check`: what is up already as one alert per layer should stay so, not to be cleared.
        """
        return alerts
