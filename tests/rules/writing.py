"""Histories written down by hand."""

import math

from lightning_interp.rules import Alert, History, Rule


def write(history, quantity, values, *, layer=None, start=0, every=1):
    """Records values at start, start + every, ..."""
    for i, value in enumerate(values):
        history.record(quantity, value, step=start + every * i, layer=layer)
    return history


def run_of(losses, *, classes=10, finished=False, planned=None):
    """A run with these losses, one a step."""
    history = write(History(), "loss", losses)
    if classes is not None:
        history.note("num_classes", classes)
    history.note("planned_steps", math.inf if planned is None else planned)
    history.finished = finished
    return history


def falling(steps, *, start=2.3, end=0.05, tau=60.0):
    """Losses of a healthy run."""
    return [end + (start - end) * math.exp(-step / tau) for step in range(steps)]


def healthy(steps=600):
    """What all measuring callbacks would write in a run where all is well."""
    history = run_of(falling(steps), finished=True, planned=steps)
    write(history, "loss_before", falling(50))
    write(history, "loss_after", [0.97 * loss for loss in falling(50)])
    write(history, "step_ratio", [0.8] * 50)
    write(history, "step_ratio", [0.7] * (steps // 100), start=99, every=100)
    write(history, "learning_rate", [0.1] * 50)
    history.note("input_mean", 0.0)
    history.note("input_std", 1.0)
    for layer in ("conv1", "conv2"):
        write(history, "update_norm", [0.01] * 20, layer=layer)
        write(history, "update_ratio", [0.001] * 20, layer=layer)
        write(history, "gradient_norm", [0.1] * 20, layer=layer)
        write(history, "dead_fraction", [0.0, 0.02, 0.02, 0.02], layer=layer, every=200)
        write(history, "filter_smoothness", [-0.02, 0.1, 0.15], layer=layer, every=300)
        write(history, "filter_movement", [0.0, 0.2, 0.4], layer=layer, every=300)
        history.note("trainable", 1, layer=layer)
        history.note("in_optimizer", 1, layer=layer)
        history.note("num_filters", 16, layer=layer)
    return history


def check(rule: Rule, history: History, active=()) -> list[Alert]:
    """What a rule says."""
    return list(rule.check(history, active))
