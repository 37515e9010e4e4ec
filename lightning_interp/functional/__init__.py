"""Pure functions on tensors and models: they know torch, and neither Lightning nor files.

Each callback is a thin layer over these; all of them can be used without a Trainer.
"""

from lightning_interp.functional.dead import dead_filters, dormancy_scores
from lightning_interp.functional.filters import filter_movement, filter_smoothness, variance_entropy
from lightning_interp.functional.sparsity import sparsity
from lightning_interp.functional.updates import step_ratio, update_ratio

__all__ = [
    "dead_filters",
    "dormancy_scores",
    "filter_movement",
    "filter_smoothness",
    "sparsity",
    "step_ratio",
    "update_ratio",
    "variance_entropy",
]
