"""`OcclusionMaps`: what the network loses when a part of the image is covered."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lightning_interp._options import check_choice, check_positive_int, expected
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._sampled import SampledCallback
from lightning_interp.callbacks._verdicts import (
    TARGETS,
    Reading,
    Target,
    Verdict,
    captions,
    check_baseline,
    choose_targets,
    verdicts,
)
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.scores import ScoreModel
from lightning_interp.functional.faithfulness import concentration, inside
from lightning_interp.functional.occlusion import Occlusion, occlusion
from lightning_interp.render.color import Pixels, denormalise, sequential
from lightning_interp.render.sheets import Caption, categories, category_color, frame, heat, overlay, sheet, strip_sheet
from lightning_interp.render.text import INK, Segment

log = logging.getLogger("lightning_interp")

_PATIENCE = 2.0  # seconds after which a first measurement says how long it takes
_NAMED = 3  # classes in a caption


class OcclusionMaps(SampledCallback):
    """Covers each image with a window, position by position, and shows what that does to the prediction.

    Slower than a saliency map, and more direct: it asks the network about images that lack something. Logged before the
    first step, when due, and at the end of the training, for the same images all run:

    | tag | what |
    |---|---|
    | `interp.occlusion/drop` | image; drop of the target's score (red: it falls, blue: it rises); overlay |
    | `interp.occlusion/covered` | image; probability of the target; most probable class; loss of the strongest map |
    | `interp.occlusion/strip` | the overlays of four images over time |
    | `interp/occlusion_concentration` | share of the drop in a tenth of the pixels, mean over samples; 0.1 is even |
    | `interp/occlusion_inside` | share of the drop on the object, where batches hold masks or boxes |

    The drop of a pixel is the mean over the windows that cover it; so is its probability (black 0, pale yellow 1). In
    the map of classes the target is light grey, other classes have the colour of their name below it. Of a regression
    (targets that are real numbers, as many as outputs) each image shows what one output loses, and neither probability
    nor class.

    Cost: one forward for each position of the window and one more, for each image: about 50 with the standard window.
    No backward. Everything is measured on rank zero, in eval mode, in float32.
    Source: Zeiler and Fergus 2013, section 4.2 and figure 6.
    """

    provides: ClassVar[tuple[str, ...]] = ("occlusion", "occlusion_concentration", "occlusion_inside", "cost")

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        baseline: float | Literal["mean"] = "mean",
        batch_size: int = 64,
        target: Target = "label",
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
            window: Pixels, one number or (height, width); None is a quarter of the image's shorter side.
            stride: Pixels from one position to the next, at most the window; None is half the window.
            baseline: What the window shows: `"mean"` is the mean colour of the samples; or a number.
            batch_size: Most images in a forward.
            target: The class whose score is watched: the `"label"` (the predicted class where there is none) or the
                `"predicted"` one.
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
            ArgumentError: If an option is wrong; a window larger than the images is found when training starts.
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
        self.window = _pixels("window", window)
        self.stride = _pixels("stride", stride)
        check_baseline(baseline)
        check_positive_int("batch_size", batch_size)
        check_choice("target", target, TARGETS)
        if self.window and self.stride and any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise expected("stride", f"at most the window, {window}, so that every pixel is covered", stride)
        self.baseline: float | Literal["mean"] = baseline
        self.batch_size = batch_size
        self.target: Target = target

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Maps, with their pictures and numbers."""
        model = ScoreModel(pl_module)
        scores = model(self.images.clone()).detach()
        targets = choose_targets(scores, self.labels, self.target)
        side = max(1, min(self.images.shape[2:]) // 4)
        forecast = _Forecast(lambda line: self._say(pl_module, line), bar=not _has_bar(trainer))
        with contextlib.closing(forecast):
            found = occlusion(
                model,
                self.images,
                targets,
                window=self.window or (side, side),
                stride=self.stride,
                baseline=self.baseline,
                batch_size=self.batch_size,
                progress=forecast,
            )
        self._log_numbers(trainer, found.drop, step=step)
        self._show(trainer, found, targets, verdicts(scores, self.labels, targets), step=step)

    def _log_numbers(self, trainer: Trainer, drop: Tensor, *, step: int) -> None:
        numbers = {"concentration": concentration(drop)}
        if self.masks is not None:
            numbers["inside"] = inside(drop, self.masks)
        for quantity, values in numbers.items():
            value = float(values.double().nanmean())
            if not math.isnan(value):  # a network that loses nothing anywhere has none
                self.log_number(trainer, f"occlusion_{quantity}", value, step=step)

    def _show(
        self, trainer: Trainer, found: Occlusion, targets: Tensor, told: Sequence[Verdict | Reading], *, step: int
    ) -> None:
        images = denormalise(self.images.float().cpu().numpy(), self.mean, self.std)
        drop = _numpy(found.drop)
        over = overlay(images, drop, signed=True)
        texts = captions(told, self.class_name)
        columns: list[Pixels] = [images, heat(drop, signed=True), over]
        self.show(trainer, "occlusion", "drop", sheet(columns, ["image", "drop", "overlay"], texts), step=step)

        columns, headings, legends = [images], ["image"], list[Caption](texts)
        if not any(isinstance(each, Reading) for each in told):
            classes, calm = found.top_class.cpu().numpy(), targets.cpu().numpy()
            columns += [sequential(_numpy(found.probability), 0.0, 1.0), categories(classes, calm)]
            headings += ["prob.", "class"]
            legends = [self._legend(*each) for each in zip(classes, calm.tolist(), strict=True)]
        if found.feature_drop is not None:
            columns.append(heat(_numpy(found.feature_drop), signed=True))
            headings.append("filter")
        if len(columns) > 1:
            self.show(trainer, "occlusion", "covered", sheet(columns, headings, legends), step=step)

        strip = self.strip("drop")
        strip.push(step, frame(over))
        self.show(trainer, "occlusion", "strip", strip_sheet(strip.frames(), frame(images)), step=step)

    def _legend(self, classes: NDArray[Any], calm: int) -> Caption:
        """The target, and the classes that take its place under the window, the most frequent ones first."""
        found, counts = np.unique(classes[classes != calm], return_counts=True)
        others = [int(found[i]) for i in np.argsort(-counts, kind="stable")]
        line: list[Segment] = [(f"target {self.class_name(calm)}{', else' if others else ''}", INK)]
        line += [(f" {self.class_name(index)}", category_color(index)) for index in others[:_NAMED]]
        if len(others) > _NAMED:
            line.append((f" +{len(others) - _NAMED}", INK))
        return [line]

    def _say(self, pl_module: LightningModule, line: str) -> None:
        """One line that does not tear the progress bar, the first time only."""
        if line and "forecast" not in self._said:
            self._said.add("forecast")
            log.info(line)
            if _has_bar(pl_module.trainer):
                pl_module.print(line)


class _Forecast:
    """Says how long a measurement is going to take, if that is long, and shows a progress bar where there is room.

    Args:
        say: Takes the line.
        bar: Whether a bar may be shown: not beside Lightning's own, which it would tear.
    """

    def __init__(self, say: Callable[[str], None], *, bar: bool) -> None:
        self._say = say
        self._room = bar
        self._bar: Progress | None = None
        self._started = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Called after each forward."""
        passed = time.perf_counter() - self._started
        expected_time = passed * total / done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif passed >= _PATIENCE / 4 and expected_time > _PATIENCE and done < total:
            self._say(
                f"OcclusionMaps: {total} forwards of single images, about {expected_time:.0f} s each time it is due. "
                "A larger `stride` or fewer samples make it faster."
            )
            console = _console()
            if self._room and console.is_terminal:
                self._bar = Progress(console=console, transient=True)
                self._bar.add_task("OcclusionMaps", total=total, completed=done)
                self._bar.start()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _has_bar(trainer: Trainer) -> bool:
    return bool(getattr(trainer.progress_bar_callback, "is_enabled", False))


def _console() -> Console:
    return Console(stderr=True)


def _pixels(argument: str, value: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width), or None."""
    if value is None:
        return None
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in pair):
        raise expected(argument, "a positive integer, a pair of them, (height, width), or None", value)
    return pair[0], pair[1]


def _numpy(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
