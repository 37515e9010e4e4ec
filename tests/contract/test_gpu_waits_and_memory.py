"""On a GPU: no step waits for the device, and nothing of ours takes memory but what is due."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_interp import DeadFilters, Interp
from tests.contract.hooks import hooks_on
from tests.contract.nets import pl, quiet_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
STEPS, BATCH, SIDE = 140, 256, 32
QUIET = range(122, 137)  # steps between two probes, two samples and two looks, see test_idle_steps.py
# Steps that are probed, and one that is sampled; values are fetched after 9, 19, ... 49 and 99.
FOLLOWED = (*range(2, 9), 50)
LITTLE = 8 * 2**20  # bytes; the output of the first layer alone is four times that


class Cnn(pl.LightningModule):
    """A small network whose steps themselves never wait; hands the losses over as they are.

    Attributes:
        watched: Steps in which a wait is an error, from the start of the user's step to the end of the batch.
    """

    def __init__(self, watched=()):
        super().__init__()
        layers = []
        for before, width in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        self.watched, self.hooks = watched, {}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.hooks[batch_idx] = len(hooks_on(self))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class MustNotWait(pl.Callback):
    """Stands first: from the start of each watched batch to its end, waiting for the device raises an error.

    The end is that of the model itself, which Lightning calls after all callbacks.
    """

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in pl_module.watched:
            torch.cuda.set_sync_debug_mode("error")


class Watched(Cnn):
    """Ends the watch after all callbacks."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


class Waits(pl.Callback):
    """Negative control: looks at the loss of each step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        outputs["loss"].item()


class Repeated(Dataset):
    """So many samples out of 512 images."""

    def __init__(self, count, seed):
        self.count = count
        self.images = torch.randn(512, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.images[index % 512], index % 10


def _loader(batches, seed):
    return DataLoader(Repeated(batches * BATCH, seed), batch_size=BATCH, pin_memory=True)


def _fit(model, *callbacks):
    torch.manual_seed(0)
    trainer = quiet_trainer(callbacks=list(callbacks), max_epochs=1, accelerator="gpu", num_sanity_val_steps=0)
    try:
        trainer.fit(model, _loader(STEPS, 0), _loader(1, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return model


@pytest.mark.parametrize("level", ["light", "standard", "full"])
def test_steps_on_which_nothing_is_due_never_wait(level):
    """All of `Interp`, outside its windows."""
    _fit(Watched(QUIET), MustNotWait(), Interp(level, on_error="raise"))


@pytest.mark.parametrize("level", ["light", "standard", "full"])
def test_steps_that_are_followed_never_wait(level):
    """Inside the windows: while filters are read, steps are probed and activations are sampled."""
    filters = DeadFilters(split="train", window_steps=1000, name="train", on_error="raise")
    model = _fit(Watched(FOLLOWED), MustNotWait(), Interp(level, on_error="raise"), filters)
    assert all(model.hooks[step] for step in FOLLOWED if step != 50 or level != "light")


def test_a_wait_is_found():
    """Negative control."""
    with pytest.raises(RuntimeError, match="synchroniz"):
        _fit(Watched(QUIET), MustNotWait(), Waits())


def test_without_callbacks_no_step_waits():
    """Lightning itself does not wait in these steps, so what is found is ours."""
    _fit(Watched(range(2, STEPS)), MustNotWait())


class Peak(pl.Callback):
    """The most memory that was allocated in the training batches of a range, and what is left after each."""

    def __init__(self, steps):
        self.steps, self.peak, self.left = steps, 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.steps[0]:
            gc.collect()
            torch.cuda.synchronize()
            self.left = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        if batch_idx == self.steps[-1]:
            self.peak = torch.cuda.max_memory_allocated()


def _memory(steps, *callbacks):
    gc.collect()
    torch.cuda.empty_cache()
    peak = Peak(steps)
    _fit(Cnn(), peak, *callbacks)
    return peak


def test_outside_the_windows_the_peak_is_that_of_the_training():
    """Running sums and the samples of `Interp` only."""
    plain, watched = _memory(QUIET), _memory(QUIET, Interp(on_error="raise"))
    assert watched.peak <= plain.peak + LITTLE
    assert watched.left <= plain.left + LITTLE


def test_inside_the_windows_the_peak_is_little_more_than_that_of_the_training():
    """Activations are reduced where they are made, and none is kept: less than all of them, by far.

    A probed step holds the gradient, the weights before it, and a second forward without a graph.
    """
    steps = FOLLOWED[:-1]
    plain, watched = _memory(steps), _memory(steps, Interp("light", on_error="raise"))
    assert watched.peak <= 1.25 * plain.peak


def test_keeping_an_activation_is_found():
    """Negative control: one layer's output in each step."""

    class Keeps(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            self.kept = []
            pl_module.net[2].register_forward_hook(lambda module, args, output: self.kept.append(output.detach()))

    plain, watched = _memory(QUIET), _memory(QUIET, Keeps())
    assert watched.left > plain.left + LITTLE
