"""Applies the remedy of a specification to the network, the data, the batches and the plan of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.diagnosis.data import Data
from benchmarks.diagnosis.models import ChannelNorm
from benchmarks.diagnosis.remedies import NONE, arguments, combine, factor, items
from benchmarks.diagnosis.spec import Spec

LOOKED_AT = 20  # images that somebody looks at who wants to know whether labels belong to them at all
_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, ChannelNorm)
_WEIGHTED = (nn.Conv2d, nn.Linear)
Batch = tuple[Tensor, Tensor]


def treated(spec: Spec) -> Spec:
    """The specification with rate, epochs and clipping as the remedy has them."""
    clips = arguments(spec.remedy, "clip")
    return replace(
        spec,
        rate=spec.rate * factor(spec.remedy, "rate"),
        epochs=math.ceil(round(spec.epochs * factor(spec.remedy, "steps"), 6)),
        clip=min(map(float, clips)) if clips else spec.clip,
    )


def last_epoch(spec: Spec, epochs: int, steps_per_epoch: int) -> int:
    """Epochs until the training is stopped; the schedule is that of the whole run."""
    stops = [round((int(step) + 1) / steps_per_epoch) for step in arguments(spec.remedy, "stop")]
    return max(1, min([epochs, *stops]))


def treat_data(data: Data, clean: Data, spec: Spec) -> Data:
    """The data, treated.

    Args:
        data: As the run has them.
        clean: Those without a fault; only what a person would see by looking is taken from them.
        spec: Of the run.
    """
    done = NONE
    for name, argument in items(spec.remedy):
        if name == "images" and len(data.images) < len(clean.images):
            data = data._replace(images=clean.images, targets=clean.targets)
        elif name == "inputs":
            data = _shifted(data, argument)
        elif name == "labels":
            count = round(float(argument) * len(data.targets))
            data = _corrected(data, clean, torch.tensor(_suspects(replace(spec, remedy=done))[:count]))
        elif name == "pairs" and wrong_labels(data, clean, LOOKED_AT) > 0.5:
            data = data._replace(targets=clean.targets)
        done = combine(done, f"{name}:{argument}".rstrip(":"))
    return data


def wrong_labels(data: Data, clean: Data, first: int | None = None) -> float:
    """Share of the training labels, or of the first ones, that are wrong; those of few images are the first of all."""
    targets = data.targets[:first]
    return 0.0 if data.regression else float((targets != clean.targets[: len(targets)]).float().mean())


def _shifted(data: Data, argument: str) -> Data:
    if argument:
        mean, std = map(float, argument.split(","))
    else:
        mean, std = float(data.images.mean()), max(float(data.images.std()), 1e-12)
    return data._replace(images=(data.images - mean) / std, val_images=(data.val_images - mean) / std)


def _corrected(data: Data, clean: Data, rows: Tensor) -> Data:
    targets = data.targets.clone()
    targets[rows.long()] = clean.targets[rows.long()]
    return data._replace(targets=targets)


@cache
def _suspects(spec: Spec) -> list[int]:
    """The ranked list of a run. It is trained once more for it: a record does not hold the list."""
    from benchmarks.diagnosis.watched import train_watched  # it needs this module

    suspects: list[int] = train_watched(spec)["suspects"]
    return suspects


def treat_network(net: nn.Module, spec: Spec) -> list[nn.Parameter]:
    """Changes the network in place, and returns parameters that the optimizer must hold."""
    held: list[nn.Parameter] = []
    for name, argument in items(spec.remedy):
        if name == "init":
            _initialise(net)
        elif name == "small_last":
            _scale([module for module in net.modules() if isinstance(module, _WEIGHTED)][-1:], 0.1)
        elif name == "divide":
            _scale([module for module in net.modules() if isinstance(module, _WEIGHTED)], 1 / float(argument))
        elif name == "normalise":
            _normalise(net)
        elif name == "relu":
            _rectify(net)
        elif name == "train":
            # The alert names layers of the LightningModule, which has the network as `net`.
            layer = net.get_submodule(argument.removeprefix("net.")) if argument else net
            held += layer.requires_grad_(True).parameters()
    return held


@torch.no_grad()
def _initialise(net: nn.Module) -> None:
    for module in net.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        if isinstance(module, _WEIGHTED) and module.bias is not None:
            module.bias.zero_()


@torch.no_grad()
def _scale(layers: list[nn.Module], by: float) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.dim() > 1 or len(layers) == 1:  # of a single layer the bias too: its scores are to be small
                parameter.mul_(by)


def _normalise(net: nn.Module) -> None:
    """The last layer gives the scores, and is left as it is."""
    last = [module for module in net.modules() if isinstance(module, _WEIGHTED)][-1]
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for i, (name, child) in enumerate(children):
            # Order in `forward` is known of a Sequential alone; elsewhere a normalisation nearby is taken for its own.
            near = children[i + 1 : i + 2] if isinstance(parent, nn.Sequential) else children
            if isinstance(child, nn.Conv2d) and child is not last and not any(isinstance(n, _NORMS) for _, n in near):
                setattr(parent, name, nn.Sequential(child, nn.BatchNorm2d(child.out_channels)))


def _rectify(net: nn.Module) -> None:
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Sigmoid | nn.Tanh):
                setattr(parent, name, nn.ReLU())


def treat_batch(batch: Batch, step: int, spec: Spec, previous: Batch | None) -> Batch:
    """The batch of this step, treated.

    Args:
        batch: With the fault in it, if it has one.
        step: From 0.
        spec: Of the run.
        previous: The treated batch of the step before; it takes the place of one that is left out, so that all others
            keep their step.
    """
    if spec.remedy == NONE:
        return batch
    if previous is not None and str(step) in arguments(spec.remedy, "skip"):
        return previous
    images, targets = batch
    if arguments(spec.remedy, "finite"):
        kept = images.flatten(1).isfinite().all(1)
        images, targets = images[kept], targets[kept]
    if arguments(spec.remedy, "images") and spec.fault != "few_images":
        images = _jittered(images, torch.Generator().manual_seed(10_000 * spec.seed + step))
    return images, targets


def _jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel along each axis, its border repeated: right for all our data sets."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    moves = torch.randint(3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)])
