"""Rule `untrained_layer`: a layer whose weights never change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_interp._options import check_positive_int
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule

SOURCE = "TrainCheck and SageMaker Debugger check for tensors that do not change; exact zero, hence no threshold"


@dataclass(frozen=True)
class UntrainedLayerRule(Rule):
    """All probed updates of a layer are exactly 0.

    With `requires_grad=True` that is a warning: the layer is in no optimizer, its rate is 0, or no gradient reaches it,
    be it for dead filters (if all of some layer are) or a cut in the graph. A layer with
    `requires_grad=False` was frozen on purpose: information, of all such layers at once. Works for any loss.

    A probed step counts only if some layer moved at it, so that a warm-up that starts at rate 0 and a step skipped by
    the gradient scaler say nothing about one layer; at least `min_probes` must count. If no layer ever moved, although
    the rate was above 0 at `min_probes_all` probed steps, one warning is given for the whole network.

    Source: exact comparison of weights before and after the optimizer step, so there is nothing to tune.

    Attributes:
        min_probes: Probed steps that must count.
        min_probes_all: Probed steps after which a network that never moves is named.
    """

    name: ClassVar[str] = "untrained_layer"
    needs: ClassVar[tuple[str, ...]] = (
        "update_norm", "gradient_norm", "learning_rate", "trainable", "in_optimizer", "dead_fraction",
    )  # fmt: skip

    min_probes: int = 5
    min_probes_all: int = 20

    def __post_init__(self) -> None:
        check_positive_int("min_probes", self.min_probes)
        check_positive_int("min_probes_all", self.min_probes_all)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for each layer concerned."""
        layers = history.layers("update_norm")
        moving = [layer for layer in layers if _moved(history, layer)]
        for layer in history.layers("trainable"):
            if history.fact("trainable", 1.0, layer) == 0:
                yield self._frozen(layer)
        if not moving:
            yield from self._all_still(history, [layer for layer in layers if _is_trainable(history, layer)])
            return
        moved = set(moving)
        for layer in layers:
            if layer not in moved and _is_trainable(history, layer):
                probes = _probes(history, layer, moving)
                if probes >= self.min_probes:
                    yield self._still(history, layer, probes)

    def join(self, alerts: Sequence[Alert], active: Collection[Key]) -> Iterable[Alert]:
        """Frozen layers in one alert: a frozen backbone has dozens."""
        frozen = [alert for alert in alerts if alert.severity == "info" and alert.key not in active]
        if len(frozen) < 2 and (self.name, None) not in active:
            return alerts
        rest = [alert for alert in alerts if alert not in frozen]
        return [*rest, _together(frozen)] if frozen else rest

    def _frozen(self, layer: str) -> Alert:
        return Alert(
            rule=self.name,
            severity="info",
            layer=layer,
            value=0.0,
            threshold=0.0,
            cause="requires_grad=False",
            message=f"{layer} is frozen: it has weights, and none of them has requires_grad=True.",
            advice="Nothing, if this is meant; else set requires_grad=True before the optimizer is made.",
            evidence={"trainable": 0.0},
            source=SOURCE,
        )

    def _still(self, history: History, layer: str, probes: int) -> Alert:
        cause, advice, evidence = _why(history, layer)
        return Alert(
            rule=self.name,
            severity="warning",
            layer=layer,
            value=0.0,
            threshold=0.0,
            cause=cause,
            message=f"{layer} did not change at all in {probes} probed steps, although it has requires_grad=True.",
            advice=advice,
            evidence={"probes": float(probes), **evidence},
            alternatives=_ALTERNATIVES.get(cause, []),
            source=SOURCE,
        )

    def _all_still(self, history: History, layers: list[str]) -> Iterable[Alert]:
        at_work = {step for step, rate in history.finite("learning_rate") if rate > 0}
        probes = len(at_work & {point.step for layer in layers for point in history.get("update_norm", layer).finite()})
        if probes < self.min_probes_all:
            return
        cause, advice, evidence = _why(history, layers[0])
        yield Alert(
            rule=self.name,
            severity="warning",
            value=0.0,
            threshold=0.0,
            cause=cause,
            message=f"None of the {len(layers)} layers changed in {probes} probed steps at a learning rate above 0.",
            advice=advice,
            evidence={"probes": float(probes), "layers": float(len(layers)), **evidence},
            alternatives=["gradients that are never finite, so that each step is skipped"],
            source=SOURCE,
        )


