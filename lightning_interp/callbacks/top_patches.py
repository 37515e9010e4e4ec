"""`TopPatches`: the pieces of validation images that excite each filter most, and what in them does it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_interp._options import check_bool, check_numbers, check_positive_int, select
from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._excited import Excited, firing, images_of, index_of, turnover_of
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._patch_pictures import BLANK, LayerPictures, Shown
from lightning_interp.callbacks.base import InterpCallback, OnError
from lightning_interp.callbacks.batches import call_with_images
from lightning_interp.callbacks.fallback import hidden_by_now
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.observer import Observer
from lightning_interp.callbacks.samples import read_samples
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.patches import PatchRanking
from lightning_interp.functional.tracing import ActivationTracer, Unit
from lightning_interp.render.gallery import column, frame_side, timeline
from lightning_interp.render.patches import excitement_sheet
from lightning_interp.render.strip import FilmStrip

_SAMPLES, _BATCH = 512, 64
_WATCHED = "the forward of the validation images"
_FRAMES = 10


@dataclass
class _Run:
    """What one run through the validation set has found.

    Attributes:
        excited: The strongest images so far.
        observer: Which hands over activations while a batch runs.
    """

    excited: Excited
    observer: Observer | None = None


log = logging.getLogger("lightning_interp")


class TopPatches(InterpCallback):
    """Shows what excites filters: the k strongest validation images of each, cut to what the filter can see.

    The activations are read while the validation loop runs: no image is passed through the network twice, but the few
    that are shown. One candidate an image; what a filter's activation is stands in `functional/tracing.py`. Logged at
    the end of due validation runs and first after the first one:

    | tag | what |
    |---|---|
    | `interp.top_patches/<NN>_<layer>` | a block a filter: its patches, beside them their guided backpropagation |
    | `interp.top_patches_strip/<NN>_<layer>` | a row a filter: its strongest patch, ten moments from left to right |
    | `interp.top_patches_turnover/<NN>_<layer>` | share of the images that are new since the last time, in [0, 1] |

    Below each block stand the number of the filter and its strongest activation. A filter that nothing excites has no
    patches. Patches are as large as the exact receptive field, dark where it reaches beyond the image; where it is the
    whole image, that is shown.

    Images are known by their number in the validation set, and read again from a copy of it; where they have none (an
    iterable set, shuffling, a sampler of one's own) those that are among the best are kept as they were delivered. With
    a compiled model, or without validation, the first 512 images of the set are passed through it eagerly instead.
    Only the first validation loader is looked at.

    Cost: a maximum over each activation; each time one forward and backward of the shown images as far as the layer.
    Source: Zeiler and Fergus 2013, figure 2; Girshick et al. 2013, section 3.1; Springenberg et al. 2014, section 3.4.
    """

    provides: ClassVar[tuple[str, ...]] = ("top_patches", "top_patches_strip", "top_patches_turnover", "cost")
    measures: ClassVar[tuple[str, ...]] = ("top_patches_turnover",)
    can_be_spared: ClassVar[bool] = True
    works_alone: ClassVar[bool] = True

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        k: int = 4,
        filters_per_layer: int = 8,
        maximize: bool = False,
        steps: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        every_n_epochs: int | None = None,
        layers: Sequence[str] | None = None,
        max_layers: int = 8,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            k: Images per filter.
            filters_per_layer: Filters that are shown, the first ones.
            maximize: Whether to make an image for each filter too, by maximising its mean activation.
            steps: Steps of that.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            every_n_epochs: Due in the validation of every n-th epoch; the first one always is. Every epoch by default.
            layers: Names or globs of the layers to show; None takes all that have filters.
            max_layers: Most layers that are shown, spread over the depth.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        super().__init__(
            every_n_epochs=every_n_epochs, layers=layers, max_layers=max_layers, name=name, on_error=on_error
        )
        check_positive_int("k", k)
        check_positive_int("filters_per_layer", filters_per_layer)
        check_bool("maximize", maximize)
        check_positive_int("steps", steps)
        self.k = k
        self.filters_per_layer = filters_per_layer
        self.maximize = maximize
        self.steps = steps
        self.mean = check_numbers("mean", mean)
        self.std = check_numbers("std", std, positive=True)
        self._forget()

    def _forget(self) -> None:
        self._top: dict[str, list[list[int]]] = {}
        self._strips: dict[str, FilmStrip] = {}
        self._run: _Run | None = None
        self._eager_images: Tensor | None = None
        self._by_loop = False
        self._agreed_to_rest = False
        self._pictures = LayerPictures(self.k, self.mean, self.std, self.steps if self.maximize else 0)

    # ------------------------------------------------------------------ what a user reads

    @property
    def top(self) -> dict[str, list[list[int]]]:
        """Layer to the numbers of the strongest images of each shown filter, as they were last measured."""
        return {layer: [list(images) for images in filters] for layer, filters in self._top.items()}

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session and checks the names of the layers."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _ranks.refuse_sharded(trainer, self, "runs forwards of its own")
            self._forget()
            select("layers", self.layers, [name for name, _ in pl_module.named_modules() if name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out where the images come from."""
        if self.quiet or not trainer.loggers:
            return
        has_validation = trainer.enable_validation and any(number > 0 for number in trainer.num_val_batches)
        compiled = Session.of(trainer).observer.compiled
        self._by_loop = has_validation and not compiled
        if self._by_loop:
            if trainer.world_size > 1 and index_of(trainer) is None:
                self.say_once(
                    "TopPatches can't tell which images each rank validates on, so it shows those of rank zero only."
                )
        elif trainer.is_global_zero:
            self._eager_images = read_samples(trainer, pl_module, _SAMPLES).images
            what = f"TopPatches looks at the first {len(self._eager_images)} images of the set, in an eager pass."
            if compiled:
                self.say_once(f"The model is compiled: {what}")
            else:
                log.info(f"There is no validation: {what}")

    def scheduled(self, hook: str, trainer: Trainer) -> bool:
        """A validation run too."""
        due = hook == "on_validation_start" and self.schedule.epoch_due(trainer.current_epoch)
        return due or super().scheduled(hook, trainer)

    def shows_in(self, hook: str) -> bool:
        """Either at validation or in a pass of its own."""
        return hook == ("on_validation_start" if self._by_loop else "on_train_epoch_end")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a run that is due."""
        self._run = None
        if self._by_loop and self.scheduled("on_validation_start", trainer) and not self.spared:
            self._run = _Run(Excited(self.k, self.filters_per_layer, index_of(trainer)))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the reader."""
        if self._run is None or dataloader_idx:
            return
        self._run.excited.begin_batch(len(images_of(pl_module, batch)))
        observer = Session.of(trainer).observer
        self._run.observer = observer
        chosen = self._chosen(trainer, observer.units) or None
        observer.open(self._run.excited.read, chosen, count=self.count_seconds)

    def on_validation_batch_end(  # noqa: PLR0913, PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the reader off, and keeps what can't be read again."""
        if self._run is None or self._run.observer is None:
            return
        observer, self._run.observer = self._run.observer, None
        observer.close_reader(self._run.excited.read)
        images = images_of(pl_module, batch) if index_of(trainer) is None else None
        self._run.excited.end_batch(images, self._chosen(trainer, observer.units))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduces over ranks, and shows."""
        if self._run is None:
            return
        self.wait_for_training(trainer)
        run, self._run = self._run, None
        units = Session.of(trainer).observer.units
        names, error, packed = self._chosen(trainer, units), None, torch.empty(0)
        hidden, what = set[str](), ""
        try:
            hidden, what = self._hidden(trainer, pl_module, run.excited)
            packed = run.excited.pack(names, {name: units[name].num_filters for name in names})
        except Exception as problem:  # raised again once the ranks know
            error = problem
        if index_of(trainer) is None:
            if error is not None:
                raise error
            rankings = run.excited.rankings()
        else:
            self._met = True  # who fails from here on tells nobody: the others don't wait any more
            if not _ranks.agree(trainer, ready=error is None, size=packed.numel()):
                self._agreed_to_rest = True
                raise error or RuntimeError("another rank failed, or saw other layers than this one")
            # On all ranks or on none: who stays in the loop would wait there for the others.
            if bool(_ranks.highest(trainer, torch.tensor([float(bool(hidden))]))):
                self._leave_the_loop(trainer, pl_module, what)
                return
            rankings = run.excited.unpack(packed, names, {name: units[name].num_filters for name in names}, trainer)
        if hidden:
            self._leave_the_loop(trainer, pl_module, what)
            return
        if trainer.is_global_zero and self.may_call(trainer):
            self._show(trainer, pl_module, rankings, run.excited, step=self.step_of(trainer))
        self.log_cost(trainer, step=self.step_of(trainer))

    def _hidden(self, trainer: Trainer, pl_module: LightningModule, excited: Excited) -> tuple[set[str], str]:
        """Layers that the loop calls in a compiled function, and a sentence on them."""
        observer = Session.of(trainer).observer
        seen = observer.units and all(unit in excited.grids for unit in self._chosen(trainer, observer.units))
        if not excited.count or seen:
            return set(), ""
        return hidden_by_now(trainer, pl_module, training=False)

    def _leave_the_loop(self, trainer: Trainer, pl_module: LightningModule, what: str) -> None:
        """From now on an eager pass is made instead."""
        self._by_loop = False
        if trainer.is_global_zero:
            self._eager_images = read_samples(trainer, pl_module, _SAMPLES).images
            self.say_once(
                f"TopPatches {what or 'misses layers on another rank'}: it looks at the first "
                f"{len(self._eager_images)} images of the set, in an eager pass."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the loop can't be watched: a pass over fixed images."""
        due = self.scheduled("on_train_epoch_end", trainer) and not self.spared
        if self._eager_images is None or not due or not self.may_call(trainer):
            return
        self.wait_for_training(trainer)
        step = max(self.step_of(trainer) - 1, 0)
        excited, units = Excited(self.k, self.filters_per_layer, None), Session.of(trainer).observer.units
        with undisturbed(pl_module, training=False):
            for images in torch.split(self._eager_images, _BATCH):
                excited.begin_batch(len(images))
                with ActivationTracer(pl_module, excited.read, units=units) as tracer:
                    output = call_with_images(pl_module, images)
                del output
                if tracer.error is not None:
                    raise tracer.error
                excited.end_batch(images, self._chosen(trainer, units))
        self._show(trainer, pl_module, excited.rankings(), excited, step=step)
        self.log_cost(trainer, step=step)

    def release(self) -> None:
        """Takes the reader off."""
        if self._run is not None and self._run.observer is not None:
            self._run.observer.discard(self._run.excited.read)
            self._run.observer = None

    def while_resting(self, hook: str, trainer: Trainer) -> None:
        """Tells the other ranks, where they would wait for this one, that it has failed."""
        waits = hook == "on_validation_epoch_end" and self._by_loop and not self.spared
        waits = waits and self.schedule.epoch_due(trainer.current_epoch)
        if waits and trainer.world_size > 1 and not self._agreed_to_rest and index_of(trainer) is not None:
            _ranks.agree(trainer, ready=False, size=0)
            self._agreed_to_rest = True

    def _chosen(self, trainer: Trainer, units: dict[str, Unit]) -> list[str]:
        """The layers that are shown; none as long as none are known."""
        names = [name for name, unit in units.items() if unit.counts]
        patterns = ["*"] if self.layers is None else self.layers
        return self.shown_layers(trainer, [n for n in names if any(fnmatchcase(n, p) for p in patterns)])

    # ------------------------------------------------------------------ output

    def _show(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        rankings: dict[str, PatchRanking],
        excited: Excited,
        *,
        step: int,
    ) -> None:
        """Pictures and turnover of all layers, on rank zero."""
        session = Session.of(trainer)
        turnover: dict[str, float] = {}
        chosen = self._chosen(trainer, session.observer.units)
        if not chosen:
            self.say_once(f"TopPatches has nothing to show: none of the layers has filters that {_WATCHED} reached.")
        for layer in chosen:
            if layer not in rankings or layer not in excited.grids:
                continue
            ranking = firing(rankings[layer], session.observer.units[layer])
            top = [[i for i in row if i >= 0] for row in ranking.indices.tolist()]
            if layer in self._top and (share := turnover_of(self._top[layer], top)) is not None:
                turnover[layer] = share
            self._top[layer] = top
            numbers = sorted({index for row in top for index in row})
            images = self._fetch(trainer, pl_module, numbers, excited)
            shown = Shown(layer, ranking, images, excited.grids[layer])
            blocks = self._pictures.draw(pl_module, shown, self.say_once)
            self.log_pictures(trainer, "top_patches", {layer: excitement_sheet(blocks, self.k)}, step=step)
            first = [block.patches[0] if block.patches else BLANK for block in blocks]
            names = [f"f{index}" for index in range(len(blocks))]
            side = min(frame_side(names, _FRAMES), 40)
            strip = self._strips.setdefault(layer, FilmStrip(_FRAMES))
            strip.push(step, column(first, side))
            film = timeline(strip.frames(), names, side)
            self.log_pictures(trainer, "top_patches_strip", {layer: film}, step=step)
        self.log_layers(trainer, "top_patches_turnover", turnover, step=step)

    def _fetch(
        self, trainer: Trainer, pl_module: LightningModule, numbers: list[int], excited: Excited
    ) -> dict[int, Tensor]:
        """The images by number, on the model's device."""
        if not numbers:
            return {}
        if excited.images:
            return {number: excited.images[number].to(pl_module.device) for number in numbers}
        images = read_samples(trainer, pl_module, len(numbers), numbers).images
        return dict(zip(numbers, images, strict=True))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The film strips, and which images were the strongest."""
        return {"strips": {layer: strip.state_dict() for layer, strip in self._strips.items()}, "top": self.top}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._top = state_dict["top"]
        for layer, state in state_dict["strips"].items():
            self._strips.setdefault(layer, FilmStrip(_FRAMES)).load_state_dict(state)
