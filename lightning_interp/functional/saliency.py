"""Saliency maps: which pixels a class score hangs on, by gradients."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from lightning_interp._options import check_choice, check_number, check_positive_int
from lightning_interp.errors import InterpWarning
from lightning_interp.functional.baselines import Baseline, check_images
from lightning_interp.functional.grad_cam import grad_cam
from lightning_interp.functional.gradients import Choose, input_gradients, plain_pass
from lightning_interp.functional.integrated_gradients import integrated_gradients, smooth_gradients
from lightning_interp.functional.rectifiers import Rectifiers, Rule
from lightning_interp.functional.undisturbed import undisturbed

Method = Literal[
    "gradient",
    "gradient_x_input",
    "guided_backprop",
    "deconvnet",
    "smooth_grad",
    "integrated_gradients",
    "grad_cam",
]
METHODS: tuple[str, ...] = get_args(Method)
RULES: tuple[Rule, ...] = ("guided_backprop", "deconvnet")
_PLAIN = frozenset({"gradient", "gradient_x_input", "grad_cam"})


class Chooser(Protocol):
    """Chooses the classes to explain."""

    def __call__(self, scores: Tensor, part: slice) -> Tensor:
        """Takes the scores (M, classes) of the images in that part of all of them; gives their targets (M,)."""


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions:
    """What the methods have in common.

    Attributes:
        layer: For `grad_cam`: a name as in `model.named_modules()`; None finds the last layer with positions.
        baseline: For `integrated_gradients`: `"mean"`, a number or a tensor that broadcasts to the images.
        steps: For `integrated_gradients`: points on the path.
        draws: For `smooth_grad`: noisy copies.
        noise: For `smooth_grad`: standard deviation as a share of each image's range.
        seed: For `smooth_grad`: of its own generator.
        batch_size: Most images in a forward.
    """

    layer: str | None = None
    baseline: Baseline = "mean"
    steps: int = 50
    draws: int = 50
    noise: float = 0.15
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for argument in ("steps", "draws", "batch_size"):
            check_positive_int(argument, getattr(self, argument))
        check_number("noise", self.noise, low=0.0, high=10.0)


@dataclass
class Explanation:
    """What `explain` finds, detached.

    Attributes:
        maps: Method to (N, H, W).
        scores: (N, classes), where the model was run as it is; else empty.
        targets: (N,), the classes that the maps explain.
        gap: (N,), relative completeness gap of `integrated_gradients`; else empty.
        unseen: Methods that saw no activation to apply their rule to: their maps equal `gradient`.
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    gap: Tensor = field(default_factory=lambda: torch.empty(0))
    unseen: tuple[str, ...] = ()


def saliency_map(
    model: nn.Module, images: Tensor, targets: Tensor, *, method: Method = "gradient", **options: Any
) -> Tensor:
    """How much each pixel matters to the score of a class.

    | method | map | forwards and backwards an image |
    |---|---|---|
    | `gradient` | abs(d score / d pixel), maximum over channels | 1 and 1 |
    | `gradient_x_input` | abs(pixel * d score / d pixel), maximum over channels | 1 and 1 |
    | `guided_backprop` | as `gradient`, but each activation passes positive gradients only | 1 and 1 |
    | `deconvnet` | likewise, and the activation's own derivative is left out | 1 and 1 |
    | `smooth_grad` | abs(mean gradient over noisy copies), maximum over channels | `draws` and `draws` |
    | `integrated_gradients` | abs(attribution), maximum over channels | `steps` + 2 and `steps` |
    | `grad_cam` | ReLU(weighted sum of the last feature maps), enlarged | 1 and 1, back to the maps |

    The model runs in eval mode and is left as it was. Units: of the score, per unit of the (normalised) input for
    `gradient`, `smooth_grad` and the two rules.

    Args:
        model: `model(images) -> (N, classes)`; the scores should be those before the softmax.
        images: (N, C, H, W), floating.
        targets: (N,), the class of each image whose score is explained.
        method: See the table.
        options: See `SaliencyOptions`: `layer`, `baseline`, `steps`, `draws`, `noise`, `seed`, `batch_size`.

    Returns:
        (N, H, W), at least 0, detached, on the device of `images`.

    Raises:
        ArgumentError: If an argument is wrong.
        NoFeatureMapsError: If `grad_cam` finds no feature maps.
        CheckpointedError: If the model is checkpointed with `use_reentrant=True`.

    Warns:
        InterpWarning: If `guided_backprop` or `deconvnet` sees no activation; the map is then the plain gradient's.

    Source: Simonyan, Vedaldi and Zisserman 2013, section 3.1 (`gradient`); Springenberg et al. 2014 (guided); Zeiler
    and Fergus 2013 (deconvnet); Smilkov et al. 2017; Sundararajan et al. 2017; Selvaraju et al. 2017.

    Example:
        >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = linear[1].weight.data.copy_(torch.tensor([[1.0, -2.0, 0.0, 3.0]]))
        >>> saliency_map(linear, torch.zeros(1, 1, 2, 2), torch.tensor([0]))
        tensor([[[1., 2.],
                 [0., 3.]]])
    """
    return saliency_maps(model, images, targets, methods=[method], **options)[method]


