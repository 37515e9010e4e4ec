"""On a GPU with deterministic algorithms: bit for bit the same, also in fp16 with a gradient scaler; nothing waits."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from lightning_interp import ActivationSparsity, DeadFilters, TrainingDynamics
from tests.contract.battery import Recipe, differences, run
from tests.contract.factories import WHOLE, influence
from tests.contract.nets import CLASSES, Capture, Net, loader, pl, quiet_trainer, seed_all
from tests.contract.recipes import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Influence can't follow the loss"),  # where a step calls the head twice
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
WAYS = ("sgd", "accumulation", "two_optimizers", "channels_last", "checkpointed", "stochastic_depth", "augmented")


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """An operation that isn't deterministic raises, in the user's code and in ours."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def on_gpu(recipe, **trainer):
    """The same way to train, on the first GPU."""
    return replace(recipe, trainer={**recipe.trainer, "accelerator": "gpu", "devices": 1, **trainer})


def assert_same(recipe):
    """Without callbacks, twice; with all as often as can be; with the one line."""
    expected = run(recipe, [])
    assert differences(expected, run(recipe, [])) == [], "the run itself is not deterministic"
    for make in (WHOLE["often"], WHOLE["Interp"]):
        assert differences(expected, run(recipe, make())) == []
    return expected


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WAYS)
def test_callbacks_leave_a_run_on_a_gpu_bit_identical(name, precision):
    """Weights, optimizers, scaler, generators of both devices, and all else that the battery compares."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    expected = assert_same(on_gpu(recipe, precision=precision))
    assert (expected["scaler"] is not None) is (precision == "16-mixed")


def test_callbacks_leave_steps_that_the_scaler_skips_bit_identical():
    """Losses that overflow in fp16: the scaler backs off, and the step does not happen."""

    class Overflowing(Net):
        def loss(self, batch):
            return 1e4 * super().loss(batch)

    expected = assert_same(on_gpu(Recipe("overflowing", Overflowing), precision="16-mixed"))
    assert expected["scaler"]["scale"] < 65536.0


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_callbacks_leave_a_residual_network_on_a_gpu_bit_identical(precision):
    """Torchvision's, on small images."""
    data = {"shape": (3, 32, 32), "samples": 8, "batch": 4}
    recipe = Recipe("resnet18", lambda: Net(models.resnet18(num_classes=CLASSES)), data=data)
    assert_same(on_gpu(recipe, precision=precision, max_epochs=1))


# ---------------------------------------------------------------------- nothing waits


class Unhurried(pl.LightningModule):
    """A step that never waits for the device."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3), nn.ReLU(),
            nn.Dropout(0.2), nn.Flatten(), nn.Linear(216, 8), nn.ReLU(), nn.Linear(8, CLASSES),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class NoWaiting(pl.Callback):
    """First in the list: from before our first hook of a batch to before our last one, waiting is an error."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")
        self.batches += 1


class Waits(pl.Callback):
    """Looks at the loss."""

    def on_before_backward(self, trainer, pl_module, loss):
        loss.item()


def watched(*callbacks):
    """How many batches went by without waiting."""
    seed_all(1)
    guard = NoWaiting()
    options = {"accelerator": "gpu", "logger": Capture(), "limit_val_batches": 0}
    try:
        quiet_trainer(callbacks=[guard, *callbacks], **options).fit(Unhurried(), loader())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return guard.batches


CALLBACKS = {
    "nothing": list,
    "DeadFilters": lambda: [DeadFilters(split="train", window_steps=3, on_error="raise")],
    "ActivationSparsity": lambda: [ActivationSparsity(every_n_train_steps=1, on_error="raise")],
    "TrainingDynamics": lambda: [TrainingDynamics(dense_steps=1000, on_error="raise")],
    "Influence": lambda: [influence()],
    **WHOLE,
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_host_never_waits_for_the_device_within_a_step(name):
    """What was read in the hooks is fetched after the batch, when it is due."""
    assert watched(*CALLBACKS[name]()) == 8


def test_waiting_would_be_noticed():
    """A negative control."""
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched(Waits())
