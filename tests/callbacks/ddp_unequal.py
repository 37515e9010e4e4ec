"""One of two processes that train together on the CPU, on batches of five and of two: `ddp_unequal.py FOLDER`.

Writes what the callbacks measured, and what this process saw: activations and losses.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_interp import ActivationSparsity, DeadFilters, Influence, TrainingDynamics
from lightning_interp.callbacks import window
from lightning_interp.callbacks.session import Session

SIZES = (5, 2)  # of a batch, by rank
BATCHES, EPOCHS, CLASSES = 3, 2, 3
OWN = {0: range(15), 1: range(15, 21)}  # of the samples


class Images(Dataset):
    """Channel 0 is set in one pixel of sample 12, which rank 0 sees last, channel 1 in one of sample 20, rank 1's."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.arange(21) % CLASSES
        self.images = torch.rand(21, 3, 4, 4, generator=generator) + 0.3 * self.labels[:, None, None, None]
        self.images[:, :2] = 0.0
        self.images[12, 0, 1, 2] = self.images[20, 1, 2, 3] = 1.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index], torch.as_tensor(index)


class Net(pl.LightningModule):
    """First four filters 1x1 that stay as they are: on the channels 0 and 1, a dead one, and one on channel 2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(20, CLASSES)
        )
        with torch.no_grad():
            self.net[0].weight.zero_()
            for number, channel in ((0, 0), (1, 1), (3, 2)):
                self.net[0].weight[number, channel] = 1.0
            self.net[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0, -0.5]))
        self.net[0].requires_grad_(False)
        self.seen = {"zeros": [], "alive": [], "magnitudes": [], "losses": [], "samples": []}
        self.net[1].register_forward_hook(self._first)
        self.net[3].register_forward_hook(self._second)

    def _first(self, module, args, output):
        if self.training:
            self.seen["zeros"].append([(output == 0).sum((0, 2, 3)).tolist(), output[:, 0].numel()])
            self.seen["alive"].append((output > 0).amax((0, 2, 3)).tolist())

    def _second(self, module, args, output):
        if self.training:
            magnitudes = output.detach().double().abs().sum((0, 2, 3))
            self.seen["magnitudes"].append([magnitudes.tolist(), output[:, 0].numel()])

    def training_step(self, batch, batch_idx):
        images, labels, numbers = batch
        scores = self.net(images)
        each = F.cross_entropy(scores.detach().double(), labels, reduction="none")
        self.seen["samples"] += list(zip(numbers.tolist(), each.tolist(), strict=True))
        loss = F.cross_entropy(scores, labels)
        self.seen["losses"].append(loss.item())
        return loss

    def forward(self, images):
        return self.net(images)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)


def main(folder: Path) -> None:
    """Trains, and writes."""
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    dead = DeadFilters(split="train", on_error="raise")
    sparsity = ActivationSparsity(every_n_epochs=1, maps=False, on_error="raise")
    sparsity._sampled = lambda trainer, batch_idx: True
    dynamics = TrainingDynamics(dense_steps=100, on_error="raise")
    influence = Influence(num_test=1, num_train=12, on_error="raise")
    history, scores, score = {}, [], window.dormancy_scores

    def kept(magnitudes):
        scores.append(score(magnitudes).tolist())
        return score(magnitudes)

    window.dormancy_scores = kept  # only whether they are below a threshold is logged

    class Ends(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            known = Session.of(trainer).history
            for quantity in ("loss", "gradient_norm", "sparsity"):
                layers = [None, *known.layers(quantity)]
                history[quantity] = {str(layer): known.get(quantity, layer).values for layer in layers}

    data = Images()
    subset = list(OWN[rank])
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, max_epochs=EPOCHS, strategy=DDPStrategy(process_group_backend="gloo"),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[dead, sparsity, dynamics, influence, Ends()],
    )  # fmt: skip
    model = Net()
    trainer.fit(model, DataLoader(data, batch_size=SIZES[rank], sampler=subset))
    means = influence._watch.losses.means()
    result = {
        "seen": model.seen,
        "dead": dead.dead,
        "history": history,
        "scores": scores,
        "sample_losses": [means.losses.tolist(), means.counts.tolist()],
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