_NOT_HELD, _NO_RATE, _NO_GRADIENT = "in no optimizer", "learning rate 0", "no gradient reaches it"
_ALTERNATIVES = {
    _NOT_HELD: ["a network that is not to be trained, as a teacher"],
    _NO_GRADIENT: ["a learning rate of 0 for its parameter group"],
    None: ["a learning rate of 0 for its parameter group", _NO_GRADIENT],
}
_NAMED = 8


def _together(alerts: Sequence[Alert]) -> Alert:
    """One alert for the whole run, with the name of each layer in its evidence."""
    if len(alerts) == 1:  # of several that were told together
        return replace(alerts[0], layer=None)
    names = [alert.layer or "" for alert in alerts]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return replace(
        alerts[0],
        layer=None,
        message=(
            f"{len(names)} layers are frozen, none of their weights has requires_grad=True: "
            f"{', '.join(names[:_NAMED])}{more}."
        ),
        evidence={"layers": float(len(names))} | {f"trainable_{name}": 0.0 for name in names},
    )


def _is_trainable(history: History, layer: str) -> bool:
    return history.fact("trainable", 1.0, layer) != 0


def _moved(history: History, layer: str) -> bool:
    """Whether it ever moved: the newest probe tells for most layers, so the others are seldom read."""
    return any(point.value > 0 for point in history.get("update_norm", layer).finite(newest_first=True))


def _probes(history: History, layer: str, moving: list[str]) -> int:
    """Probed steps of a layer at which another one moved: mostly the first one that is asked moved at all of them."""
    steps = {point.step for point in history.get("update_norm", layer).finite()}
    left = set(steps)
    for other in moving:
        if not left:
            break
        left -= {step for step, value in history.get("update_norm", other).finite() if value > 0}
    return len(steps) - len(left)


def _why(history: History, layer: str) -> tuple[str | None, str, dict[str, float]]:
    """Cause, advice and evidence for a layer that could move and does not."""
    held = history.fact("in_optimizer", 1.0, layer)
    gradients = [point.value for point in history.finite("gradient_norm", layer)]
    # Of biases and normalisation none is measured: they go by the others that do not move.
    largest = max(gradients, default=_largest_of_the_still(history))
    evidence = {"in_optimizer": held} | ({"largest_gradient": max(gradients)} if gradients else {})
    if not held:
        advice = f"Pass the parameters of {layer} to the optimizer in configure_optimizers"
        return _NOT_HELD, f"{advice}; call requires_grad_(False) on them if they are not to be trained.", evidence
    if largest is not None and largest > 0:
        return _NO_RATE, f"Give the parameter group of {layer} a learning rate above 0.", evidence
    if dead := _all_dead(history):
        return (
            "dead filters",
            f"See dead_filters: all filters of {dead} are dead, and no gradient passes through them.",
            evidence | {"dead_fraction": 1.0},
        )
    return (
        None if largest is None else _NO_GRADIENT,
        f"Look between {layer} and the loss for detach(), torch.no_grad(), argmax, or an output that is not used.",
        evidence,
    )


def _largest_of_the_still(history: History) -> float | None:
    still = (layer for layer in history.layers("update_norm") if not _moved(history, layer))
    return max((point.value for layer in still for point in history.finite("gradient_norm", layer)), default=None)


def _all_dead(history: History) -> str | None:
    """A layer of which not one filter fires."""
    newest = ((layer, history.get("dead_fraction", layer).last) for layer in history.layers("dead_fraction"))
    return next((layer for layer, last in newest if last is not None and last.value >= 1), None)
