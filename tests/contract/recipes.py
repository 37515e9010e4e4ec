"""Ways to train that the battery runs through."""

from __future__ import annotations

import random

import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

from tests.contract.battery import Recipe
from tests.contract.nets import CLASSES, Listened, Net, body, pl


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.05, max_iter=3)


class OneCycle(Net):
    """AdamW with a schedule that also cycles the momentum."""

    def configure_optimizers(self):
        optimizer = adamw(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Net):
    """A schedule that reads a metric of the user's."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class TwoOptimizers(Net):
    """Manual optimisation: the head steps on every batch, the rest on every second one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.note("train", batch_idx, labels=batch[1].tolist())
        trunk, head = self.optimizers()
        for optimizer, wanted in ((head, True), (trunk, batch_idx % 2 == 1)):
            if wanted:
                self.toggle_optimizer(optimizer)
                loss = self.loss(batch)
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=0.5)
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)
                self.log("train/loss", loss)

    def configure_optimizers(self):
        head = list(self.net[-1].parameters())
        trunk = [p for p in self.parameters() if all(p is not h for h in head)]
        return [torch.optim.SGD(trunk, lr=0.05, momentum=0.9), adamw(head)]


class Frozen(Net):
    """The first block is frozen and in eval mode while the rest trains; one parameter group joins in mid-training."""

    def configure_optimizers(self):
        self.net[0].requires_grad_(False)
        self.net[1].requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)
        if self.current_epoch == 1:
            self.optimizers().optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 0.01})
        self.net[1].eval()


class InPlace(Net):
    """Edits the batch in place, and returns a dict."""

    def training_step(self, batch, batch_idx):
        batch[0].add_(torch.randn_like(batch[0])).clamp_(min=-1.0)
        return {"loss": super().training_step(batch, batch_idx), "extra": batch[0]}


class Penalty(Net):
    """Forwards in eval mode with input gradients inside the step, then two losses added up."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.eval()
        adversarial = x.clone()
        for _ in range(2):
            adversarial.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(self(adversarial), y), adversarial)
            adversarial = (adversarial + 0.05 * gradient.sign()).detach()
        self.train()
        return super().training_step(batch, batch_idx) + 0.5 * self.loss((adversarial, y))


class Sometimes(Net):
    """Skips every third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


class Checkpointed(nn.Module):
    """Activation checkpointing: the forward is repeated in backward."""

    def __init__(self, *, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x):
        if self.reentrant and not self.training:  # as such code usually does it: it can't do with `autograd.grad`
            return self.head(self.trunk(x).flatten(1))
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.trunk, x, use_reentrant=self.reentrant).flatten(1))


class ChannelsLast(Net):
    """Weights and images with the channels innermost in memory."""

    def __init__(self):
        super().__init__(body())
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.net(x.repeat(1, 2, 1, 1)[:, :1].contiguous(memory_format=torch.channels_last))


class Block(nn.Module):
    """A residual block that a random part of the samples skips, or that is left out altogether."""

    def __init__(self, *, whole):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.whole = whole

    def forward(self, x):
        if self.training and self.whole and torch.rand(()) < 0.5:
            return x
        grown = F.relu(self.conv(x))
        return x + (grown if self.whole else stochastic_depth(grown, 0.5, "row", self.training))


def stochastic():
    """Stochastic depth: by sample as torchvision does it, and by layer, where a layer isn't called at all."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), Block(whole=False), Block(whole=True), nn.Flatten(), nn.Linear(36, 3)
    )


_BESIDE = np.random.default_rng(11)  # a generator that no module holds; recipes begin anew with `Stateful`


class Stateful(nn.Module):
    """Noise from generators of its own, less with each call; keeps books in attributes, and a metric."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.kept = body(), 0, [[], {}]
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)
        self.numpy = {"old": np.random.RandomState(3), "new": np.random.default_rng(4)}
        self.running, self.row = torch.zeros(1), np.zeros(2)
        self.spread = torchmetrics.MeanMetric()
        _BESIDE.bit_generator.state = np.random.default_rng(11).bit_generator.state

    def forward(self, x):
        self.calls += 1
        noise = torch.randn(x.shape, generator=self.torch)
        noise = noise + self.python.random() + self.numpy["old"].rand() + self.numpy["new"].random() + _BESIDE.random()
        x = x + 0.1 * noise / self.calls + 0.01 * (self.running + self.row[0] + len(self.kept[0])).to(x)
        self.running += x.detach().mean().cpu()
        self.row += 0.1
        self.kept[0].append(self.calls)
        self.kept[1][self.calls] = True
        self.last = x.detach()
        self.spread.update(x.detach().std())
        return self.net(x) * (1 + self.spread.compute())


