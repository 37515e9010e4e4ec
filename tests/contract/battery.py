"""The battery: a run with callbacks must be the same, bit for bit, as one without."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.contract.hooks import hooks_in_process, hooks_on, modes_on_stack
from tests.contract.nets import Capture, Net, loader, pl, quiet_trainer, seed_all


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        name: For the name of the test.
        make_model: A new model.
        trainer: Options of the Trainer.
        make_callbacks: The user's own callbacks.
        validate: Whether there is a validation loader.
        data: Options of both loaders, see `nets.loader`.
    """

    name: str
    make_model: Callable[[], object] = Net
    trainer: dict = field(default_factory=dict)
    make_callbacks: Callable[[], list] = list
    validate: bool = True
    data: dict = field(default_factory=dict)

    def __str__(self):
        return self.name


def run(recipe, callbacks, capture=None):
    """Trains, and returns all that the user could compare; what is logged goes to `capture` too."""
    seed_all(7)
    model, own, capture = recipe.make_model(), recipe.make_callbacks(), capture or Capture()
    given, filters = dict(model.named_parameters()), _broad_filters()
    train = loader(**{"samples": 27, **recipe.data})
    val = loader(**{"samples": 12, **recipe.data, "seed": 1, "shuffle": False}) if recipe.validate else None
    with tempfile.TemporaryDirectory() as folder:
        board = pl.loggers.TensorBoardLogger(folder)
        options = {"logger": [capture, board], **recipe.trainer}
        trainer = quiet_trainer(callbacks=[*own, *callbacks], **options)
        trainer.fit(model, train, val)
        board.finalize("success")
    outcome = _outcome(trainer, model, own, capture, train, val)
    # Not only equal ones: an optimizer or a user may hold them.
    outcome["the same parameters"] = {name: p is given.get(name) for name, p in model.named_parameters()}
    outcome["new filters of warnings"] = [entry for entry in _broad_filters() if entry not in filters]
    return outcome


def _broad_filters():
    """Those that hide a whole category; libraries bring others with their first import."""
    return [str(entry) for entry in warnings.filters if entry[1] is None and entry[3] is None]


def _outcome(trainer, model, own, capture, train, val):  # noqa: PLR0917
    parameters = dict(model.named_parameters())
    return {
        "weights and buffers": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics logged": capture.of_the_user(),
        "callback_metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("interp")},
        "generators": (torch.get_rng_state(), np.random.get_state(), random.getstate()),
        "generators of the GPUs": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
        "scaler": scaler.state_dict() if (scaler := getattr(trainer.precision_plugin, "scaler", None)) else None,
        "diary of the steps": model.diary,
        "samples read": (list(train.dataset.reads), list(val.dataset.reads) if val is not None else None),
        "train/eval flags": {name: module.training for name, module in model.named_modules()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "hooks": (hooks_on(model), hooks_in_process(trainer.optimizers)),
        "modes": modes_on_stack(),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "classes": {name: repr(type(module)) for name, module in model.named_modules()},
        "settings": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()),
        "settings of the GPUs": (torch.is_autocast_enabled("cuda"), torch.backends.cudnn.benchmark),
        "how kernels are chosen": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
        ),
        "progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop, str(trainer.state.status)),
        "the user's callbacks": [getattr(callback, "kept", None) for callback in own],
    }


_references = {}


def reference(recipe):
    """The outcome without callbacks, made once."""
    if recipe.name not in _references:
        _references[recipe.name] = run(recipe, [])
    return _references[recipe.name]


def assert_undisturbed(make_callbacks, recipe):
    """Trains with and without the callbacks from the same seed; all of the outcome must be bit for bit the same.

    Raises:
        AssertionError: Which names everything that differs.
    """
    found = differences(reference(recipe), run(recipe, make_callbacks()))
    if found:
        more = f" (and {len(found) - 12} more)" if len(found) > 12 else ""
        raise AssertionError(f"{recipe.name}: the callbacks changed {'; '.join(found[:12])}{more}")


def differences(expected, actual, path="run"):  # noqa: PLR0911
    """Where two nested values differ in any bit, in type or in length."""
    if type(expected) is not type(actual):
        return [f"{path}: {type(expected).__name__} became {type(actual).__name__}"]
    if isinstance(expected, dict):
        if list(expected) != list(actual):
            return [f"{path}: keys {list(expected)} became {list(actual)}"]
        return [d for key in expected for d in differences(expected[key], actual[key], f"{path}.{key}")]
    if isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            return [f"{path}: length {len(expected)} became {len(actual)}"]
        pairs = enumerate(zip(expected, actual, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{path}[{i}]")]
    if isinstance(expected, torch.Tensor | np.ndarray):
        return [] if _bits(expected) == _bits(actual) else [f"{path}: values differ"]
    if isinstance(expected, float):
        return [] if expected.hex() == actual.hex() else [f"{path}: {expected!r} became {actual!r}"]
    return [] if expected == actual else [f"{path}: {expected!r} became {actual!r}"]


def _bits(value):
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        layout = value.stride() if value.numel() > 1 else ()  # kernels round by it
        return value.dtype, tuple(value.shape), layout, value.requires_grad, flat.numpy().tobytes()
    return value.dtype, value.shape, value.tobytes()


def fit_quietly(trainer, *args, **kwargs):
    """Fits, and returns the InterpWarnings; any other warning stays an error."""
    from lightning_interp import InterpWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InterpWarning)
        trainer.fit(*args, **kwargs)
    return [str(warning.message) for warning in caught if issubclass(warning.category, InterpWarning)]
