"""`Influence`: which training images a prediction hangs on, and which of them look mislabelled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_interp._options import check_number, check_positive_int, expected, select
from lightning_interp.callbacks._embedded import Embedded, embed_points, find_place
from lightning_interp.callbacks._influence_output import InfluenceOutput
from lightning_interp.callbacks._influential import Influential, usable, why_unusable
from lightning_interp.callbacks._label_watch import LabelWatch, no_classes
from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks._periodic import PeriodicCallback
from lightning_interp.callbacks._points import Points, choose_points
from lightning_interp.callbacks._suspect_files import MOST_ROWS
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.batches import NoClassesError, UnreadableError
from lightning_interp.callbacks.guard import undisturbed
from lightning_interp.callbacks.samples import check_samples, first_indexable
from lightning_interp.functional.embeddings import EmbeddingPlace

DEFAULT_EPOCHS = 5


class Influence(PeriodicCallback):
    """Shows which training images a prediction hangs on, and which training images look mislabelled.

    Two questions, answered every five epochs and at the end:

    *Which training images is this prediction owed to?* A softmax head is fitted to its optimum on the embeddings of
    `num_train` training images; influence functions tell how the loss of a test image would change if one of them were
    left out. For those that are shown the change is computed as well, by Newton steps without the image.

    *Which labels look wrong?* The loss of each training sample, averaged over all epochs (collected in the
    loop, from the forward that is made anyway), and the votes of its neighbours in the embedding.

    | tag | what |
    |---|---|
    | `interp.influence/images` | for each test image the training images that help and harm it most |
    | `interp.influence/perturbation` | where changing a training image would raise the loss of a test image |
    | `interp.influence/table` | the same in numbers |
    | `interp.suspect_labels/images`, `interp.suspect_labels/table` | training images whose label looks wrong, ranked |
    | `suspect_labels.csv` in the log folder | the same list: index in the training set, given and suggested label |
    | `interp/suspect_label_share` | estimated share of wrong labels |
    | `interp/label_recognition` | how well neighbours know the labels, 0 (chance) to 1; below 0.5 trust no share |
    | `interp/influence_gradient_norm` | norm of the gradient at the optimum: below 1e-8 where it was reached |
    | `interp/influence_agreement` | share of the training images to which head and network give the same class |

    What it means: influence functions are the exact derivative of the optimum of the *head*, at fixed embeddings. They
    are not the exact effect of leaving an image out (they understate it: that is why the actual one stands beside), and
    say nothing of what the image did to the layers below. With a small `weight_decay` the head hangs on single images:
    effects are larger and predictions rougher. If `interp/influence_agreement` is low, the head is not the network.

    A head of more than 2,500 weights would make the training wait for minutes. It is fitted on so many principal axes
    of the embedding as keep within that; where these would be fewer than 32 (more than 75 classes), on 32 axes and the
    75 classes nearest to the test images. The table says so, and a warning where it makes the result rougher. On real
    digits, 512 features: of 10 classes the three strongest images were the same, their effects within 1 %; of 100
    classes five in six were the same.

    Training samples are known by their index in the data set of the training loader. Where their losses can't be
    followed (a compiled head, several forwards, one score for two classes, ...), it is said once, and the list of
    suspects covers the `num_train` points only. A stream has no indices: it is refused, with a message. So are labels
    that are not one class an image.

    Cost: with 2,000 points, on one core, processor time: 0.4 s each time for a small CNN with 64 features; ResNet-18
    at 32 x 32 pixels 4 s with 10 classes and 6 s with 100, of which 2 s are its forwards. The head takes time in
    proportion to `num_train`, the neighbours to its square. Points of up to 128 MB are read once, more each
    time. Between the events a cross-entropy a batch, never waiting for the device. Under DDP each rank embeds its
    share, and waits while the first one fits and draws.

    Source: Koh and Liang 2017, equations 2 and 5; running losses: Pleiss et al. 2020, section 2; neighbours: as in
    Liu and Tao 2016, section 5.
    """

    provides: ClassVar[tuple[str, ...]] = (
        "influence",
        "influence_gradient_norm",
        "influence_agreement",
        "suspect_labels",
        "suspect_label_share",
        "label_recognition",
        "cost",
    )
    measures: ClassVar[tuple[str, ...]] = ("suspect_label_share", "label_recognition", "label_anchors", "train_samples")

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        num_test: int = 4,
        num_train: int = 2000,
        top_k: int = 3,
        weight_decay: float = 1e-2,
        neighbors: int = 20,
        layer: str | None = None,
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
            num_test: Test images, where `samples` is None. The first eight are in the pictures, all in the table.
            num_train: Most training images that the head is fitted on, spread evenly over the training set.
            top_k: Helpful, and harmful, training images for each test image; at most eight in the pictures. What is in
                no picture has no actual change.
            weight_decay: Of the head: its loss is the mean cross-entropy + weight_decay / 2 * |W|^2.
            neighbors: In the embedding, whose labels are compared.
            layer: Name of the layer whose output is the embedding; None takes what goes into the last Linear layer.
            samples: The test images: indices into the validation set, the path of a `.pt` file, or (images, labels);
                None takes the first ones of the validation set, else of the training set.
            mean: Per channel, to show normalised images in true colours.
            std: Per channel, likewise.
            classes: Names of the classes.
            every_n_epochs: Due at the end of every n-th epoch; the first one always is. Every fifth by default.
            every_n_train_steps: Due every n training steps instead.
            name: Tells two instances apart, in the tags, the file and the checkpoint.
            on_error: `"warn"` reports an error once and rests; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong.
        """
        if every_n_epochs is None and every_n_train_steps is None:
            every_n_epochs = DEFAULT_EPOCHS
        check_positive_int("neighbors", neighbors)
        self.neighbors = neighbors
        self._watch = LabelWatch(neighbors)
        super().__init__(
            mean=mean,
            std=std,
            classes=classes,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            name=name,
            on_error=on_error,
        )
        for argument, value in (("num_test", num_test), ("num_train", num_train), ("top_k", top_k)):
            check_positive_int(argument, value)
        check_number("weight_decay", weight_decay, low=1e-8, high=1e8)
        check_samples("samples", samples)
        if layer is not None and (not isinstance(layer, str) or not layer):
            raise expected("layer", "the name of a layer or None", layer)
        self.num_test = num_test
        self.num_train = num_train
        self.top_k = top_k
        self.weight_decay = weight_decay
        self.layer = layer
        self.samples = samples

    def _forget(self) -> None:
        super()._forget()
        self.release()
        self._watch = LabelWatch(self.neighbors)
        self._train: Points | None = None
        self._test: Points | None = None
        self._place: EmbeddingPlace | None = None

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the session; listens to the order in which the training samples are asked for."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self.layer is not None:
                select("layer", [self.layer], [name for name, _ in pl_module.named_modules() if name])
            self._watch.order.install(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the images, and begins."""
        if first_indexable(trainer.train_dataloader) is None:
            raise UnreadableError(
                "Influence needs training images that can be read by index (a data set with `__getitem__` and "
                "`__len__`), since those of a stream can't be told apart. Use a map-style data set."
            )
        self._train = choose_points(trainer, self.num_train, split="train")
        self._test = choose_points(trainer, self.num_test, self.samples, first=True)
        with undisturbed(pl_module):
            wrong = no_classes(next(self._train.read(trainer, pl_module, range(len(self._train)))).labels)
            if wrong is not None:
                raise NoClassesError(wrong)
        self._begin(trainer, pl_module, self._train)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, train: Points) -> None:
        """Finds the embedding and begins to collect losses, as soon as the model may be called."""
        if not self.may_call(trainer):
            return
        with undisturbed(pl_module):
            self._place = find_place(pl_module, train, trainer, self.layer)
            head = self._place if self.layer is None else self._head_place(trainer, pl_module, train)
        if head is not None and head.gives_scores:
            self._watch.losses.open(trainer, pl_module, head.layer, self._watch.order)

    @staticmethod
    def _head_place(trainer: Trainer, pl_module: LightningModule, points: Points) -> EmbeddingPlace | None:
        with contextlib.suppress(UnreadableError):
            return find_place(pl_module, points, trainer, None)
        return None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listens to the scores of the batch."""
        self._watch.losses.begin_batch(pl_module, batch, self._watch.order)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Has heard them: what comes later is a repetition."""
        self._watch.losses.stop_listening()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the losses of the batch; measures after a due step."""
        self._watch.losses.end_batch()
        if self._place is None and self._train is not None:
            self._begin(trainer, pl_module, self._train)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def due(self, hook: str, trainer: Trainer) -> int | None:
        """As for all; not before the first step, when nothing has been learned from any image."""
        return None if hook == "on_train_start" else super().due(hook, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures after a due epoch; else puts the losses of all ranks together: a checkpoint is that of rank zero."""
        if trainer.world_size > 1 and self.due("on_train_epoch_end", trainer) is None:
            self._watch.losses.unpack(self.meet(trainer, self._watch.losses.pack), trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def meets(self, hook: str, trainer: Trainer) -> bool:
        """All ranks embed their share, and have seen their share of the samples."""
        known = first_indexable(trainer.train_dataloader) is not None
        return known and (hook == "on_train_epoch_end" or self.due(hook, trainer) is not None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves."""
        self.release()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves."""
        self.release()
        super().on_exception(trainer, pl_module, exception)

    def release(self) -> None:
        """Takes everything off the model and the loader."""
        self._watch.release()

    # ------------------------------------------------------------------ measuring

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Embeds on all ranks; asks and draws on rank zero."""
        if self._train is None or self._test is None or self._place is None:
            return
        losses = self._watch.losses
        losses.unpack(self.meet(trainer, losses.pack, last=False), trainer)
        train = embed_points(self, trainer, pl_module, self._train, self._place, last=self.quiet)
        test = None if self.quiet else embed_points(self, trainer, pl_module, self._test, self._place)
        if not trainer.is_global_zero:
            return
        classes = torch.unique(train.labels[usable(train)])
        if len(classes) < 2:
            alike = f"the training images are all of class {int(classes[0])}" if len(classes) else None
            self.say_once(f"Influence has nothing to show of the training images: {alike or why_unusable(train)}.")
            return
        self._watch.look(train, torch.tensor(self._train.indices), step)
        # Without scores it may be trained on something else than these labels: then no rule is to judge them.
        self._note_labels(trainer, step, judged=bool(train.losses.isfinite().any()))
        if test is not None and trainer.loggers:
            output = InfluenceOutput(self, trainer, pl_module, step)
            if self._watch.limit is not None:
                self.say_once(
                    f"Influence can't follow the loss of each training sample: {self._watch.limit}. Its list of "
                    f"suspects covers {len(self._train)} training images only."
                )
            output.suspects(self._train, self._watch.rank(MOST_ROWS))
            self._ask(output, train, test)

    def _note_labels(self, trainer: Trainer, step: int, *, judged: bool) -> None:
        wrong, history = self._watch.wrong, self.notebook(trainer)
        if wrong is None:
            return
        history.note("train_samples", self._watch.order.size or 0)
        history.note("label_anchors", wrong.anchors)
        for quantity, value in (("suspect_label_share", wrong.share), ("label_recognition", wrong.recognition)):
            if not math.isnan(value):
                self.log_number(trainer, quantity, value, step=step, note=judged)

    def _ask(self, output: InfluenceOutput, train: Embedded, test: Embedded) -> None:
        if self._train is None or self._test is None or self._place is None:
            return
        if not len(usable(test)):
            self.say_once(f"Influence has nothing to show of the test images: {why_unusable(test)}.")
        else:
            found = Influential(train, test, top_k=self.top_k, weight_decay=self.weight_decay)
            sides = output.sides(found, (self._train, train), (self._test, test))
            output.influence(found, *sides, self._place, self.top_k)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What the loop has collected, and the votes so far."""
        return {**super().state_dict(), "watch": self._watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if "watch" in state_dict:
            self._watch.load_state_dict(state_dict["watch"])
