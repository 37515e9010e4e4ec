"""All callbacks, as functions that make new ones. Errors are raised: a callback that rests would pass every test."""

from __future__ import annotations

from lightning_interp import (
    ActivationSparsity,
    Alerts,
    ClassImages,
    DeadFilters,
    EmbeddingProjection,
    FilterGrid,
    Influence,
    Interp,
    OcclusionMaps,
    SaliencyMaps,
    TopPatches,
    TrainingDynamics,
    standard_callbacks,
)
from lightning_interp.functional.saliency import METHODS


def often():
    """Every callback by itself, each as often as it can be."""
    return [
        DeadFilters(split="train", window_steps=1, on_error="raise"),
        ActivationSparsity(every_n_train_steps=1, num_samples=2, on_error="raise"),
        FilterGrid(every_n_train_steps=1, on_error="raise"),
        TrainingDynamics(dense_steps=1000, on_error="raise"),
        saliency(),
        OcclusionMaps(window=4, every_n_train_steps=2, on_error="raise"),
        ClassImages(steps=3, num_samples=8, on_error="raise"),
        TopPatches(k=2, filters_per_layer=2, on_error="raise"),
        EmbeddingProjection(max_points=9, every_n_train_steps=2, on_error="raise"),
        influence(),
        Alerts(on_error="raise"),
    ]


def full():
    """All that `Interp` can hold; fewer steps for the class images, which are the dear ones."""
    interp = Interp("full", on_error="raise")
    for child in interp.children:
        if isinstance(child, ClassImages):
            child.steps = 3
    return [interp]


def saliency():
    """All methods, as cheaply as can be."""
    return SaliencyMaps(
        method=METHODS,
        steps=3,
        curve_steps=2,
        num_samples=2,
        every_n_train_steps=1,
        on_error="raise",
    )


def influence():
    """Both halves, on few images."""
    return Influence(
        num_test=2, num_train=12, top_k=2, neighbors=3, weight_decay=0.1, every_n_train_steps=2, on_error="raise"
    )


SINGLE = {
    "DeadFilters": lambda: [DeadFilters(on_error="raise")],
    "DeadFilters_train": lambda: [DeadFilters(split="train", window_steps=2, on_error="raise")],
    "ActivationSparsity": lambda: [ActivationSparsity(every_n_train_steps=1, on_error="raise")],
    "FilterGrid": lambda: [FilterGrid(every_n_train_steps=1, on_error="raise")],
    "TrainingDynamics": lambda: [TrainingDynamics(dense_steps=1000, on_error="raise")],
    "SaliencyMaps": lambda: [saliency()],
    "OcclusionMaps": lambda: [OcclusionMaps(window=4, every_n_train_steps=2, on_error="raise")],
    "ClassImages": lambda: [ClassImages(steps=3, num_samples=8, on_error="raise")],
    "TopPatches": lambda: [TopPatches(k=2, filters_per_layer=2, on_error="raise")],
    "EmbeddingProjection": lambda: [EmbeddingProjection(max_points=9, every_n_train_steps=2, on_error="raise")],
    "EmbeddingProjection_tsne": lambda: [EmbeddingProjection(method="tsne", perplexity=[2, 4], on_error="raise")],
    "Influence": lambda: [influence()],
    "Alerts": lambda: [Alerts(on_error="raise")],
}
WHOLE = {
    "often": often,
    "Interp": full,
    "standard": lambda: standard_callbacks(on_error="raise"),
}
ALL = {**SINGLE, **WHOLE}
CLASSES = (
    DeadFilters,
    ActivationSparsity,
    FilterGrid,
    TrainingDynamics,
    SaliencyMaps,
    OcclusionMaps,
    ClassImages,
    TopPatches,
    EmbeddingProjection,
    Influence,
    Alerts,
    Interp,
)
