"""Time of the attribution functions against captum's, interleaved on one machine, as ratios.

    python benchmarks/attribution.py [--rounds 5] [--threads 1]

Both compute the same maps (checked before the clock starts), with the same number of images in a forward. A ratio of
1.0 is equal, less than 1 is faster than captum. Needs `captum` (in the dev extra).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import captum.attr as captum_attr
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_interp.functional import incremental
from lightning_interp.functional.integrated_gradients import integrated_gradients
from lightning_interp.functional.occlusion import occlusion, occlusion_map
from lightning_interp.functional.saliency import Method, saliency_map, saliency_maps
from lightning_interp.functional.small_maps import convolve

Call = Callable[[], Tensor]
BATCH = 64


def small_cnn() -> nn.Module:
    """Three convolutions on 32x32 colour images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, str]] = {
    "small CNN, 16 images 32x32": (small_cnn, 16, 32, "5"),
    "resnet18, 4 images 64x64": (lambda: torchvision.models.resnet18(weights=None, num_classes=10), 4, 64, "layer4"),
    "resnet50, 2 images 64x64": (lambda: torchvision.models.resnet50(weights=None, num_classes=10), 2, 64, "layer4"),
    "resnet18, 1 image 224x224": (lambda: torchvision.models.resnet18(weights=None, num_classes=10), 1, 224, "layer4"),
}


def cases(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> dict[str, tuple[Call, Call]]:
    """Name to (ours, captum's); both give (N, H, W)."""
    size = (images.shape[2], images.shape[3])
    window, stride = size[0] // 4, size[0] // 8
    each = max(1, BATCH // len(images))

    def ours(method: str) -> Call:
        return lambda: saliency_map(model, images, targets, method=method)  # type: ignore[arg-type]

    def cam() -> Any:
        oracle = captum_attr.LayerGradCam(model, model.get_submodule(layer))
        found = oracle.attribute(images, targets, relu_attributions=True)
        return captum_attr.LayerAttribution.interpolate(found, size, "bilinear")[:, 0]

    def integrated() -> Any:
        return captum_attr.IntegratedGradients(model).attribute(
            images, torch.zeros_like(images), targets, n_steps=50, method="gausslegendre", internal_batch_size=BATCH
        )

    def covered(per_forward: int) -> Call:
        return lambda: captum_attr.Occlusion(model).attribute(
            images, (3, window, window), strides=(3, stride, stride), target=targets, perturbations_per_eval=per_forward
        )[:, 0]

    def three() -> Tensor:
        methods: list[Method] = ["gradient", "gradient_x_input", "grad_cam"]
        return saliency_maps(model, images, targets, methods=methods)["gradient"]

    def plain(name: str) -> Call:
        return lambda: getattr(captum_attr, name)(model).attribute(images, targets).abs().amax(1)

    drop: dict[str, Any] = {"window": window, "stride": stride, "baseline": 0.0}
    return {
        "gradient": (ours("gradient"), plain("Saliency")),
        "guided_backprop": (ours("guided_backprop"), plain("GuidedBackprop")),
        "deconvnet": (ours("deconvnet"), plain("Deconvolution")),
        "grad_cam": (lambda: saliency_map(model, images, targets, method="grad_cam", layer=layer), cam),
        "integrated_gradients": (
            lambda: integrated_gradients(model, images, targets, baseline=0.0).attributions,
            integrated,
        ),
        "gradient + gradient_x_input + grad_cam": (
            three,
            lambda: (plain("InputXGradient")(), cam(), plain("Saliency")())[2],
        ),
        "occlusion, one window a forward": (lambda: occlusion_map(model, images, targets, **drop), covered(1)),
        "occlusion, 64 images a forward": (lambda: occlusion_map(model, images, targets, **drop), covered(each)),
        "occlusion with all four maps": (lambda: occlusion(model, images, targets, **drop).drop, covered(each)),
    }  # fmt: skip


def measure(ours: Call, theirs: Call, rounds: int) -> tuple[float, float, float]:
    """Median seconds of ours and of captum's, called in turn, and the largest relative difference of their results."""
    found, expected = ours(), theirs()
    difference = float((found - expected).abs().max() / expected.abs().max())
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (turn % 2, 1 - turn % 2):
            started = time.perf_counter()
            (ours, theirs)[which]()
            times[which].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1]), difference


def multiplied(model: nn.Module, call: Call) -> float:
    """Share of the multiplications of its convolutions that a call does, over forwards of as many whole images."""
    done, whole = [], []

    def counting(func: Any, maps: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        found = convolve(func, maps, weight, *rest)
        done.append(found.numel() * weight[0].numel())
        return found

    def listen(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        whole.append(output.numel() * layer.weight[0].numel())
        if type(inputs[0]) is Tensor:  # and no patches, which `counting` sees
            done.append(whole[-1])

    with ExitStack() as stack:
        stack.enter_context(patch.object(incremental, "convolve", counting))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_hook(listen).remove)
        call()
    return sum(done) / sum(whole)


def main() -> None:
    """Prints one table, and how much of the arithmetic an occlusion map saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # captum warns on every call
    table = Table(title="Attribution against captum")
    for heading in ("network", "what", "ours, s", "captum, s", "ratio", "difference"):
        table.add_column(heading, justify="left" if heading in ("network", "what") else "right")
    shares: list[str] = []
    for name, (make, count, side, layer) in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        images, targets = torch.randn(count, 3, side, side), torch.arange(count) % 10
        made = cases(model, images, targets, layer)
        shares.append(f"{name}: {multiplied(model, made['occlusion, 64 images a forward'][0]):.0%}")
        for what, (ours, theirs) in made.items():
            mine, other, difference = measure(ours, theirs, options.rounds)
            if difference > 1e-4:
                raise RuntimeError(f"{what} on {name} differs from captum by {difference:.1e}")
            table.add_row(name, what, f"{mine:.3f}", f"{other:.3f}", f"{mine / other:.2f}", f"{difference:.0e}")
    Console().print(table)
    print("Multiplications that an occlusion map does, of those of all forwards:", "; ".join(shares))


if __name__ == "__main__":
    main()
