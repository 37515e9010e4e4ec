"""What a watch of training steps is: ours in each of its states, and those of other tools."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class UnavailableError(Exception):
    """A package that is not installed, or that can't be imported here. The message says which."""


class NothingMeasuredError(Exception):
    """A watch, or a tool, that produced no output: its time means nothing."""


class Watch:
    """Looks at the training steps of one model; this one looks at nothing.

    Attributes:
        name: As in the table.
        ours: Whether it is of this package.
        looks_at: By default it looks at one step in so many; measured are the steps at which it does.
        dead: Share of the filters that are silent in the model that it is shown.
    """

    name: str = "nothing"
    ours: ClassVar[bool] = False
    looks_at: int = 1
    dead: float = 0.0

    def attach(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        """Once, before the first step; output goes into the folder.

        Raises:
            UnavailableError: If its package is missing.
        """

    def before_forward(self) -> None:
        """A step begins."""

    def before_backward(self, loss: Tensor) -> None:
        """The forward is over."""

    def before_step(self) -> None:
        """The gradients are there."""

    def after_step(self, loss: Tensor) -> None:
        """The optimizer has stepped."""

    def check(self) -> None:
        """After the last step.

        Raises:
            NothingMeasuredError: If no output was produced.
        """

    def close(self) -> None:
        """Lets go of files and processes."""


def require(output: object, watch: str) -> None:
    """Raises `NothingMeasuredError` if the output is empty or zero."""
    if not output:
        raise NothingMeasuredError(f"{watch} has measured nothing")


def finite(values: Iterable[Any]) -> list[float]:
    """The finite ones among numbers and single tensors."""
    numbers = (float(value) for value in values)
    return [number for number in numbers if math.isfinite(number)]


def load(module: str) -> Any:
    """Imports a module of another tool.

    Raises:
        UnavailableError: If it is not installed or can't be imported beside this torch.
    """
    package = module.split(".", maxsplit=1)[0]
    if importlib.util.find_spec(package) is None:
        raise UnavailableError("not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a package raises while it is imported
        raise UnavailableError(
            f"does not import with torch {torch.__version__}: {type(error).__name__}: {error}"
        ) from error
