"""See inside a CNN while PyTorch Lightning trains it.

Everything public is here, and is loaded when it is first used: TensorBoard imports this package at every start, for
every user, so the import itself must cost milliseconds and must load neither torch nor Lightning (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp import functional
    from lightning_interp._version import __version__
    from lightning_interp.callbacks.activation_sparsity import ActivationSparsity
    from lightning_interp.callbacks.alerts import Alerts
    from lightning_interp.callbacks.class_images import ClassImages
    from lightning_interp.callbacks.dead_filters import DeadFilters
    from lightning_interp.callbacks.embedding_projection import EmbeddingProjection
    from lightning_interp.callbacks.filter_grid import FilterGrid
    from lightning_interp.callbacks.influence import Influence
    from lightning_interp.callbacks.interp import Interp, standard_callbacks
    from lightning_interp.callbacks.occlusion_maps import OcclusionMaps
    from lightning_interp.callbacks.saliency_maps import SaliencyMaps
    from lightning_interp.callbacks.top_patches import TopPatches
    from lightning_interp.callbacks.training_dynamics import TrainingDynamics
    from lightning_interp.errors import AlertRaised, ArgumentError, InterpWarning
    from lightning_interp.rules.alert import Alert
    from lightning_interp.rules.bad_start import BadStartRule
    from lightning_interp.rules.dead_filters import DeadFiltersRule
    from lightning_interp.rules.dormant_units import DormantUnitsRule
    from lightning_interp.rules.exploding_gradient import ExplodingGradientRule
    from lightning_interp.rules.gradient_spike import GradientSpikeRule
    from lightning_interp.rules.learning_rate_too_high import LearningRateTooHighRule
    from lightning_interp.rules.learning_rate_too_low import LearningRateTooLowRule
    from lightning_interp.rules.noisy_filters import NoisyFiltersRule
    from lightning_interp.rules.non_finite import NonFiniteRule
    from lightning_interp.rules.overfitting import OverfittingRule
    from lightning_interp.rules.rule import Rule
    from lightning_interp.rules.suspect_labels import SuspectLabelsRule
    from lightning_interp.rules.undertrained import UndertrainedRule
    from lightning_interp.rules.unlearned_class import UnlearnedClassRule
    from lightning_interp.rules.untrained_layer import UntrainedLayerRule
    from lightning_interp.rules.validation_mismatch import ValidationMismatchRule
    from lightning_interp.rules.vanishing_gradient import VanishingGradientRule
    from lightning_interp.rules.weight_decay_too_high import WeightDecayTooHighRule

_HOMES = {
    "ActivationSparsity": "callbacks.activation_sparsity",
    "Alert": "rules.alert",
    "AlertRaised": "errors",
    "Alerts": "callbacks.alerts",
    "ArgumentError": "errors",
    "BadStartRule": "rules.bad_start",
    "ClassImages": "callbacks.class_images",
    "DeadFilters": "callbacks.dead_filters",
    "DeadFiltersRule": "rules.dead_filters",
    "DormantUnitsRule": "rules.dormant_units",
    "EmbeddingProjection": "callbacks.embedding_projection",
    "ExplodingGradientRule": "rules.exploding_gradient",
    "FilterGrid": "callbacks.filter_grid",
    "GradientSpikeRule": "rules.gradient_spike",
    "Influence": "callbacks.influence",
    "Interp": "callbacks.interp",
    "InterpWarning": "errors",
    "ValidationMismatchRule": "rules.validation_mismatch",
    "LearningRateTooHighRule": "rules.learning_rate_too_high",
    "LearningRateTooLowRule": "rules.learning_rate_too_low",
    "NoisyFiltersRule": "rules.noisy_filters",
    "NonFiniteRule": "rules.non_finite",
    "OcclusionMaps": "callbacks.occlusion_maps",
    "OverfittingRule": "rules.overfitting",
    "Rule": "rules.rule",
    "SaliencyMaps": "callbacks.saliency_maps",
    "SuspectLabelsRule": "rules.suspect_labels",
    "TopPatches": "callbacks.top_patches",
    "TrainingDynamics": "callbacks.training_dynamics",
    "UndertrainedRule": "rules.undertrained",
    "UnlearnedClassRule": "rules.unlearned_class",
    "UntrainedLayerRule": "rules.untrained_layer",
    "VanishingGradientRule": "rules.vanishing_gradient",
    "WeightDecayTooHighRule": "rules.weight_decay_too_high",
    "__version__": "_version",
    "standard_callbacks": "callbacks.interp",
}

__all__ = [
    "ActivationSparsity",
    "Alert",
    "AlertRaised",
    "Alerts",
    "ArgumentError",
    "BadStartRule",
    "ClassImages",
    "DeadFilters",
    "DeadFiltersRule",
    "DormantUnitsRule",
    "EmbeddingProjection",
    "ExplodingGradientRule",
    "FilterGrid",
    "GradientSpikeRule",
    "Influence",
    "Interp",
    "InterpWarning",
    "LearningRateTooHighRule",
    "LearningRateTooLowRule",
    "NoisyFiltersRule",
    "NonFiniteRule",
    "OcclusionMaps",
    "OverfittingRule",
    "Rule",
    "SaliencyMaps",
    "SuspectLabelsRule",
    "TopPatches",
    "TrainingDynamics",
    "UndertrainedRule",
    "UnlearnedClassRule",
    "UntrainedLayerRule",
    "ValidationMismatchRule",
    "VanishingGradientRule",
    "WeightDecayTooHighRule",
    "__version__",
    "functional",
    "standard_callbacks",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its file, once."""
    if name == "functional":
        return import_module("lightning_interp.functional")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *__all__})
