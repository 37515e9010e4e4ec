"""`SaliencyMaps`: which pixels the network looks at, and how that changes while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_interp._options import check_at_least, check_choice, check_positive_int, check_strings, expected, select
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._regression import read_regression
from lightning_interp.callbacks._sampled import SampledCallback
from lightning_interp.callbacks._verdicts import TARGETS, Target, captions, check_baseline, choose_targets, verdicts
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.scores import ScoreModel
from lightning_interp.functional.faithfulness import Faithfulness, concentration, faithfulness, inside
from lightning_interp.functional.gradients import CheckpointedError
from lightning_interp.functional.saliency import METHODS, Explanation, SaliencyOptions, explain, unseen_message
from lightning_interp.functional.spatial import NoFeatureMapsError
from lightning_interp.render.color import denormalise
from lightning_interp.render.sheets import frame, heat, overlay, sheet, strip_sheet

_HEADINGS = {"gradient_x_input": "gradient x input", "guided_backprop": "guided backprop"}
_HEADINGS |= {"integrated_gradients": "int. gradients", "smooth_grad": "SmoothGrad", "grad_cam": "Grad-CAM"}
_CHANCE_ORDERS = 3  # random orders whose mean is what chance gives


class SaliencyMaps(SampledCallback):
    """Shows which pixels the score of a class hangs on, for the same images all run.

    | `method` | what | forwards and backwards an image |
    |---|---|---|
    | `gradient` | Simonyan et al. 2013: how fast the score changes with a pixel | 1 and 1 |
    | `gradient_x_input` | the same times the pixel | 1 and 1 |
    | `guided_backprop` | Springenberg et al. 2014: only positive gradients pass an activation | 1 and 1 |
    | `deconvnet` | Zeiler and Fergus 2013: likewise, whether or not the activation was on | 1 and 1 |
    | `smooth_grad` | Smilkov et al. 2017: mean gradient over 50 noisy copies, always the same noise | 50 and 50 |
    | `integrated_gradients` | Sundararajan et al. 2017: along a line from the mean colour | `steps` + 2 and `steps` |
    | `grad_cam` | Selvaraju et al. 2017: where the last feature maps speak for the class | 1 and a part of 1 |

    With a list, `gradient`, `gradient_x_input` and `grad_cam` share one forward and one backward; without any of these
    one forward more tells the scores. The curves below cost 2 * `curve_steps` forwards an image for each method, and
    three times that in all for chance. Guided backpropagation and the deconvnet make clear pictures, but these depend
    little on the class and on the upper layers (Adebayo et al. 2018): trust `gradient` and `integrated_gradients` more.
    Grad-CAM takes the mean gradient over positions, which fits networks that average their last maps; where these are
    flattened into a linear layer it may well be zero everywhere, and its picture says so.

    Logged before the first step, when due, and at the end of the training:

    | tag | what |
    |---|---|
    | `interp.saliency/<method>` | image, map, overlay; label, prediction, its probability, loss |
    | `interp.saliency/<method>_strip` | the overlays of four images over time |
    | `interp.saliency_concentration/<method>` | share of the map in a tenth of the pixels; 0.1 is even |
    | `interp.saliency_deletion/<method>` | mean probability while important pixels are taken away; low is good |
    | `interp.saliency_insertion/<method>` | mean probability while important pixels are put in; high is good |
    | `interp.saliency_above_chance/<method>` | insertion - deletion, minus the same for random orders; 0 is chance |
    | `interp.saliency_inside/<method>` | share of the map on the object, where batches hold masks or boxes |
    | `interp.saliency_gap/integrated_gradients` | completeness gap, median; above 0.05 take more `steps` |

    Of a regression (targets that are real numbers, as many as outputs) each image shows what one output hangs on, and
    the numbers that need probabilities are left out: deletion, insertion, above chance.

    Numbers are means over the samples. Everything is measured on rank zero, in eval mode, in float32.
    """

    provides: ClassVar[tuple[str, ...]] = (
        "saliency",
        "saliency_concentration",
        "saliency_deletion",
        "saliency_insertion",
        "saliency_above_chance",
        "saliency_inside",
        "saliency_gap",
        "cost",
    )

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        method: str | list[str] = "gradient",
        target: Target = "label",
        layer: str | None = None,
        baseline: float | Literal["mean"] = "mean",
        steps: int = 50,
        curve_steps: int = 10,
        batch_size: int = 64,
        num_samples: int = 4,
        samples: list[int] | str | tuple[Tensor, Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            method: One or more of the methods above.
            target: The class whose score is explained: the `"label"` (the predicted class where there is none) or the
                `"predicted"` one.
            layer: For `grad_cam`: name of a layer with feature maps; None takes the last convolution and what follows.
            baseline: What an absent pixel looks like: `"mean"` is the mean colour of the samples; or a number.
            steps: For `integrated_gradients`: points on the line.
            curve_steps: Points of the deletion and insertion curves; 0 leaves them out.
            batch_size: Most images in a forward.
            num_samples: How many images, where `samples` is None; at most 8 are shown, the numbers hold all.
            samples: Indices into the validation set, the path of a `.pt` file, or (images, labels); None takes the
                first images of the validation set, else of the training set, else of the first training batch.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            classes: Names of the classes.
            every_n_epochs: Due at the end of every n-th epoch; the first one always is. Every epoch by default.
            every_n_train_steps: Due every n training steps instead.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(
            num_samples=num_samples,
            samples=samples,
            mean=mean,
            std=std,
            classes=classes,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            name=name,
            on_error=on_error,
        )
        self.method = _methods(method)
        check_choice("target", target, TARGETS)
        if layer is not None and (not isinstance(layer, str) or not layer):
            raise expected("layer", "the name of a layer or None", layer)
        check_baseline(baseline)
        check_positive_int("steps", steps)
        check_positive_int("batch_size", batch_size)
        check_at_least("curve_steps", curve_steps, 0)
        self.target: Target = target
        self.layer = layer
        self.baseline: float | Literal["mean"] = baseline
        self.steps = steps
        self.curve_steps = curve_steps
        self.batch_size = batch_size
        self._active: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks `layer`."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._active = list(self.method)
            if self.layer is not None:
                select("layer", [self.layer], [name for name, _ in pl_module.named_modules() if name])

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Maps of all methods, with their pictures and numbers."""
        model = ScoreModel(pl_module)
        found = self._explain(model)
        for method in found.unseen:
            self.say_once(unseen_message(method, pl_module))
        if not found.maps:
            return
        self._log_numbers(trainer, model, found, step=step)
        images = denormalise(self.images.float().cpu().numpy(), self.mean, self.std)
        texts = captions(verdicts(found.scores, self.labels, found.targets), self.class_name)
        for method, maps in found.maps.items():
            values = maps.float().cpu().numpy()
            over = overlay(images, values)
            heading = ("" if values.any() else "zero: ") + _HEADINGS.get(method, method)
            picture = sheet([images, heat(values), over], ["image", heading, "overlay"], texts)
            self.show(trainer, "saliency", method, picture, step=step)
            strip = self.strip(method)
            strip.push(step, frame(over))
            self.show(trainer, "saliency", f"{method}_strip", strip_sheet(strip.frames(), frame(images)), step=step)

    def _explain(self, model: ScoreModel) -> Explanation:
        options = SaliencyOptions(
            layer=self.layer, baseline=self.baseline, steps=self.steps, batch_size=self.batch_size
        )

        def choose(scores: Tensor, part: slice) -> Tensor:
            labels = None if self.labels is None else self.labels[part]
            return choose_targets(scores, labels, self.target, first=part.start or 0)

        try:
            return explain(model, self.images, choose, self._active, options) if self._active else Explanation()
        except NoFeatureMapsError as error:
            self._active.remove("grad_cam")
            self.say_once(f"SaliencyMaps goes on without grad_cam. {error}")
        except CheckpointedError as error:
            if "grad_cam" not in self._active or len(self._active) == 1:
                raise
            self._active = ["grad_cam"]  # its maps may lie behind what is checkpointed
            self.say_once(f"SaliencyMaps goes on with grad_cam alone. {error}")
        return self._explain(model)

    def _log_numbers(self, trainer: Trainer, model: ScoreModel, found: Explanation, *, step: int) -> None:
        maps = found.maps
        self._log_means(trainer, "concentration", {m: concentration(values) for m, values in maps.items()}, step)
        if self.masks is not None:
            masks = self.masks
            self._log_means(trainer, "inside", {m: inside(values, masks) for m, values in maps.items()}, step)
        if found.gap.numel():
            self._log_means(trainer, "gap", {"integrated_gradients": found.gap.nanmedian()}, step)
        if not self.curve_steps or read_regression(found.scores, self.labels) is not None:
            return  # the curves are of probabilities
        curves = {method: self._curves(model, found.targets, values) for method, values in maps.items()}
        same = torch.zeros_like(next(iter(maps.values())))  # equal pixels go in random order
        orders = [self._curves(model, found.targets, same, seed=seed) for seed in range(_CHANCE_ORDERS)]
        chance = torch.stack([order.insertion - order.deletion for order in orders]).mean(dim=0)
        self._log_means(trainer, "deletion", {m: curve.deletion for m, curve in curves.items()}, step)
        self._log_means(trainer, "insertion", {m: curve.insertion for m, curve in curves.items()}, step)
        above = {m: curve.insertion - curve.deletion - chance for m, curve in curves.items()}
        # A map that is the same everywhere (an empty Grad-CAM) says nothing, so nothing is said of it.
        says = {m: values.amax(dim=(1, 2)) > values.amin(dim=(1, 2)) for m, values in maps.items()}
        above = {m: torch.where(says[m], value, torch.nan) for m, value in above.items()}
        self._log_means(trainer, "above_chance", above, step)

    def _curves(self, model: ScoreModel, targets: Tensor, maps: Tensor, *, seed: int = 0) -> Faithfulness:
        return faithfulness(
            model,
            self.images,
            targets,
            maps,
            steps=self.curve_steps,
            baseline=self.baseline,
            seed=seed,
            batch_size=self.batch_size,
        )

    def _log_means(self, trainer: Trainer, quantity: str, values: dict[str, Tensor], step: int) -> None:
        """Means over the samples that have a number; nothing where none has."""
        means = {key: float(value.double().nanmean()) for key, value in values.items()}
        known = {key: value for key, value in means.items() if not math.isnan(value)}
        self.log_group(trainer, f"saliency_{quantity}", known, step=step)


def _methods(method: str | Sequence[str]) -> list[str]:
    """The methods as a list, checked, each once."""
    chosen = [method] if isinstance(method, str) else method
    check_strings("method", chosen, optional=False)
    for each in chosen:
        check_choice("method", each, METHODS)
    if not chosen:
        raise expected("method", "the name of a method or a list of names", method)
    return list(dict.fromkeys(chosen))
