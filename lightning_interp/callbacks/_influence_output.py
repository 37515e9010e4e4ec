"""What `Influence` writes: pictures, tables and numbers for the loggers, and the list of suspects as a file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_interp.callbacks._embedded import Embedded
from lightning_interp.callbacks._influence_pictures import Side, influenced, is_picture, perturbed, pictures, rows_shown
from lightning_interp.callbacks._influential import Influential
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._periodic import PeriodicCallback
from lightning_interp.callbacks._points import Points
from lightning_interp.callbacks._suspect_files import write_suspects
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.embeddings import EmbeddingPlace
from lightning_interp.functional.gradients import CheckpointedError
from lightning_interp.functional.influence_perturbation import NoPixelGradientError
from lightning_interp.functional.mislabeled import Suspects
from lightning_interp.records import Text
from lightning_interp.render.influence import influence_sheet, influence_table
from lightning_interp.render.perturbation import perturbation_sheet
from lightning_interp.render.suspects import MAX_SHOWN, suspect_rows, suspects_sheet, suspects_table

_CLEAR = 0.995  # of the squared length of the embeddings; with less, effects were off by about 10 % on real digits


class InfluenceOutput:
    """Writes through a callback; to be used inside `undisturbed`, on rank zero."""

    def __init__(self, callback: PeriodicCallback, trainer: Trainer, model: LightningModule, step: int) -> None:
        """Writes nothing yet.

        Args:
            callback: Whose options count and whose loggers get it.
            trainer: The running trainer.
            model: The LightningModule.
            step: Step on the axis of `self.log`.
        """
        self.callback = callback
        self.trainer = trainer
        self.model = model
        self.step = step

    def suspects(self, points: Points, ranked: Suspects) -> None:
        """The most suspicious as a picture, fifty as a table, all in the file.

        Args:
            points: Of the training set.
            ranked: By index in the training set.
        """
        callback = self.callback
        columns = (ranked.indices.tolist(), ranked.given.tolist(), ranked.suggested.tolist(), ranked.scores.tolist())
        rows = suspect_rows(*columns, callback.classes)
        if not rows:
            return
        images = points.images_at(self.trainer, self.model, [row.index for row in rows[:MAX_SHOWN]])
        if self._drawable(images):
            sheet = suspects_sheet(pictures(images, callback.mean, callback.std), rows[:MAX_SHOWN])
            callback.show(self.trainer, "suspect_labels", "images", sheet, step=self.step)
        self._tell("suspect_labels", suspects_table(rows))
        directory = Session.of(self.trainer).directory
        if directory is not None:
            try:
                write_suspects(directory, rows, callback.name)
            except OSError as error:
                callback.say_once(f"suspect_labels.csv can't be written ({error}). The list is still in the loggers.")

    def influence(self, found: Influential, train: Side, test: Side, place: EmbeddingPlace, top_k: int) -> None:
        """The numbers, the sheet, the table and the perturbations.

        Args:
            found: The influences.
            train: The training points, with the images of those in `rows_shown`.
            test: The test points, with their images.
            place: Of the embedding.
            top_k: Helpful and harmful images of each test image.
        """
        callback, trainer, step = self.callback, self.trainer, self.step
        self._say_limit(found)
        callback.log_number(trainer, "influence_gradient_norm", found.head.gradient_norm, step=step)
        if not math.isnan(found.agreement):
            callback.log_number(trainer, "influence_agreement", found.agreement, step=step)
        shown = influenced(found.tests, train, test, callback.class_name)
        self._tell("influence", "\n\n".join(filter(None, (influence_table(shown), found.limit))))
        if not self._drawable([*train.images.values(), *test.images.values()]):
            return
        callback.show(trainer, "influence", "images", influence_sheet(shown, top_k), step=step)
        try:
            pairs = perturbed(self.model, place, found, train, test, callback.class_name)
        except (CheckpointedError, NoPixelGradientError) as error:
            callback.say_once(f"Influence goes on without `interp.influence/perturbation`. {error}")
            return
        if pairs:
            sheet = perturbation_sheet(pairs, mean=callback.mean, std=callback.std)
            callback.show(trainer, "influence", "perturbation", sheet, step=step)

    def sides(
        self, found: Influential, train: tuple[Points, Embedded], test: tuple[Points, Embedded]
    ) -> tuple[Side, Side]:
        """Both kinds of points with the images that are shown."""
        return self._side(*train, rows_shown(found.tests)), self._side(*test, [each.row for each in found.tests])

    def _side(self, points: Points, embedded: Embedded, rows: list[int]) -> Side:
        images = points.images_at(self.trainer, self.model, [points.indices[row] for row in rows])
        seen = pictures(images, self.callback.mean, self.callback.std)
        return Side(points, embedded, dict(zip(rows, images, strict=True)), dict(zip(rows, seen, strict=True)))

    def _say_limit(self, found: Influential) -> None:
        if found.dropped or found.kept < _CLEAR:
            self.callback.say_once(
                "Influence keeps the head small, or each measurement would take minutes: it is fitted on "
                f"{'some of the classes and ' if found.dropped else ''}some axes of the embedding, as the table "
                "`interp.influence/table` says in numbers. What it shows is rougher for that."
            )

    def _drawable(self, images: Sequence[Tensor]) -> bool:
        """Whether all of them are images (C, H, W); if not, says so, once for all callbacks that meet the same."""
        other = next((image for image in images if not is_picture(image)), None)
        if other is not None:
            message = f"has no pictures to show: expected images (C, H, W), but got {tuple(other.shape)}."
            self.callback.say_for_all(self.trainer, UnreadableError, f"{message} Numbers and tables go on.")
        return other is None

    def _tell(self, quantity: str, table: str) -> None:
        text = Text(tag=self.callback.group_tag(quantity, "table"), step=self.step, markdown=table)
        self.callback.write(self.trainer, [text])
