"""Section `steps`: what a training step costs with a watch on it, over one without."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.overhead import goals, ours, table
from benchmarks.overhead.direct import listening
from benchmarks.overhead.models import Case, kill
from benchmarks.overhead.timing import Pairs, Stopwatch, clock_for, take_turns
from benchmarks.overhead.watch import UnavailableError, Watch

HEAD = ("network", "watch", "looks at", "ratio of such a step", "direct share of it", "of all steps", "goal")
_WARM_UP = 2
_LEAST = 5  # pairs


@dataclass(frozen=True)
class Budget:
    """How long a watch is measured on a network: at most so many pairs of steps, and so many seconds."""

    steps: int = 60
    seconds: float = 4.0


class Stepper:
    """Training steps of one network. The learning rate is zero, so that a filter that is dead stays so."""

    def __init__(self, case: Case, watch: Watch) -> None:
        torch.manual_seed(0)
        self._watch, self._case = watch, case
        self._now = clock_for(case.device)
        layout = torch.contiguous_format if case.device == "cpu" else torch.channels_last
        self.model = case.make()
        kill(self.model, watch.dead)
        self.model = self.model.to(case.device, memory_format=layout)  # type: ignore[call-overload]
        self._images = torch.randn(case.batch, *case.shape, device=case.device).contiguous(memory_format=layout)
        self._labels = torch.randint(0, case.classes, (case.batch,), device=case.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

    def run(self) -> float:
        """Seconds of one step."""
        watch = self._watch
        started = self._now()
        watch.before_forward()
        with self._precision():
            loss = F.cross_entropy(self.model(self._images), self._labels)
        watch.before_backward(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        watch.before_step()
        self.optimizer.step()
        watch.after_step(loss)
        self.optimizer.zero_grad()
        return self._now() - started

    def _precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self._case.device == "cpu" else torch.autocast(self._case.device, torch.bfloat16)


@dataclass(frozen=True)
class StepCost:
    """Of one watch on one network.

    Attributes:
        pairs: Steps without it and with it, in seconds.
        direct: Seconds inside its hooks and methods, of each step with it; on a GPU the difference of each pair.
    """

    pairs: Pairs
    direct: Pairs
    waits: str = ""

    @property
    def share(self) -> float:
        """Median time inside the watch over the median time of a step without it."""
        return self.direct.median_other / self.direct.median_plain


def measure(case: Case, watch: Watch, budget: Budget) -> StepCost:
    """Steps with the watch and without it, in turn, on two copies of the network.

    Raises:
        UnavailableError: If the package of the watch is missing.
        NothingMeasuredError: If the watch produced no output.
    """
    on_gpu = case.device != "cpu"  # where host and device overlap, and marks in the stream would cost more than hooks
    stopwatch = Stopwatch()
    direct: list[float] = []
    ears = nullcontext() if on_gpu else listening(stopwatch)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ears:
        bare, watched = Stepper(case, _like(watch)), Stepper(case, watch)
        watch.attach(watched.model, watched.optimizer, Path(folder))
        try:
            if not on_gpu:
                _count_methods(watch, stopwatch)

            def step() -> float:
                stopwatch.take()
                seconds = watched.run()
                direct.append(stopwatch.take())
                return seconds

            for _ in range(_WARM_UP):
                bare.run()
                step()
            direct.clear()
            least = min(budget.steps, _LEAST)
            pairs = take_turns(bare.run, step, most=budget.steps, least=least, seconds=budget.seconds)
            waits = _waits(watched) if on_gpu else ""
            if on_gpu:
                direct = [with_it - without for without, with_it in zip(pairs.plain, pairs.other, strict=True)]
            watch.check()
        finally:
            watch.close()
    return StepCost(pairs, Pairs(pairs.plain, direct[: len(pairs.plain)]), waits)


def _like(watch: Watch) -> Watch:
    """No watch, on a network with as many dead filters."""
    nobody = Watch()
    nobody.dead = watch.dead
    return nobody


def _count_methods(watch: Watch, stopwatch: Stopwatch) -> None:
    for name in ("before_forward", "before_backward", "before_step", "after_step"):
        if getattr(type(watch), name) is not getattr(Watch, name):
            setattr(watch, name, stopwatch.wrap(getattr(watch, name)))


def _waits(stepper: Stepper) -> str:
    """Whether a step makes the host wait for the GPU; torch raises where it does."""
    clock, stepper._now = stepper._now, lambda: 0.0  # the clock itself waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return "; the host waits for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stepper._now = clock
    return "; no wait for the GPU"


def rows(cases: Iterable[Case], watches: list[Callable[[], Watch]], budget: Budget) -> Iterator[tuple[list[str], str]]:
    """The lines of the table, each with what went wrong: "missing", "failed" or nothing."""
    for case in cases:
        costs: dict[str, StepCost] = {}
        for make in watches:
            watch = make()
            try:
                costs[watch.name] = cost = measure(case, watch, budget)
            except UnavailableError as error:
                yield [case.name, watch.name, str(error), "", "", "", ""], "missing"
            except Exception as error:  # one tool that breaks must not cost the figures of the others
                yield [case.name, watch.name, f"failed: {type(error).__name__}: {error}", "", "", "", ""], "failed"
            else:
                yield _line(case, watch, cost), ""
        if costs.keys() >= {ours.Sparsity.name, ours.Dynamics.name}:
            yield _sampling(case, costs), ""


def _line(case: Case, watch: Watch, cost: StepCost) -> list[str]:
    goal = goals.of_step(watch.name, case.size)
    verdict = "" if goal is None else goal.verdict(cost.share)
    looks_at = "every step" if watch.looks_at == 1 else f"1 step in {watch.looks_at}"
    if watch.name.endswith(ours.FIRST):
        looks_at = "1 step in a window"
    elif watch.ours and watch.looks_at == 1:
        looks_at = "every step of a window"
    overall = table.share(cost.share / watch.looks_at) if watch.looks_at > 1 else ""
    return [case.name, watch.name, looks_at, table.ratio(cost.pairs), table.share(cost.share), overall,
            verdict + cost.waits]  # fmt: skip


def _sampling(case: Case, costs: dict[str, StepCost]) -> list[str]:
    """The one goal that is for two watches together, averaged over all steps."""
    total = sum(costs[watch.name].share / watch.looks_at for watch in (ours.Sparsity, ours.Dynamics))
    goal = goals.of_step(goals.SAMPLING, case.size)
    verdict = "" if goal is None else goal.verdict(total)
    return [case.name, f"both: {goals.SAMPLING}", "", "", "", table.share(total), verdict]


def baselines(cases: Iterable[Case]) -> str:
    """How long a step takes without any watch: a line under the table."""
    parts = []
    for case in cases:
        stepper = Stepper(case, Watch())
        times = [stepper.run() for _ in range(_WARM_UP + 3)][_WARM_UP:]
        parts.append(f"{case.name}: {table.duration(sorted(times)[1])}")
    return "A step without a watch takes: " + "; ".join(parts) + "."
