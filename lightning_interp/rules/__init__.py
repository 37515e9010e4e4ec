"""Rules: from the numbers of a run to alerts. No torch, no Lightning."""

from __future__ import annotations

from lightning_interp.rules.alert import SEVERITIES, Alert, Severity
from lightning_interp.rules.bad_start import BadStartRule
from lightning_interp.rules.book import AlertBook
from lightning_interp.rules.dead_filters import DeadFiltersRule
from lightning_interp.rules.dormant_units import DormantUnitsRule
from lightning_interp.rules.exploding_gradient import ExplodingGradientRule
from lightning_interp.rules.gradient_spike import GradientSpikeRule
from lightning_interp.rules.history import History, Point, Series
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

__all__ = [
    "SEVERITIES",
    "Alert",
    "AlertBook",
    "BadStartRule",
    "DeadFiltersRule",
    "DormantUnitsRule",
    "ExplodingGradientRule",
    "GradientSpikeRule",
    "History",
    "LearningRateTooHighRule",
    "LearningRateTooLowRule",
    "NoisyFiltersRule",
    "NonFiniteRule",
    "OverfittingRule",
    "Point",
    "Rule",
    "Series",
    "Severity",
    "SuspectLabelsRule",
    "UndertrainedRule",
    "UnlearnedClassRule",
    "UntrainedLayerRule",
    "ValidationMismatchRule",
    "VanishingGradientRule",
    "WeightDecayTooHighRule",
    "default_rules",
]


def default_rules() -> list[Rule]:
    """All rules with their default thresholds, the most urgent first.

    Example:
        >>> [rule.name for rule in default_rules()][:3]
        ['non_finite', 'bad_start', 'learning_rate_too_high']
    """
    return [
        NonFiniteRule(),
        BadStartRule(),
        LearningRateTooHighRule(),
        LearningRateTooLowRule(),
        WeightDecayTooHighRule(),
        ExplodingGradientRule(),
        GradientSpikeRule(),
        VanishingGradientRule(),
        DeadFiltersRule(),
        DormantUnitsRule(),
        UntrainedLayerRule(),
        NoisyFiltersRule(),
        UnlearnedClassRule(),
        ValidationMismatchRule(),
        OverfittingRule(),
        SuspectLabelsRule(),
        UndertrainedRule(),
    ]
