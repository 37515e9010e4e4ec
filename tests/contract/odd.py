"""How an odd run is judged: the same weights as without callbacks, what can be measured there, the rest said once."""

from __future__ import annotations

import re
import warnings

from lightning_interp import Interp, InterpWarning
from tests.contract.battery import differences, reference, run
from tests.contract.factories import often
from tests.contract.nets import Capture

MAKERS = {"often": often, "Interp": lambda: [Interp(on_error="raise")]}
LITTLE = {"samples": 12, "batch": 4}
NUMBERS = frozenset(
    {"interp/dead_filters", "interp/sparsity_mean", "interp/update_ratio_median", "interp/learning_rate"}
)


def survives(recipe, make_callbacks, *, says=(), measured=NUMBERS, kept=True):
    """Trains with callbacks that raise their errors.

    Args:
        recipe: The odd way to train; its reference is the run without callbacks.
        make_callbacks: Makes them anew.
        says: Patterns, one for each InterpWarning that may come; each may come once, no other may.
        measured: Tags that must have been logged.
        kept: Whether bit identity means something.

    Returns:
        The logged numbers, tag to its (step, value) pairs.
    """
    capture = Capture()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InterpWarning)
        outcome = run(recipe, make_callbacks(), capture)
    if kept:
        assert differences(reference(recipe), outcome) == []
    said = [str(warning.message) for warning in caught]  # any other warning is an error
    assert len(said) == len(set(said))
    assert [message for message in said if not any(re.search(pattern, message) for pattern in says)] == []
    assert all(sum(bool(re.search(pattern, message)) for message in said) <= 1 for pattern in says)
    rows = capture.of_interp()
    assert set(measured) <= set(rows)
    return rows
