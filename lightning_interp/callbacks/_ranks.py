"""Collectives that no rank can miss: before each one the ranks agree that all of them can take part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _alone(trainer: Any) -> bool:
    return trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized())


def agree(trainer: Any, *, ready: bool, size: int) -> bool:
    """Whether every rank is ready, with the same size. Every rank must call it, also one that has failed."""
    if _alone(trainer):
        return ready
    mine = torch.tensor([int(ready), size, -size], device=trainer.strategy.root_device)
    dist.all_reduce(mine, op=dist.ReduceOp.MIN)
    all_ready, smallest, largest = mine.tolist()
    return bool(all_ready) and smallest == -largest


def highest(trainer: Any, values: Tensor) -> Tensor:
    """Element-wise maximum over ranks, on the CPU; after `agree` only."""
    if _alone(trainer):
        return values.cpu()
    mine = values.to(trainer.strategy.root_device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return mine.cpu()


def total(trainer: Any, values: Tensor) -> Tensor:
    """Element-wise sum over ranks, on the CPU; after `agree` only."""
    if _alone(trainer):
        return values.cpu()
    mine = values.to(trainer.strategy.root_device)
    dist.all_reduce(mine, op=dist.ReduceOp.SUM)
    return mine.cpu()