def saliency_maps(
    model: nn.Module, images: Tensor, targets: Tensor, *, methods: Sequence[Method], **options: Any
) -> dict[str, Tensor]:
    """Maps by several methods; `gradient`, `gradient_x_input` and `grad_cam` share one forward and one backward.

    Arguments, errors and sources: see `saliency_map`.

    Returns:
        Method to (N, H, W).
    """
    found = explain(model, images, targets, methods, SaliencyOptions(**options))
    for method in found.unseen:
        warnings.warn(unseen_message(method, model), InterpWarning, stacklevel=2)
    return found.maps


def unseen_message(method: str, model: nn.Module) -> str:
    """What to say about a method that found no activation."""
    return (
        f"{method} saw no activation that it has a rule for in {type(model).__name__}, so its map equals the plain "
        "gradient. It has one for ReLU and its kin (nn.ReLU, F.relu, x.relu(), F.gelu, F.silu, ...), as modules or "
        "functions of torch outside TorchScript."
    )


def explain(
    model: nn.Module, images: Tensor, targets: Tensor | Chooser, methods: Sequence[str], options: SaliencyOptions
) -> Explanation:
    """The maps of several methods, and what was found on the way.

    Args:
        model: `model(images) -> (N, classes)`.
        images: (N, C, H, W).
        targets: (N,), or a function that chooses them; that costs a forward where no method of the list runs the model
            as it is.
        methods: Of `METHODS`.
        options: Of the methods.
    """
    for method in methods:
        check_choice("method", method, METHODS)
    with undisturbed(model, training=False, gradients=True):
        given = torch.zeros(len(images), dtype=torch.int64) if callable(targets) else targets
        images, checked = check_images(images, given)
        choose: Chooser = targets if callable(targets) else lambda scores, part: checked[part]
        size = options.batch_size
        if callable(targets) or _PLAIN & set(methods):
            parts = [
                _first_pass(model, images[part], functools.partial(choose, part=part), methods, options)
                for part in (slice(first, first + size) for first in range(0, len(images), size))
            ]
        else:
            parts = [Explanation(targets=checked)]
        found = _joined(parts)
        _averaged(model, images, methods, options, found)
        for rule in RULES:
            if rule in methods:
                _ruled(model, images, rule, options, found)
    found.maps = {method: found.maps[method] for method in methods}
    return found


def _first_pass(
    model: nn.Module, images: Tensor, choose: Choose, methods: Sequence[str], options: SaliencyOptions
) -> Explanation:
    """All that comes from the model as it is, by one forward and at most one backward."""
    if not _PLAIN & set(methods):
        with torch.no_grad():
            scores = model(images.clone())
        return Explanation(scores=scores, targets=choose(scores))
    pixels = bool({"gradient", "gradient_x_input"} & set(methods))
    plain = plain_pass(model, images, choose, pixels=pixels, maps="grad_cam" in methods, layer=options.layer)
    maps = {}
    if plain.gradients is not None and "gradient" in methods:
        maps["gradient"] = over_channels(plain.gradients)
    if plain.gradients is not None and "gradient_x_input" in methods:
        maps["gradient_x_input"] = over_channels(plain.gradients * images)
    if plain.maps is not None and plain.map_gradients is not None:
        size = (images.shape[2], images.shape[3])
        maps["grad_cam"] = grad_cam(plain.maps, plain.map_gradients, size).to(images.dtype)
    return Explanation(maps=maps, scores=plain.scores, targets=plain.targets)


def _batches(images: Tensor, targets: Tensor, options: SaliencyOptions) -> Iterator[tuple[Tensor, Tensor]]:
    size = options.batch_size
    return zip(torch.split(images, size), torch.split(targets, size), strict=True)


def _joined(parts: Sequence[Explanation]) -> Explanation:
    return Explanation(
        maps={method: torch.cat([part.maps[method] for part in parts]) for method in parts[0].maps},
        scores=torch.cat([part.scores for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
    )


def _averaged(
    model: nn.Module, images: Tensor, methods: Sequence[str], options: SaliencyOptions, found: Explanation
) -> None:
    """What averages gradients over many images."""
    targets, size = found.targets, options.batch_size
    if "smooth_grad" in methods:
        gradients = smooth_gradients(
            model, images, targets, draws=options.draws, noise=options.noise, seed=options.seed, batch_size=size
        )
        found.maps["smooth_grad"] = over_channels(gradients)
    if "integrated_gradients" in methods:
        integral = integrated_gradients(
            model, images, targets, baseline=options.baseline, steps=options.steps, batch_size=size
        )
        found.maps["integrated_gradients"] = over_channels(integral.attributions)
        found.gap = integral.gap


def _ruled(model: nn.Module, images: Tensor, rule: Rule, options: SaliencyOptions, found: Explanation) -> None:
    """Gradients under another rule for activations."""
    listener = Rectifiers(rule)
    maps = []
    for part, wanted in _batches(images, found.targets, options):
        with listener:
            maps.append(over_channels(input_gradients(model, part, wanted)))
    found.maps[rule] = torch.cat(maps)
    if listener.count == 0:
        found.unseen = (*found.unseen, rule)


def over_channels(values: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H, W): the largest magnitude of any channel."""
    return values.abs().amax(dim=1)
