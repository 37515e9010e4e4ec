"""Everything that could be left on a model or in the process."""

from __future__ import annotations

import torch
from torch.nn.modules import module as module_globals
from torch.optim import optimizer as optimizer_globals

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def hooks_on(model):
    """All hooks by the place where they are: `(module, dictionary) -> their names`."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if "hook" in attribute and isinstance(value, dict) and value:
                found[name, attribute] = [repr(type(hook)) for hook in value.values()]
    for name, parameter in model.named_parameters():
        for attribute in _TENSOR_HOOKS:
            if getattr(parameter, attribute, None):
                found[name, attribute] = [repr(type(hook)) for hook in getattr(parameter, attribute).values()]
    return found


def hooks_in_process(optimizers=()):
    """Global hooks of modules and optimizers, and those of the given optimizers, counted."""
    places = {"modules": module_globals, "optimizers": optimizer_globals}
    found = {
        (place, attribute): len(value)
        for place, namespace in places.items()
        for attribute, value in vars(namespace).items()
        if "hook" in attribute and isinstance(value, dict)
    }
    for index, optimizer in enumerate(optimizers):
        for attribute, value in vars(optimizer).items():
            if "hook" in attribute and isinstance(value, dict):
                found[f"optimizer {index}", attribute] = len(value)
    return found


def modes_on_stack():
    """Torch function modes and dispatch modes that listen now."""
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def assert_nothing_left(model, optimizers=(), expected=None):
    """No hook on the model (but those in `expected`), no global one, no mode."""
    found = hooks_on(model)
    if found != (expected or {}):
        raise AssertionError(f"Hooks were left: {found}")
    if any(hooks_in_process(optimizers).values()):
        raise AssertionError(f"Hooks were left: {hooks_in_process(optimizers)}")
    if modes_on_stack() != (0, 0):
        raise AssertionError(f"Modes were left: {modes_on_stack()}")
