"""Trainings in one process that take turns, some steps each: drift of the machine hits all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl


class Turns:
    """Who may run, and how long each has run, in processor seconds of the process.

    Attributes:
        seconds: Of each, so far.
        before: Of each, until its first turn ended: before its first step.
    """

    def __init__(self, players: int) -> None:
        self.seconds = [0.0] * players
        self.before: list[float | None] = [None] * players
        self._condition = threading.Condition()
        self._waiting = list(range(players))
        self._current = 0
        self._since = 0.0

    def begin(self, me: int) -> None:
        """Waits for the first turn."""
        with self._condition:
            self._condition.wait_for(lambda: self._current == me)
            self._since = time.process_time()

    def pass_on(self, me: int) -> None:
        """Lets the next one run and waits until it is our turn again."""
        with self._condition:
            self._hand_over(me)
            self._condition.wait_for(lambda: self._current == me)
            self._since = time.process_time()

    def leave(self, me: int) -> None:
        """Has finished, or failed."""
        with self._condition:
            self._hand_over(me)
            self._waiting.remove(me)

    def _hand_over(self, me: int) -> None:
        self.seconds[me] += time.process_time() - self._since
        if self.before[me] is None:
            self.before[me] = self.seconds[me]
        position = self._waiting.index(me)
        self._current = self._waiting[(position + 1) % len(self._waiting)]
        self._condition.notify_all()


class PassOn(pl.Callback):
    """Ends the turn of one training every few steps, between two batches. To be the first of its callbacks."""

    def __init__(self, turns: Turns, me: int, steps: int) -> None:
        self._turns, self._me, self._steps = turns, me, steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lets the other training go on."""
        if batch_idx % self._steps == 0:
            self._turns.pass_on(self._me)


def run_in_turns(trainings: Sequence[tuple[Callable[[PassOn], None], int]]) -> Turns:
    """Runs them all, each in a thread of its own of which only one is awake.

    Args:
        trainings: Each is called with the callback that its Trainer needs; and the steps of one of its turns.

    Returns:
        The processor seconds of each.

    Raises:
        Exception: The first that a training raised, once the others have ended.
    """
    turns = Turns(len(trainings))
    errors: list[Exception] = []

    def play(me: int) -> None:
        training, steps = trainings[me]
        turns.begin(me)
        try:
            training(PassOn(turns, me, steps))
        except Exception as error:  # raised again in the caller's thread
            errors.append(error)
        finally:
            turns.leave(me)

    threads = [threading.Thread(target=play, args=(me,)) for me in range(len(trainings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return turns
