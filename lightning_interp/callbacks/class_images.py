"""`ClassImages`: for each class the image that the network takes for it most, and how it grows clear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_interp._options import check_at_least, check_choice, check_positive_int, expected
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._regression import read_regression
from lightning_interp.callbacks._sampled import SampledCallback
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.batches import NoClassesError
from lightning_interp.callbacks.scores import ScoreModel
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.class_images import METHODS, ClassEvidence, Method, class_evidence, maximize_class
from lightning_interp.render.color import Pixels, denormalise
from lightning_interp.render.gallery import column, frame_side, gallery, timeline

_FRAMES = 10
_ALL = "classes"  # the one film strip
_DEFAULT_CLASSES = 10
_IMAGE_AXES = 4


class ClassImages(SampledCallback):
    """Makes an image for each class by maximising its score, and says whether the network knows it again.

    Logged before the first step, when due, and at the end of the training; the same seed each time, so what changes is
    the network:

    | tag | what |
    |---|---|
    | `interp.class_images/<class>` | the image that maximises the score of the class |
    | `interp.class_images/all` | all of them, each with its class and its probability when moved |
    | `interp.class_images/strip` | a row a class, ten moments from left to right |
    | `interp.class_image_probability/<class>` | of the image, in [0, 1]; noise reaches 1 too |
    | `interp.class_image_augmented/<class>` | mean under small shifts, scalings, rotations: the one to believe |
    | `interp.class_image_score/<class>` | before the softmax |

    The samples, 64 by default, only tell what images look like here (spectrum, colours, range): what the images show
    comes out of the network. Probabilities are those of a softmax, for multi-label tasks too.
    Of a regression (targets that are real numbers, as many as outputs) nothing is shown, which is said once.
    The rule `unlearned_class` reads the augmented probability.

    Cost: each time `steps` forwards and backwards of one image a class, and 17 forwards to judge them. Everything is
    measured on rank zero, in eval mode, in float32.
    Source: Simonyan, Vedaldi and Zisserman 2013, section 2; Olah, Mordvintsev and Schubert 2017 (Distill).
    """

    provides: ClassVar[tuple[str, ...]] = (
        "class_images",
        "class_image_probability",
        "class_image_augmented",
        "class_image_score",
        "cost",
    )
    measures: ClassVar[tuple[str, ...]] = ("class_image_augmented",)

    frames: ClassVar[int] = _FRAMES  # each is a column of all classes

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        class_indices: list[int] | None = None,
        steps: int = 128,
        method: Method = "fourier",
        seed: int = 0,
        num_samples: int = 64,
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
            class_indices: Classes to make images of; None takes the first ten.
            steps: Steps of the optimisation.
            method: `"fourier"`, or `"simonyan"` for the plain method of the paper.
            seed: Of a generator of its own.
            num_samples: How many images tell what the data look like, where `samples` is None.
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
        self.class_indices = _indices(class_indices)
        check_positive_int("steps", steps)
        check_choice("method", method, METHODS)
        check_at_least("seed", seed, 0)
        self.steps = steps
        self.method: Method = method
        self.seed = seed

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Makes the images, judges them, shows both."""
        images = self.images
        if images.ndim != _IMAGE_AXES or not images.is_floating_point():
            raise TypeError(f"Expected images (N, C, H, W) of floating point, but got {images.dtype} {images.shape}")
        model = ScoreModel(pl_module)
        self._refuse_regression(model)
        chosen = self._chosen(model)
        found = maximize_class(model, chosen, data=images, steps=self.steps, method=self.method, seed=self.seed)
        evidence = class_evidence(model, found, chosen, seed=self.seed + 1)
        self._log_numbers(trainer, chosen, evidence, step=step)
        self._show(trainer, chosen, found, evidence, step=step)

    def _refuse_regression(self, model: ScoreModel) -> None:
        """An output without bounds is no class that an image could be taken for, and has no probability."""
        with torch.no_grad():
            numbers = read_regression(model(self.images), self.labels)
        if numbers is not None:
            raise NoClassesError(
                "it needs classes, but the targets are real numbers, as many an image as outputs "
                f"({numbers.targets.shape[1]}): a regression, it seems. If there are classes, give the LightningModule "
                "methods `interp_batch(batch)` that returns (images, labels), and `interp_scores(images)` that returns "
                "(N, classes)."
            )

    def _chosen(self, model: ScoreModel) -> list[int]:
        with torch.no_grad():
            count = model(self.images[:1]).shape[1]
        if self.class_indices is None:
            return list(range(min(count, _DEFAULT_CLASSES)))
        beyond = [index for index in self.class_indices if index >= count]
        if beyond:
            raise ArgumentError(
                f"Expected argument `class_indices` to hold indices below {count}, the number of scores of the model, "
                f"but got {beyond}."
            )
        return self.class_indices

    def _log_numbers(self, trainer: Trainer, chosen: list[int], evidence: ClassEvidence, *, step: int) -> None:
        names = [self.class_name(index) for index in chosen]
        numbers = torch.stack(evidence).double().cpu().tolist()
        score, probability, augmented = (dict(zip(names, each, strict=True)) for each in numbers)
        history = self.notebook(trainer)
        for name, value in augmented.items():
            history.record("class_image_augmented", value, step=step, layer=name)
        self.log_group(trainer, "class_image_probability", probability, step=step)
        self.log_group(trainer, "class_image_augmented", augmented, step=step)
        self.log_group(trainer, "class_image_score", score, step=step)

    def _show(self, trainer: Trainer, chosen: list[int], found: Tensor, evidence: ClassEvidence, *, step: int) -> None:
        pictures = self._pictures(found)
        names = [self.class_name(index) for index in chosen]
        lines = [
            [name, f"p {probability:.2f} moved {augmented:.2f}", f"score {score:.1f}"]
            for name, score, probability, augmented in zip(names, *torch.stack(evidence).tolist(), strict=True)
        ]
        for name, picture, texts in zip(names, pictures, lines, strict=True):
            self.show(trainer, "class_images", name, gallery([picture], [texts]), step=step)
        moved = evidence.augmented.tolist()
        short = [[f"{name} {augmented:.2f}"] for name, augmented in zip(names, moved, strict=True)]
        self.show(trainer, "class_images", "all", gallery(list(pictures), short), step=step)
        side = frame_side(names, _FRAMES)
        film = self.strip(_ALL)
        film.push(step, column(list(pictures), side))
        self.show(trainer, "class_images", "strip", timeline(film.frames(), names, side), step=step)

    def _pictures(self, found: Tensor) -> Pixels:
        """In the colours of the samples: both are stretched by the same numbers where `mean` and `std` are missing."""
        together = torch.cat((self.images.to(found), found)).float().cpu().numpy()
        if self.method == "simonyan" and self.mean is None and self.std is None:
            together = together[len(self.images) :]  # far beyond the data's range, which would all be grey
            return denormalise(together)
        return denormalise(together, self.mean, self.std)[len(self.images) :]


def _indices(value: Any) -> list[int] | None:
    """The indices as a list, each once."""
    if value is None:
        return None
    wrong = isinstance(value, str) or not hasattr(value, "__iter__")
    chosen: list[Any] = [] if wrong else list(value)
    if not chosen or any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in chosen):
        raise expected("class_indices", "a list of class indices from 0 or None", value)
    return list(dict.fromkeys(chosen))
