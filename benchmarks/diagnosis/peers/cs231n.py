"""CS231n's rule of thumb: the update of a parameter should be about 1e-3 of its size (notes, "Neural Networks 3")."""

from __future__ import annotations

import statistics

from benchmarks.diagnosis.peers.finding import Finding
from benchmarks.diagnosis.peers.recorder import Recording

TARGET, FACTOR = 1e-3, 10.0
RULES = frozenset({"learning_rate_too_high", "learning_rate_too_low"})


def check(recording: Recording) -> list[Finding]:
    """Too high or too low if the median ratio is more than a factor of ten from 1e-3.

    "Around 1e-3" has no limits in the notes, nor do they say when to look. The median over all steps and layers is
    kind: it forgives a warm-up, the end of a schedule and a layer that is unlike the others.
    """
    ratios = [
        s.update_norm / s.weight_norm
        for steps in recording.weights.values()
        for s in steps
        if s.finite and s.weight_norm
    ]
    if not ratios:
        return []
    median, last = statistics.median(ratios), len(recording.losses) - 1
    if median > TARGET * FACTOR:
        return [Finding("update ratio too high", "learning_rate_too_high", last)]
    if median < TARGET / FACTOR:
        return [Finding("update ratio too low", "learning_rate_too_low", last)]
    return []