def one_filter(network):
    """A layer of a single kernel in front: of float64, what looks like a copy of its weight may be the weight."""
    return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), *network)


class Augmented(Net):
    """A random augmentation in the training step, and labels that are mixed."""

    def __init__(self):
        super().__init__()
        self.augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=1), v2.RandomErasing(p=0.5)])

    def training_step(self, batch, batch_idx):
        self.note("train", batch_idx, labels=batch[1].tolist())
        x, y = self.augment(batch[0]), batch[1]
        order, share = torch.randperm(len(x)), float(np.random.beta(0.4, 0.4))
        scores = self(share * x + (1 - share) * x[order])
        loss = share * F.cross_entropy(scores, y) + (1 - share) * F.cross_entropy(scores, y[order])
        self.log("train/loss", loss)
        return loss


class Attentive(nn.Module):
    """Convolution, then a transformer layer: in eval mode it takes a fast path if nobody listens."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.block = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Wrapped(nn.Module):
    """Weight norm, spectral norm, a hook of the user's and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.first = Listened(1, 4, 3, padding=1)
        self.twice = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.leaky_relu(self.twice(F.relu(self.twice(x))))
        return self.head(F.gelu(self.last(x)).mean((2, 3)))


class Averaging(pl.Callback):
    """Keeps a moving average of the weights and validates with it."""

    def __init__(self):
        self.kept = None
        self._own = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {name: value.clone() for name, value in pl_module.state_dict().items()}
        if self.kept is None:
            self.kept = now
        for name, value in now.items():
            if value.is_floating_point():
                self.kept[name].lerp_(value, 0.2)

    def on_validation_epoch_start(self, trainer, pl_module):
        if self.kept is not None:
            self._own = {name: value.clone() for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(self.kept)

    def on_validation_epoch_end(self, trainer, pl_module):
        if self._own is not None:
            pl_module.load_state_dict(self._own)


def swa():
    """Averages the weights of the last epochs, at a rate of its own; its own statistics for BatchNorm at the end."""
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)


def ema():
    """Lightning's own moving average, with which it validates."""
    return pl.callbacks.EMAWeightAveraging(decay=0.9)


class Drawing(pl.Callback):
    """A callback of the user's that draws random numbers at many moments."""

    def __init__(self):
        self.kept = []

    def _draw(self, *args, **kwargs):
        self.kept.append((torch.rand(()).item(), float(np.random.rand()), random.random()))

    setup = on_fit_start = on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = _draw
    on_validation_start = on_validation_end = on_train_epoch_end = on_train_end = on_fit_end = teardown = _draw


CORE = [
    Recipe("sgd"),
    Recipe("accumulation", trainer={"accumulate_grad_batches": 3}),
    Recipe("two_optimizers", TwoOptimizers),
]
MORE = [
    Recipe("clip_by_norm", trainer={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}),
    Recipe("clip_by_value", trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    Recipe("one_cycle", OneCycle),
    Recipe("plateau", Plateau),
    Recipe("validate_twice", trainer={"val_check_interval": 0.5}),
    Recipe("bf16_mixed", trainer={"precision": "bf16-mixed"}),
    Recipe("bf16_true", trainer={"precision": "bf16-true"}),
    Recipe("averaging", make_callbacks=lambda: [Averaging()]),
    Recipe("swa", trainer={"max_epochs": 3}, make_callbacks=lambda: [swa()]),
    *([Recipe("ema", make_callbacks=lambda: [ema()])] if hasattr(pl.callbacks, "EMAWeightAveraging") else []),  # 2.6
    Recipe("drawing", make_callbacks=lambda: [Drawing()]),
    Recipe("no_sanity_check", trainer={"num_sanity_val_steps": 0}),
    Recipe("no_validation", validate=False),
    Recipe("max_steps", trainer={"max_epochs": -1, "max_steps": 7, "limit_train_batches": 3}),
    Recipe("lbfgs", lambda: Net(make_optimizer=lbfgs)),
    Recipe("frozen", Frozen),
    Recipe("in_place", InPlace),
    Recipe("penalty", Penalty),
    Recipe("sometimes_none", Sometimes),
    Recipe("checkpointed", lambda: Net(Checkpointed())),
    Recipe("checkpointed_reentrant", lambda: Net(Checkpointed(reentrant=True))),
    Recipe("channels_last", ChannelsLast),
    Recipe("stochastic_depth", lambda: Net(stochastic())),
    Recipe("augmented", Augmented),
    Recipe("stateful", lambda: Net(Stateful())),
    Recipe("attentive", lambda: Net(Attentive())),
    Recipe("wrapped", lambda: Net(Wrapped())),
    Recipe("no_dropout_double_precision", lambda: Net(one_filter(body(0.0))), trainer={"precision": "64-true"}),
]
RECIPES = CORE + MORE
