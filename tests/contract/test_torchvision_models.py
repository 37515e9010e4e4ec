"""The callbacks change nothing in the networks that people train: torchvision's, from scratch, on tiny images."""

import functools
import math

import pytest
import torch
from torchvision import models

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
)
from tests.contract.battery import Recipe, differences, run
from tests.contract.nets import CLASSES, Capture, Net

pytestmark = pytest.mark.slow
DATA = {"samples": 6, "batch": 3}
# On 32x32 images, or at that rate, its validation loss is no number.
SIZES, RATES = {"efficientnet_b0": 64}, {"efficientnet_b0": 0.01}
LOGGED = {
    "interp.dead_filters", "interp.sparsity", "interp.update_ratio", "interp.filter_movement",
    "interp.saliency_concentration",
}  # fmt: skip
NETWORKS = {
    "resnet18": models.resnet18,
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "convnext_tiny": models.convnext_tiny,
    "vit_b_16": lambda **options: models.vit_b_16(image_size=32, dropout=0.1, **options),
    "efficientnet_b0": models.efficientnet_b0,
}


class Large(Net):
    """Notes sums of gradients instead of all of them: they are compared in full at the end."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        sums = [None if p.grad is None else p.grad.sum().item() for p in self.parameters()]
        self.note("end", batch_idx, gradients=sums)


def briefly():
    """Every callback; those that watch, on each step, those that call the model, at the start and at the end."""
    return [
        DeadFilters(split="train", window_steps=1, on_error="raise"),
        ActivationSparsity(every_n_train_steps=1, on_error="raise"),
        TrainingDynamics(dense_steps=1000, on_error="raise"),
        FilterGrid(max_layers=2, on_error="raise"),
        SaliencyMaps(method=["guided_backprop", "grad_cam"], curve_steps=0, num_samples=1, on_error="raise"),
        OcclusionMaps(window=16, stride=16, num_samples=1, on_error="raise"),
        ClassImages(steps=1, num_samples=2, class_indices=[0], on_error="raise"),
        TopPatches(k=1, filters_per_layer=1, max_layers=2, on_error="raise"),
        EmbeddingProjection(max_points=6, on_error="raise"),
        Influence(num_test=1, num_train=6, top_k=1, neighbors=2, on_error="raise"),
        Alerts(on_error="raise"),
    ]


def one_line():
    """As most people have it."""
    return [Interp(on_error="raise")]


@pytest.mark.parametrize("name", NETWORKS)
def test_callbacks_leave_a_torchvision_network_bit_identical(name):
    """Dropout, stochastic depth, squeeze-and-excitation, attention, BatchNorm in train mode."""
    size, optimizer = SIZES.get(name, 32), functools.partial(torch.optim.SGD, lr=RATES.get(name, 0.05), momentum=0.9)
    recipe = Recipe(
        name,
        lambda: Large(NETWORKS[name](num_classes=CLASSES), optimizer),
        data={**DATA, "shape": (3, size, size)},
        trainer={"max_epochs": 1},
    )
    expected = run(recipe, [])
    assert len(expected["diary of the steps"]) > 4
    assert math.isfinite(expected["callback_metrics"]["val/loss"])
    for make in (briefly, one_line):
        capture = Capture()
        assert differences(expected, run(recipe, make(), capture)) == []
        logged = {tag.partition("/")[0] for tag in capture.of_interp()} | set(capture.of_interp())
        assert logged >= LOGGED | {"interp/knn_accuracy"}
