"""Collectives that no rank can miss: before each one the ranks agree that all of them can take part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_interp.errors import ArgumentError

# Strategies whose modules hold only a part of each weight on each rank.
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")


def is_sharded(trainer: Any) -> bool:
    """Whether each rank holds only a part of each weight: norms and copies of it mean nothing, and a forward waits."""
    return any(cls.__name__.startswith(_SHARDED) for cls in type(trainer.strategy).__mro__)


def refuse_sharded(trainer: Any, callback: object, does: str) -> None:
    """For what one rank does alone.

    Raises:
        ArgumentError: If the weights are spread over ranks.
    """
    if is_sharded(trainer):
        raise ArgumentError(
            f"{type(callback).__name__} {does} on one rank, which {type(trainer.strategy).__name__} does not allow. "
            'Remove it, or train with strategy="ddp".'
        )


def _alone(trainer: Any) -> bool:
    return trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized())


def _copy(trainer: Any, values: Tensor) -> Tensor:
    """On the device of the rank; collectives write into what they are given, which the caller may need again."""
    return values.to(trainer.strategy.root_device, copy=True)


def agree(trainer: Any, *, ready: bool, size: int) -> bool:
    """Whether every rank is ready, with the same size. Every rank must call it, also one that has failed."""
    if _alone(trainer):
        return ready
    mine = torch.tensor([int(ready), size, -size], device=trainer.strategy.root_device)
    dist.all_reduce(mine, op=dist.ReduceOp.MIN)
    all_ready, smallest, largest = mine.tolist()
    return bool(all_ready) and smallest == -largest


def from_zero(trainer: Any, values: Tensor) -> Tensor:
    """What rank zero has, on the CPU. Every rank must call it, with a tensor of the same size and type."""
    if _alone(trainer):
        return values.cpu()
    shared = _copy(trainer, values)
    dist.broadcast(shared, src=0)
    return shared.cpu()


def highest(trainer: Any, values: Tensor) -> Tensor:
    """Element-wise maximum over ranks, on the CPU; after `agree` only."""
    if _alone(trainer):
        return values.cpu()
    mine = _copy(trainer, values)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return mine.cpu()


def total(trainer: Any, values: Tensor) -> Tensor:
    """Element-wise sum over ranks, on the CPU; after `agree` only."""
    if _alone(trainer):
        return values.cpu()
    mine = _copy(trainer, values)
    dist.all_reduce(mine, op=dist.ReduceOp.SUM)
    return mine.cpu()
