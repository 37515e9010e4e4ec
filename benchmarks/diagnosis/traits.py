"""What makes a healthy run look ill."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.diagnosis import models
from benchmarks.diagnosis.data import Data


def prepare(net: nn.Module, data: Data, trait: str) -> None:
    """Changes the network before training; `full_batch`, `wide` and `tiny_batch` are matters of the specification."""
    if trait == "sparse":
        with torch.no_grad():
            for conv in models.convolutions(net):
                if conv.bias is not None:
                    conv.bias.sub_(0.3)
    elif trait == "pruned":
        for conv in models.convolutions(net)[1:]:
            prune.ln_structured(conv, "weight", amount=0.5, n=2, dim=0)
            if conv.bias is not None:
                prune.custom_from_mask(conv, "bias", (conv.weight_mask.flatten(1).sum(1) > 0).float())
    elif trait == "fine_tuning":
        _pretrain(net, data)


def _pretrain(net: nn.Module, data: Data) -> None:
    """Six epochs with Adam on all images: what is fine-tuned knows most of it already."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        for rows in torch.randperm(len(data.images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(data.images[rows]), data.targets[rows]).backward()
            optimizer.step()
