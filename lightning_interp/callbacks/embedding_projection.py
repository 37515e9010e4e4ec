"""`EmbeddingProjection`: how well the features separate the classes, as a map, in the projector and in numbers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_interp._options import check_choice, check_positive_int, expected, select
from lightning_interp.callbacks._embedded import Embedded, embed_points, find_place
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._maps import Maps
from lightning_interp.callbacks._periodic import PeriodicCallback
from lightning_interp.callbacks._points import Points, choose_points, is_stream
from lightning_interp.callbacks._stream import StreamedSamples
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.samples import check_samples
from lightning_interp.callbacks.schedule import BatchHooks
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.embeddings import EmbeddingPlace
from lightning_interp.functional.separation import separation
from lightning_interp.records import Embedding
from lightning_interp.render.color import denormalise
from lightning_interp.render.scatter import scatter, scatter_frame

Method = Literal["pca", "tsne", "umap"]
METHODS = ("pca", "tsne", "umap")
_MOST_TSNE = 10_000
NUMBERS = ("knn_accuracy", "silhouette", "fisher_ratio", "nc1", "effective_rank")


class EmbeddingProjection(PeriodicCallback):
    """Shows how the features of the last layer but one separate the classes, on the same points for the whole run.

    The embedding is what goes into the last Linear layer, or what `layer` returns, averaged over positions. The points
    are spread evenly over the validation set (else over the training set) and read by index from a copy of it.

    | tag | what |
    |---|---|
    | `interp.embedding/<layer>` | a map of the points, classes in colour; the same points in the projector |
    | `interp.embedding_strip/<layer>` | the map over time |
    | `interp/knn_accuracy`, `interp/silhouette`, `interp/fisher_ratio`, `interp/nc1`, `interp/effective_rank` | how |
    | | well the classes are separated in all dimensions: `functional.separation` |
    | `interp.embedding_displacement/<map>` | how far the median point moved on the map, in units of its spread |
    | `interp.embedding_kl/<map>` | Kullback-Leibler divergence of t-SNE, in nats; not to compare perplexities |

    Points keep their place from event to event: the maps are aligned to the last one, t-SNE and UMAP begin where they
    ended. Distances between far groups, and the sizes of groups, mean little on a t-SNE map; look at several
    perplexities side by side. Ringed points are those to which the network gives another class. The projector holds the
    embedding itself, each row scaled to length 1, at most 16 events of it; choose "Color by: label" there, and reload
    the page for events that came after it was opened. It makes one more run appear, `<run>/projector/update_<n>`.

    `interp/knn_accuracy` is in `trainer.callback_metrics` too, NaN until it is first measured.

    Cost: a forward of the points each time, of which each rank under DDP makes its share; then, for 2,000 points of 128
    features and one thread, 0.2 s for the numbers, 0.01 s for PCA, 7 s for t-SNE the first two times, then 2.4 s
    (`benchmarks/projection.py`).

    Source: van der Maaten and Hinton 2008 (t-SNE); McInnes et al. 2018 (UMAP); Papyan, Han and Donoho 2020 (NC1).
    """

    provides: ClassVar[tuple[str, ...]] = (
        "embedding",
        "embedding_strip",
        "embedding_displacement",
        "embedding_kl",
        *NUMBERS,
        "cost",
    )
    measures: ClassVar[tuple[str, ...]] = ("knn_accuracy",)

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        method: Method = "pca",
        perplexity: float | list[float] = 30.0,
        layer: str | None = None,
        max_points: int = 2000,
        samples: list[int] | str | tuple[Tensor, Tensor] | None = None,
        projector: bool = True,
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
            method: Of the map: `"pca"`, `"tsne"`, or `"umap"` (needs the extra `umap`).
            perplexity: Of t-SNE; several give maps side by side.
            layer: Name of the layer whose output is the embedding; None takes what goes into the last Linear layer.
            max_points: Most points; at most 10,000 for t-SNE, which takes minutes for more.
            samples: The points: indices into the validation set, the path of a `.pt` file, or (images, labels); None
                spreads `max_points` evenly over the validation set, else over the training set. Of a stream, the first
                ones that the training delivers are kept, up to 64 MB.
            projector: Whether to write for TensorBoard's projector too.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            classes: Names of the classes.
            every_n_epochs: Due at the end of every n-th epoch; the first one always is. Every epoch by default.
            every_n_train_steps: Due every n training steps instead.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong, or `method="umap"` and umap-learn is not installed.
        """
        check_choice("method", method, METHODS)
        check_positive_int("max_points", max_points)
        check_samples("samples", samples)
        if layer is not None and (not isinstance(layer, str) or not layer):
            raise expected("layer", "the name of a layer or None", layer)
        if not isinstance(projector, bool):
            raise expected("projector", "True or False", projector)
        if method == "umap" and importlib.util.find_spec("umap") is None:
            raise ArgumentError(
                "Expected umap-learn for argument `method='umap'`, but it is not installed: pip install "
                "'lightning-interp[umap]'."
            )
        self.method: Method = method
        self.perplexities = _perplexities(perplexity)
        super().__init__(
            mean=mean,
            std=std,
            classes=classes,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            name=name,
            on_error=on_error,
        )
        self.layer = layer
        self._check_count("max_points", max_points)
        self.max_points = max_points
        self.samples = samples
        self.projector = projector

    def _forget(self) -> None:
        super()._forget()
        self._points: Points | None = None
        self._stream: StreamedSamples | None = None
        self._place: EmbeddingPlace | None = None
        self._sprites: NDArray[np.uint8] | None = None
        self._sprites_read = False
        self._maps = Maps(self.method, self.perplexities)
        self._knn_accuracy = math.nan

    def _check_count(self, argument: str, count: int) -> None:
        if self.method == "tsne" and count > _MOST_TSNE:
            raise ArgumentError(
                f"Expected argument `{argument}` to give at most {_MOST_TSNE:,} points with method='tsne', which takes "
                f"minutes for more, but got {count:,}. Take fewer points, or method='pca'."
            )

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session and checks the name of the layer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.layer is not None:
            select("layer", [self.layer], [name for name, _ in pl_module.named_modules() if name])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts a number where the callbacks that monitor look for it."""
        self._publish(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the points, and shows the state before the first step."""
        self._publish(trainer)
        if is_stream(trainer, self.samples):
            if self._stream is None and trainer.is_global_zero:
                self._stream = StreamedSamples(self.max_points)
            return
        self._points = choose_points(trainer, self.max_points, self.samples)
        self._check_count("samples", len(self._points))
        self._measure_once("on_train_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps samples of a stream."""
        if self._stream is not None:
            self._stream.keep(pl_module, batch)

    def batch_hooks(self, trainer: Trainer, batch_idx: int, step: int, *, stepping: bool) -> BatchHooks:
        """Those of a batch that is due; of a stream, all."""
        if self._stream is not None:
            return BatchHooks(self._batch_hooks)
        return super().batch_hooks(trainer, batch_idx, step, stepping=stepping)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the number where the callbacks that monitor look for it."""
        self._publish(trainer)

    def meets(self, hook: str, trainer: Trainer) -> bool:
        """All ranks embed their share, unless the points come from a stream, which rank zero alone keeps."""
        return not is_stream(trainer, self.samples) and self.due(hook, trainer) is not None

    def _measure_once(self, hook: str, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._points is None and self._stream is not None and self.due(hook, trainer) is not None:
            self._points = self._stream.points()
        if self._points is not None:
            super()._measure_once(hook, trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Embeds the points on all ranks; numbers everywhere, pictures on rank zero."""
        if self._points is None:
            return
        if self._place is None:
            self._place = find_place(pl_module, self._points, trainer, self.layer)
        shown = bool(trainer.loggers) and not self.quiet
        wanted = shown and self.projector and not self._sprites_read
        alone = self._stream is not None
        found = embed_points(None if alone else self, trainer, pl_module, self._points, self._place, thumbnails=wanted)
        if wanted:
            self._sprites_read, self._sprites = True, self._thumbnails(found.thumbnails)
        known = found.labels >= 0
        numbers = separation(found.rows[known], found.labels[known]) if bool(known.any()) else {}
        self._knn_accuracy = numbers.get("knn_accuracy", math.nan)
        self._publish(trainer)
        for quantity, value in _finite(numbers).items():
            self.log_number(trainer, quantity, value, step=step, note=quantity in self.measures)
        if trainer.is_global_zero and shown:
            self._draw(trainer, found, self._place.layer, step=step)
            if self.projector:
                self._write_projector(trainer, found, self._place.layer, step=step)

    def _publish(self, trainer: Trainer) -> None:
        self.publish(trainer, {self.tag("knn_accuracy"): self._knn_accuracy})

    # ------------------------------------------------------------------ output

    def _draw(self, trainer: Trainer, found: Embedded, layer: str, *, step: int) -> None:
        """The maps side by side, the film strip of the first one, and what they say of themselves."""
        maps = self._maps.draw(found.rows)
        moved = {key: each.displacement for key, each in maps.items()}
        kl = {key: each.projection.kl_divergence for key, each in maps.items()}
        self.log_group(trainer, "embedding_displacement", _finite(moved), step=step)
        self.log_group(trainer, "embedding_kl", _finite(kl), step=step)
        labels = found.labels.numpy()
        wrong = None if bool((found.predicted < 0).all()) else ((found.predicted != found.labels) & (found.labels >= 0))
        panels = [(each.title, each.projection.coordinates.numpy()) for each in maps.values()]
        picture = scatter(
            panels,
            labels,
            names=self.classes,
            marked=None if wrong is None else wrong.numpy(),
            note="" if wrong is None else "ringed: the network predicts another class",
        )
        self.show(trainer, "embedding", layer, picture, step=step)
        film = self.strip(layer)
        film.push(step, scatter_frame(panels[0][1], labels))
        self.show(trainer, "embedding_strip", layer, film.picture(), step=step)

    def _write_projector(self, trainer: Trainer, found: Embedded, layer: str, *, step: int) -> None:
        names = [self.class_name(label) if label >= 0 else "?" for label in found.labels.tolist()]
        guesses = [self.class_name(each) if each >= 0 else "?" for each in found.predicted.tolist()]
        indices = [] if self._points is None else [str(index) for index in self._points.indices]
        columns = {"predicted": guesses, "index": indices}
        record = Embedding(
            tag=self.group_tag("embedding", layer),
            step=step,
            points=found.rows.numpy(),
            labels=names,
            columns=columns,
            sprites=self._sprites,
        )
        self.write(trainer, [record])

    def _thumbnails(self, images: Tensor | None) -> NDArray[np.uint8] | None:
        return None if images is None else denormalise(images.numpy(), self.mean, self.std)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The film strips, the last places of the points, and the points themselves if they are of a stream."""
        streamed = None if self._stream is None else self._stream.state_dict()
        return {**super().state_dict(), "maps": self._maps.state_dict(), "stream": streamed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if "maps" in state_dict:
            self._maps.load_state_dict(state_dict["maps"])
        if state_dict.get("stream") is not None:
            self._stream = StreamedSamples(self.max_points)
            self._stream.load_state_dict(state_dict["stream"])


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers."""
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def _perplexities(value: Any) -> list[float]:
    """As a list, checked, each once."""
    given = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    right = all(isinstance(each, int | float) and not isinstance(each, bool) for each in given)
    if not given or not right or not all(1 <= each < math.inf for each in given):
        raise expected("perplexity", "a number of at least 1, or a list of them", value)
    return list(dict.fromkeys(float(each) for each in given))
