"""Rule `bad_start`: the loss is much too high before anything was learned."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_number
from lightning_interp.rules._evidence import (
    RELAXED,
    first_loss,
    guess_loss,
    inputs_blamed,
    inputs_off,
    recent_loss,
    severity_of,
    started_badly,
)
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "CS231n, neural networks 3, sanity checks (loss at chance level); the factor is measured"


@dataclass(frozen=True)
class BadStartRule(Rule):
    """The loss before the first update is above `factor` ln C, or is no number.

    No update was made yet, so the learning rate can't be the reason: it is the inputs or the initialisation. The
    inputs are blamed if they are off (abs(mean) > `input_mean`, or a standard deviation outside
    [1 / `input_spread`, `input_spread`]) *and* large (root mean square above `input_scale`): a network of ReLUs
    passes the scale of its input on, so small inputs can't make a large loss.

    Holds until the loss has come below 0.9 ln C. Without a cross-entropy no level of the loss is known, and only a
    first loss that is NaN or infinite counts.

    Source: CS231n, neural networks 3 (the loss at chance level); the factor is measured: it tells apart the runs with
    large initial weights or inputs that were not normalised (16 of 16) from those with a too-high rate.

    Attributes:
        factor: Multiple of ln C.
        input_mean: Largest normal abs(mean) of the inputs.
        input_spread: Largest normal standard deviation of the inputs, and one over the smallest.
        input_scale: Root mean square above which the inputs can be the reason.
    """

    name: ClassVar[str] = "bad_start"
    needs: ClassVar[tuple[str, ...]] = ("loss", "num_classes", "input_mean", "input_std")

    factor: float = 3.0
    input_mean: float = 0.2
    input_spread: float = 2.0
    input_scale: float = 1.5

    def __post_init__(self) -> None:
        check_number("factor", self.factor, low=1, high=math.inf)
        check_number("input_mean", self.input_mean, low=0, high=math.inf)
        check_number("input_spread", self.input_spread, low=1, high=math.inf)
        check_number("input_scale", self.input_scale, low=0, high=math.inf)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for the run, or none."""
        first, guess = first_loss(history), guess_loss(history)
        if first is None or not started_badly(history, self.factor):
            return
        held = severity_of(active, (self.name, None))
        if guess is not None and math.isfinite(first) and not self._still_bad(history, guess, held is not None):
            return
        mean, std = history.fact("input_mean", math.nan), history.fact("input_std", math.nan)
        cause, alternatives = self._cause(history)
        chance = "" if guess is None else f", where a guess among {math.exp(guess):.0f} classes has {guess:.2f}"
        yield Alert(
            rule=self.name,
            severity="warning" if math.isfinite(first) else "critical",
            value=first,
            threshold=math.nan if guess is None else self.factor * guess,
            cause=cause,
            message=f"The loss before the first update is {first:.3g}{chance}.",
            advice=_advice(cause, mean, std),
            evidence={"first_loss": first, "guess_loss": guess or math.nan, "input_mean": mean, "input_std": std},
            alternatives=[*alternatives, "a margin or a scale in the loss"],
            source=SOURCE,
        )

    def _still_bad(self, history: History, guess: float, held: bool) -> bool:
        now = recent_loss(history)
        return now is not None and now > 0.9 * guess * (RELAXED if held else 1.0)

    def _cause(self, history: History) -> tuple[str, list[str]]:
        limits = self.input_mean, self.input_spread
        if inputs_blamed(history, self.input_scale, *limits):
            return "inputs", ["initialisation"]
        unknown = ("input_mean", None) not in history.facts
        return "initialisation", ["inputs"] if unknown or inputs_off(history, *limits) else []


def _advice(cause: str, mean: float, std: float) -> str:
    if cause == "inputs" and math.isfinite(mean) and math.isfinite(std):
        return f"Normalise the images: subtract {mean:.3g} and divide by {max(std, 1e-12):.3g}."
    if cause == "inputs":
        return "Remove NaN and infinite values from the images."
    return (
        "Use the default (Kaiming) initialisation and a small or zero-initialised last layer, so that the scores "
        "start near 0."
    )
