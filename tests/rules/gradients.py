"""Gradient norms by layer, written down by hand."""

from tests.rules.writing import run_of, write


def graded(shares, *, losses=None, total=0.5, weights=2.0, probes=60, scale=1.0):
    """A run that stands still, with these shares of the gradient: 50 dense probes, then one in a hundred.

    Args:
        shares: By layer, from the input to the output.
        losses: One a step; None stays at ln 10.
        total: Norm of the whole gradient, or one a probe.
        weights: Norm of the weights, or one a layer.
        probes: How many.
        scale: Of the loss, and with it of all gradients.
    """
    history = run_of([scale * loss for loss in losses or [2.3] * 1200], classes=10 if scale == 1 else None)
    totals = [scale * value for value in (total if isinstance(total, list) else [total] * probes)]
    norms = weights if isinstance(weights, list) else [weights] * len(shares)
    for index, value in enumerate(totals):
        step = index if index < 50 else 100 * (index - 49) - 1
        history.record("gradient_norm", value, step=step)
        for number, (share, norm) in enumerate(zip(shares, norms, strict=True)):
            layer = f"conv{number}"
            history.record("gradient_norm", share * value, step=step, layer=layer)
            history.record("update_norm", 0.01 * norm, step=step, layer=layer)
            history.record("update_ratio", 0.01, step=step, layer=layer)
            history.note("trainable", 1, layer=layer)
    return history


def jumped(history):
    """The same with the traces of a rate that is too high: a loss that leapt up at once."""
    write(history, "loss_before", [2.3] * 3)
    write(history, "loss_after", [2.3, 40.0, 2.3])
    return history
