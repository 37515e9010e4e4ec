"""The book of alerts: each is raised once and cleared once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_interp._options import check_positive_int, check_strings, did_you_mean, expected
from lightning_interp.errors import ArgumentError
from lightning_interp.rules.alert import SEVERITIES, Alert, Severity
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

KEPT = 1000


class AlertBook:
    """Asks the rules, and tells what is new.

    A finding must hold for `patience` checks in a row (the larger one of the rule's and the book's) before it is
    raised, and be gone for as many before it is cleared; at the end of the training, the last chance to speak, at
    once. A change of severity is told at once, by another `raised`. Rules get the keys of the active alerts with their
    severities (a mapping), so that they can relax the thresholds that hold an alert up.

    Attributes:
        errors: (rule, error) of the last check for the rules that failed; their alerts stay as they were.
    """

    def __init__(self, rules: Sequence[Rule], mute: Iterable[str] = (), patience: int = 1) -> None:
        """Checks the arguments.

        Args:
            rules: No two with the same name.
            mute: Names of rules, or `rule:glob` for some of the layers (an alert of the whole run has the layer "").
            patience: Checks in a row, at least 1.

        Raises:
            ArgumentError: If an argument is wrong.
        """
        check_positive_int("patience", patience)
        check_strings("mute", mute, optional=False)
        self.rules = check_rules(rules)
        self.mute = [_pattern(entry, [rule.name for rule in self.rules]) for entry in mute]
        self.patience = patience
        self.errors: list[tuple[Rule, Exception]] = []
        self._active: dict[Key, Alert] = {}
        self._history: deque[Alert] = deque(maxlen=KEPT)
        self._streaks: dict[Key, int] = {}  # checks for which a finding has held, or an active one has been gone

    @property
    def active(self) -> list[Alert]:
        """The alerts that are up, as they were raised, oldest first."""
        return list(self._active.values())

    @property
    def history(self) -> list[Alert]:
        """All that was raised and cleared, oldest first; the last `KEPT` of them."""
        return list(self._history)

    def update(self, history: History) -> list[Alert]:
        """Checks all rules.

        Args:
            history: The numbers of the run so far.

        Returns:
            The alerts whose status or severity changed now, with `step` and `epoch` set.
        """
        self.errors = []
        look = history.look()
        severities = {key: alert.severity for key, alert in self._active.items()}
        changed = []
        for rule in self.rules:
            try:
                found = self._ask(rule, look, severities)
            except Exception as error:  # one rule of a user's must not take the others with it
                self.errors.append((rule, error))
                continue
            changed += self._compare(rule, found, history)
        self._history.extend(changed)
        return changed

    def _ask(self, rule: Rule, history: History, active: dict[Key, Severity]) -> dict[Key, Alert]:
        loud = []
        for alert in rule.check(history, active):
            if not isinstance(alert, Alert) or alert.severity not in SEVERITIES:
                raise TypeError(f"Rule {rule.name!r} must return alerts with one of the severities, but got {alert!r}.")
            named = replace(alert, rule=rule.name, status="raised", step=history.step, epoch=history.epoch)
            if not self._is_mute(named):
                loud.append(named)
        found: dict[Key, Alert] = {}
        for alert in rule.join(loud, active):
            known = found.get(alert.key)
            if known is None or _rank(known) < _rank(alert):
                found[alert.key] = alert
        return found

    def _compare(self, rule: Rule, found: dict[Key, Alert], history: History) -> list[Alert]:
        patience = 1 if history.finished else max(rule.patience, self.patience)
        changed = []
        for key, alert in found.items():
            known = self._active.get(key)
            if known is not None:
                self._streaks.pop(key, None)
            if (known is None and self._streak(key) >= patience) or (known and known.severity != alert.severity):
                changed.append(self._raise(alert))
        for key in [key for key in self._active if key[0] == rule.name and key not in found]:
            if self._streak(key) >= patience:
                self._streaks.pop(key)
                old = self._active.pop(key)
                changed.append(replace(old, status="cleared", step=history.step, epoch=history.epoch))
        for key in [key for key in self._streaks if key[0] == rule.name]:
            if key not in found and key not in self._active:
                del self._streaks[key]
        return changed

    def _streak(self, key: Key) -> int:
        self._streaks[key] = self._streaks.get(key, 0) + 1
        return self._streaks[key]

    def _raise(self, alert: Alert) -> Alert:
        self._streaks.pop(alert.key, None)
        self._active[alert.key] = alert
        return alert

    def _is_mute(self, alert: Alert) -> bool:
        return any(alert.rule == rule and fnmatchcase(alert.layer or "", glob) for rule, glob in self.mute)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, safe in a checkpoint."""
        return {
            "active": [asdict(alert) for alert in self._active.values()],
            "history": [asdict(alert) for alert in self._history],
            "streaks": [[rule, layer, count] for (rule, layer), count in self._streaks.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; alerts of rules that are gone, or muted now, are no longer active."""
        names = {rule.name for rule in self.rules}
        alerts = [Alert.from_dict(values) for values in state["active"]]
        self._active = {alert.key: alert for alert in alerts if alert.rule in names and not self._is_mute(alert)}
        self._history = deque((Alert.from_dict(values) for values in state["history"]), maxlen=KEPT)
        self._streaks = {(rule, layer): count for rule, layer, count in state["streaks"] if rule in names}


def check_rules(rules: Any) -> list[Rule]:
    """Refuses everything but a sequence of rules with different names."""
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise expected("rules", "a list of rules", rules)
    checked = list(rules)
    if not all(isinstance(rule, Rule) for rule in checked):
        classes = [rule.__name__ for rule in checked if isinstance(rule, type) and issubclass(rule, Rule)]
        raise expected("rules", "a list of rules", checked, f"Call {classes[0]}()." if classes else "")
    names = [rule.name for rule in checked]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(f"Expected argument `rules` to hold each rule once, but got {name!r} twice.")
    return checked


def _rank(alert: Alert) -> int:
    return SEVERITIES.index(alert.severity)


def _pattern(entry: str, names: Sequence[str]) -> tuple[str, str]:
    rule, _, glob = entry.partition(":")
    if rule not in names:
        listed = ", ".join(repr(name) for name in names)
        message = f"No rule named {rule!r} in argument `mute`. There are: {listed or 'none'}."
        raise ArgumentError(f"{message} {did_you_mean(rule, names)}".rstrip())
    return rule, glob or "*"
