"""The loss of each training sample, averaged over the run: read off the training step's own forward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_interp.callbacks import _ranks
from lightning_interp.callbacks._sample_order import SampleOrder
from lightning_interp.callbacks._sample_sums import MOST_CLASSES, Merged, SampleScores, Since
from lightning_interp.callbacks.batches import UnreadableError, read_batch
from lightning_interp.callbacks.guard import generators_kept
from lightning_interp.functional.hooks import QuietHook, anything_compiled, in_backward, is_compiled

MOST_SAMPLES = 20_000_000
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class SampleLosses:
    """Running means per training sample, in the order of the data set; no forward, no reading of the data.

    A hook is on the head from the start of each training batch until its backward, and keeps the scores. At the end of
    the batch they are added up on the device, which is never waited for. Left out: labels that are no class (such as
    -100), and losses or margins that are not finite.

    Sums are kept as float32 on the device between two calls of `unpack`, which adds them, over all ranks, to float64
    sums on the CPU. If a sample comes with another label after that than before, it starts anew (somebody has corrected
    the data); if many do, index and sample are not what belongs together, and `reason` says so. In the checkpoint:
    28 bytes a sample, and as much again for what was added since the last `unpack`.

    What a step does to its images or labels (mixup) is not known here: the loss is that of the label in the batch.

    Attributes:
        size: Samples in the data set; 0 before `open`.
    """

    def __init__(self) -> None:
        self.size = 0
        self._reason: str | None = None
        self._silent = False  # a step did not call the head
        self._name = ""  # of the head
        self._head: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._hook: QuietHook | None = None
        self._mode = False
        self._labels: Tensor | None = None
        self._indices: Tensor | None = None
        self._scores: list[Any] = []
        self._batches = 0
        self._merged = Merged.empty(0)
        self._since: Since | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, even one made during a batch, is on no model."""
        gone = dict.fromkeys(("_head", "_hook", "_handle", "_labels", "_indices"))
        return {**vars(self), **gone, "_scores": []}

    @property
    def reason(self) -> str | None:
        """Why (some) batches were left out and what to do, in one sentence; None if all that called the head count."""
        heard = self._since is not None or bool(self._merged.counts.any())
        if self._reason is None and self._silent and not heard:
            return (
                "no training step called the head as a module; call it, not its weights, in `training_step`, and not "
                "in a compiled function"
            )
        return self._reason

    # ------------------------------------------------------------------ the fit

    def open(self, trainer: Any, model: nn.Module, head: str, order: SampleOrder) -> None:
        """Begins or, after `load_state_dict`, goes on. To be called in `on_train_start`.

        Args:
            trainer: The running trainer.
            model: The LightningModule.
            head: Name of the module whose output is the scores (N, C), as in `named_modules()`.
            order: Installed since `setup`.
        """
        self.close()
        size = order.size or 0
        if size != self.size:  # nothing was loaded, or for another data set
            self.size, self._since = size, None
            self._merged = Merged.empty(size if size <= MOST_SAMPLES else 0)
        if not trainer.is_global_zero:
            self._since = None  # the checkpoint holds what rank zero had seen; counted on one rank, it counts once
        if not size:
            self._say(order.reason or "the training data set is empty")
        elif size > MOST_SAMPLES:
            self._say(f"the training data set has {size} samples; at most {MOST_SAMPLES} are followed")
            self.size = 0
        elif _compiled(model, head):
            self._say(f"the head {head!r} is compiled, where no hook is called; leave the last layer out of it")
        else:
            self._name, self._head = head, model.get_submodule(head)
            self._hook = QuietHook(self._keep)  # one for the fit: each new one would make compiled functions anew

    def close(self) -> None:
        """Takes everything off the model. May be called at any time, more than once; what was collected stays."""
        self.stop_listening()
        self._head = self._hook = self._labels = self._indices = None
        self._scores = []

    # ------------------------------------------------------------------ one batch

    def begin_batch(self, model: nn.Module, batch: Any, order: SampleOrder) -> None:
        """Listens to the forward that comes. To be called in `on_train_batch_start`."""
        self.stop_listening()
        self._labels, self._scores = None, []
        self._batches += 1
        if self._head is None or self._hook is None:
            return
        if not self._found_again(model):
            self._say(f"the head {self._name!r} is gone")
            return
        labels = self._given(model, batch)
        self._indices = None if labels is None else order.indices(len(labels))
        if labels is None or self._indices is None:
            self._say(order.reason)
            return
        self._labels = labels.detach().clone()  # the step may write into its batch
        self._mode = self._head.training
        self._handle = self._head.register_forward_hook(self._hook)

    def _found_again(self, model: nn.Module) -> bool:
        """Whether the head is still there; the user may have replaced it."""
        try:
            self._head = model.get_submodule(self._name)
        except AttributeError:
            return False
        return True

    def stop_listening(self) -> None:
        """Takes the hook off. To be called in `on_before_backward`: what comes later is a repetition."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def end_batch(self) -> None:
        """Adds the batch. To be called in `on_train_batch_end`."""
        self.stop_listening()
        scores, self._scores = self._scores, []
        labels, self._labels = self._labels, None
        if labels is None or self._indices is None or not self._fits(scores, labels):
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            (table,) = scores
            if self._since is None:
                self._since = Since.empty(self.size, table.device)
            self._since = self._since.to(table.device)
            at, given = (tensor.to(table.device, non_blocking=True) for tensor in (self._indices, labels))
            self._since.add(at, given, table, self._batches)

    def _given(self, model: nn.Module, batch: Any) -> Tensor | None:
        """The labels of a batch; None, with a reason, if they are not one class a sample."""
        try:
            # A reader of the user's may draw.
            with generators_kept() if hasattr(model, "interp_batch") else contextlib.nullcontext():
                labels = read_batch(model, batch)[1]
        except UnreadableError as error:
            self._say(str(error))
            return None
        if labels is None:
            self._say("the batches hold no labels; give the LightningModule a method `interp_batch(batch)`")
        elif not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in _INTEGERS:
            found = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
            self._say(f"the labels are {found}; one integer a sample, of shape (N,), is needed")
            return None
        return labels

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keeps a copy, since what follows may write into the scores; unseen by whatever follows the forward."""
        # In another mode it is a forward of somebody else's: of a callback, over images of its own.
        if torch.compiler.is_compiling() or in_backward() or module.training is not self._mode:
            return
        plain = isinstance(output, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(output)
        with torch._C.DisableTorchFunction():
            self._scores.append(output.detach().clone() if plain and len(self._scores) < 1 else None)

    def _fits(self, scores: list[Any], labels: Tensor) -> bool:
        """Whether there is one table of scores for these labels; says why not."""
        if not scores:
            self._silent = True  # it may have been skipped
            if anything_compiled() and self._since is None and not self._merged.counts.any():
                self._head = None  # a compiled function calls it: each new hook would have it compiled anew
        elif len(scores) > 1:
            self._say("a training step called the head more than once; which scores belong to the labels is not known")
        elif scores[0] is None or scores[0].ndim != 2 or scores[0].shape[1] < 2 or len(scores[0]) != len(labels):
            found = "no plain tensor" if scores[0] is None else tuple(scores[0].shape)
            self._say(
                f"the head gave {found}, and scores ({len(labels)}, classes) are needed, with two classes or more"
            )
        elif scores[0].shape[1] > MOST_CLASSES:
            self._say(f"the head gives {scores[0].shape[1]} classes; at most {MOST_CLASSES} are followed")
        else:
            return True
        return False

    def _say(self, reason: str | None) -> None:
        self._reason = self._reason or reason

    # ------------------------------------------------------------------ results

    def pack(self) -> Tensor:
        """What was added since the last `unpack`, as float64 on the CPU; waits for the device. Length 5 n + 2."""
        since = self._since or Since.empty(self.size, torch.device("cpu"))
        parts = (since.losses, since.margins, since.counts, since.drift, since.beaten, since.labels)
        return torch.cat([part.cpu().double() for part in parts])

    def unpack(self, packed: Tensor, trainer: Any) -> None:
        """Adds what all ranks have packed. Collective, twice; after `agree` only."""
        split = 3 * self.size + 2
        sums, latest = _ranks.total(trainer, packed[:split]), _ranks.highest(trainer, packed[split:])
        losses, margins, counts = sums[:-2].view(3, self.size)
        beaten, labels = latest.long().view(2, self.size)
        since = Since(losses, margins, counts.long(), labels, beaten, sums[-2:].long())
        self._since = None
        if self._merged.add(since):
            self._say(
                "samples came back under the same index with other labels; use a collate_fn that keeps the order of "
                "the samples, and labels that are not drawn at random"
            )

    def means(self) -> SampleScores:
        """The scores as of the last `unpack`, the same on all ranks."""
        return self._merged.scores()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Sums as of the last `unpack`, and what this rank has added since."""
        since = None if self._since is None else self._since.state()
        return {"size": self.size, "batches": self._batches, "merged": self._merged.state(), "since": since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; before `open`, which drops what was added since on all ranks but zero."""
        self.size, self._batches = state["size"], state["batches"]
        self._merged = Merged.of(state["merged"])
        self._since = (
            None if state["since"] is None else Since(**{name: part.clone() for name, part in state["since"].items()})
        )


def _compiled(model: nn.Module, head: str) -> bool:
    """Whether the head, or a module around it, is compiled."""
    names = head.split(".") if head else []
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    return any(is_compiled(module) for module in around)
