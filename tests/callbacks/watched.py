"""Networks that write down their own activations, whole, and a reference that counts over them by brute force."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks.dead_filters import DeadFilters
from lightning_interp.callbacks.session import Session

CHATTER = (
    "does not have many workers",
    "lower value for log_every_n_steps",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "You defined a `validation_step` but have no",
    "resuming from a checkpoint that ended before the epoch ended",
    "Checkpoint directory .* exists and is not empty",
)


@dataclass
class Note:
    """One activation of one forward: (C, values), and whether its non-linearity has an exact zero."""

    layer: str
    values: Tensor
    zero: bool


class Watched(pl.LightningModule):
    """A classifier whose `features` call `note` on every activation that the definition names."""

    def __init__(self, width=4, rate=0.05):
        super().__init__()
        self.fc = nn.Linear(width, 3)
        self.rate = rate
        self.book = []

    def note(self, layer, tensor, *, axis=1, zero=True):
        """Writes an activation down behind the back of whatever listens to torch functions."""
        with torch._C.DisableTorchFunction():
            self.book.append(Note(layer, tensor.detach().clone().movedim(axis, 0).flatten(1), zero))
        return tensor

    def rig(self):
        """Silences filter 0 of every layer until something moves its weights."""
        with torch.no_grad():
            for module in self.modules():
                if module is self.fc or getattr(module, "weight", None) is None:
                    continue
                if module.weight.ndim > 1:
                    filters = module.weight.transpose(0, int(isinstance(module, nn.ConvTranspose2d)))
                    filters[0] = 0
                if module.bias is not None:
                    module.bias[0] = -4.0
        return self

    def features(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.fc(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class Plain(Watched):
    """Two convolutions with ReLU, four filters each; the weights say who fires."""

    def __init__(self, rate=0.05):
        super().__init__(4, rate)
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def features(self, x):
        x = self.note("first", F.relu(self.first(x)))
        return self.note("second", F.relu(self.second(x))).mean((2, 3))


def dead(notes):
    """Layer to the filters without life in these notes: a loop over full tensors, no suspects, no early end."""
    alive = {}
    for note in notes:
        if note.zero:
            lives = (note.values != 0).any(dim=1)
        elif note.values.shape[1] > 1:
            lives = (note.values != note.values[:, :1]).any(dim=1)
        else:
            continue
        alive[note.layer] = alive.get(note.layer, torch.zeros_like(lives)) | lives
    return {layer: (~mask).nonzero().flatten().tolist() for layer, mask in alive.items()}


def scores(notes, layer):
    """Sokar's scores of a layer by the formula, over all values of all notes at once, in float64."""
    values = torch.cat([note.values.double() for note in notes if note.layer == layer], dim=1)
    magnitudes = values.abs().mean(dim=1)
    return magnitudes / magnitudes.mean()


class Reference(pl.Callback):
    """Counts each window over the book of the model; stands behind the callback that it checks.

    In a validation a filter is dead if it also is in a copy of the model whose normalisations go by the batch, where
    they did so in training; what the callback itself does with the model is thrown away.

    Attributes:
        windows: For each window: its kind, its last step, the dead filters by brute force and by the callback, and
            the step under which the callback put them into the history.
    """

    def __init__(self, callback, *, validation, window_steps=500):
        self.callback, self.validation, self.window_steps = callback, validation, window_steps
        self.windows = []
        self.notes = []
        self.validated, self.images, self.modes = [], [], {}
        self.steps = self.in_window = self.global_step = 0

    def _close(self, trainer, kind, notes):
        found = self.callback.dead
        history = Session.of(trainer).history
        noted = {history.get("dead_filters", layer).steps[-1] for layer in found}
        self.windows.append((kind, max(0, self.steps - 1), dead(notes), found, noted))

    def _take(self, module):
        taken, module.book = module.book, []
        return taken

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.book = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.notes += self._take(module)
        self.modes = {name: layer.training for name, layer in module.named_modules()}
        if trainer.global_step == self.global_step:
            return
        self.global_step = trainer.global_step
        self.steps += 1
        self.in_window += 1
        full = not self.validation and self.in_window == self.window_steps
        if self.steps == 1:
            self._close(trainer, "first", self.notes)
        elif full:
            self._close(trainer, "train", self.notes)
        if full or self.validation:
            self.notes, self.in_window = [], 0

    def on_validation_start(self, trainer, module):
        module.book, self.validated, self.images = [], [], []

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):  # noqa: PLR0917
        self.validated += self._take(module)
        if not dataloader_idx:
            self.images.append(batch[0])

    def on_validation_end(self, trainer, module):
        module.book = []
        if self.validation and not trainer.sanity_checking:
            self._close(trainer, "val", self.validated + self._by_the_batch(trainer, module))

    def _by_the_batch(self, trainer, module):
        """What the model writes down of the first validation images, in batches as in training."""
        twin, pictures = copy.deepcopy(module).eval(), torch.cat(self.images)
        for name, layer in twin.named_modules():
            if getattr(layer, "running_mean", None) is not None:
                layer.train(self.modes[name])
        size = trainer.train_dataloader.batch_size
        assert len(pictures) <= 4 * size
        with torch.no_grad():
            for some in pictures.tensor_split(math.ceil(len(pictures) / size)):
                twin(some)
        return twin.book

    def on_train_epoch_end(self, trainer, module):
        if not self.validation and self.in_window:
            self._close(trainer, "train", self.notes)
        self.notes, self.in_window = [], 0


def images(count=7, *, shape=(2, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), generator=generator), torch.arange(count) % 3


def loader(count=7, *, batch_size=3, shape=(2, 8, 8), seed=0):
    """In order, the last batch smaller."""
    return DataLoader(TensorDataset(*images(count, shape=shape, seed=seed)), batch_size=batch_size)


def trainer(*callbacks, epochs=2, **options):
    """Quiet, on the CPU, and nothing of it on the disk."""
    settings = {
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 1,
    }
    return pl.Trainer(**settings | options, callbacks=list(callbacks))


def fit(module, *callbacks, train=None, val=None, ckpt_path=None, **options):
    """Runs a fit; all warnings but Lightning's chatter are errors."""
    with warnings.catch_warnings():
        for message in CHATTER:
            warnings.filterwarnings("ignore", message=f".*{message}")
        runner = trainer(*callbacks, **options)
        runner.fit(module, loader() if train is None else train, val, ckpt_path=ckpt_path)
    return runner


def check(module, *, split="train", window_steps=500, callbacks=(), **options):
    """A fit whose every window must agree with the reference; gives the callback and the windows."""
    watcher = DeadFilters(split=split, window_steps=window_steps, on_error="raise")
    validation = split == "val" or (split == "auto" and options.get("val") is not None)
    reference = Reference(watcher, validation=validation, window_steps=window_steps)
    fit(module, watcher, reference, *callbacks, **options)
    assert reference.windows
    for kind, step, expected, found, noted in reference.windows:
        assert found == expected, (kind, step)
        assert noted == ({step} if found else set()), kind
    return watcher, reference.windows


def schedule(windows):
    """Kind and last step of each window."""
    return [window[:2] for window in windows]
