"""Which of the metrics that the user logged is the loss, or the accuracy, of the validation."""

from __future__ import annotations

import re
from collections.abc import Collection

from lightning_interp.rules.history import History

LOSS = frozenset({"loss", "nll", "ce", "bce", "mse", "xent", "crossentropy"})
ACCURACY = frozenset({"acc", "accuracy"})
_VALIDATION = frozenset({"val", "valid", "validation", "dev", "eval"})
_PER_STEP = frozenset({"step"})


def find_metric(history: History, kind: Collection[str]) -> str | None:
    """The shortest name of a logged metric that has a word for validation and one of `kind`; None without any.

    Example:
        >>> history = History()
        >>> for name in ("train/loss", "val/loss_box", "val/loss", "valAcc"):
        ...     history.record("validation_metric", 1.0, step=0, layer=name)
        >>> find_metric(history, {"loss"}), find_metric(history, {"acc"})
        ('val/loss', 'valAcc')
    """
    names = []
    for name in history.layers("validation_metric"):
        words = set(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()))
        if words & _VALIDATION and words & set(kind) and not words & _PER_STEP:
            names.append(name)
    return min(names, key=lambda name: (len(name), name), default=None)
