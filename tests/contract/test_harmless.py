"""The callbacks change nothing: bit identity over all recipes, and proof that the battery would notice."""

import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.contract.battery import assert_undisturbed, differences, reference, run
from tests.contract.factories import SINGLE, WHOLE
from tests.contract.nets import pl
from tests.contract.recipes import CORE, RECIPES


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("recipe", CORE, ids=str)
def test_single_callback_leaves_the_run_bit_identical(name, recipe):
    """Each callback alone."""
    assert_undisturbed(SINGLE[name], recipe)


@pytest.mark.filterwarnings("ignore:Influence can't follow the loss")  # where a step calls the head twice
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_all_callbacks_leave_the_run_bit_identical(recipe):
    """All callbacks, each as often as it can be."""
    assert_undisturbed(WHOLE["often"], recipe)


@pytest.mark.filterwarnings("ignore:Influence can't follow the loss")  # where a step calls the head twice
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_interp_leaves_the_run_bit_identical(recipe):
    """The one line that most people use."""
    assert_undisturbed(WHOLE["Interp"], recipe)


def test_callbacks_before_and_after_those_of_the_user_leave_the_run_bit_identical():
    """Two sets of all callbacks at once."""
    recipe = RECIPES[0]
    assert_undisturbed(lambda: [*WHOLE["standard"](), *_named("second")], recipe)


def _named(name):
    from lightning_interp import standard_callbacks

    return standard_callbacks(name=name, on_error="raise")


# ---------------------------------------------------------------------- the battery itself


def _noted(made, model):
    made += [[parameter.detach().clone() for parameter in model.parameters()], model]
    return model


def test_recipes_are_reproducible_and_do_train():
    """Else bit identity would mean nothing."""
    for recipe in RECIPES:
        made = []
        outcome = run(
            replace(recipe, make_model=lambda made=made, recipe=recipe: _noted(made, recipe.make_model())), []
        )
        assert differences(reference(recipe), outcome) == [], recipe.name
        before, model = made
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), recipe.name
        steps = {entry[0] for entry in outcome["diary of the steps"]}
        assert steps == ({"train", "val", "end"} if recipe.validate else {"train", "end"}), recipe.name
        assert outcome["metrics logged"], recipe.name


class LeakyHook(pl.Callback):
    """Leaves a hook that changes nothing."""

    def on_train_start(self, trainer, pl_module):
        pl_module.net[0].register_forward_hook(lambda *args: None)


class LeakyTensorHook(pl.Callback):
    """Leaves a hook on a parameter."""

    def on_train_start(self, trainer, pl_module):
        pl_module.net[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)


class ForgetsEvalMode(pl.Callback):
    """Runs a forward in eval mode and never goes back."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[5].eval()


class ThawsEvalMode(pl.Callback):
    """Puts everything into train mode, also what the user had frozen."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.train()


class DrawsTorchNumbers(pl.Callback):
    """One number at the end."""

    def on_train_end(self, trainer, pl_module):
        torch.rand(())


class DrawsNumpyNumbers(pl.Callback):
    """One number at the end."""

    def on_train_end(self, trainer, pl_module):
        np.random.rand()


class DrawsPythonNumbers(pl.Callback):
    """One number at the end."""

    def on_train_end(self, trainer, pl_module):
        random.random()


class LeavesGradients(pl.Callback):
    """A backward of its own."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.random.fork_rng():
            pl_module.net[0](batch[0]).sum().backward()


class FreezesParameters(pl.Callback):
    """Switches gradients off and forgets it."""

    def on_train_end(self, trainer, pl_module):
        pl_module.net[0].weight.requires_grad_(False)


class UpdatesBatchNorm(pl.Callback):
    """A forward in train mode under no_grad."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[:2](batch[0])


class ReadsTheLoader(pl.Callback):
    """Takes a batch out of the user's loader."""

    def on_train_start(self, trainer, pl_module):
        next(iter(trainer.train_dataloader))


class ReadsTheDataSet(pl.Callback):
    """Takes a sample out of the user's data set, with the generators put back."""

    def on_train_start(self, trainer, pl_module):
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        trainer.train_dataloader.dataset[0]
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class RepeatsTheStep(pl.Callback):
    """Runs the user's `validation_step` again."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.random.fork_rng(), torch.no_grad():
            pl_module.note("val", batch_idx)


class WritesAMetric(pl.Callback):
    """Logs under a name of its own that is not marked as ours."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("sparsity", 1.0)


class TouchesTheBatch(pl.Callback):
    """Normalises the batch in place."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].sub_(batch[0].mean())


class StepsTheSchedule(pl.Callback):
    """Changes a learning rate by the smallest amount."""

    def on_train_end(self, trainer, pl_module):
        group = trainer.optimizers[0].param_groups[0]
        group["lr"] = float(np.nextafter(group["lr"], 1.0))


class LeavesAMode(pl.Callback):
    """A torch function mode that stays on the stack."""

    def on_train_end(self, trainer, pl_module):
        torch.overrides.BaseTorchFunctionMode().__enter__()


class LeavesAnAttribute(pl.Callback):
    """Shadows a method of the user's module."""

    def on_train_end(self, trainer, pl_module):
        pl_module.forward = pl_module.forward


class SwapsABuffer(pl.Callback):
    """Resets the count of batches that normalisation has seen."""

    def on_train_end(self, trainer, pl_module):
        module = next(m for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d))
        module.num_batches_tracked.add_(1)


class RearrangesMemory(pl.Callback):
    """Equal weights in another order of memory."""

    def on_train_end(self, trainer, pl_module):
        weight = next(m for m in pl_module.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1).weight
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


class ReplacesAParameter(pl.Callback):
    """By an equal one."""

    def on_train_end(self, trainer, pl_module):
        layer = next(m for m in pl_module.modules() if isinstance(m, nn.Conv2d))
        gradient = layer.weight.grad
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.weight.grad = gradient


class ChoosesKernels(pl.Callback):
    """Leaves deterministic kernels on."""

    def on_train_end(self, trainer, pl_module):
        torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic


class Silences(pl.Callback):
    """Leaves a filter that hides the user's warnings."""

    def on_train_end(self, trainer, pl_module):
        warnings.simplefilter("ignore")


GUILTY = [
    LeakyHook, LeakyTensorHook, ForgetsEvalMode, DrawsTorchNumbers, DrawsNumpyNumbers, DrawsPythonNumbers,
    LeavesGradients, FreezesParameters, UpdatesBatchNorm, ReadsTheLoader, ReadsTheDataSet, RepeatsTheStep,
    WritesAMetric, TouchesTheBatch, StepsTheSchedule, LeavesAMode, LeavesAnAttribute, SwapsABuffer,
    RearrangesMemory, ReplacesAParameter, ChoosesKernels, Silences,
]  # fmt: skip


@pytest.mark.parametrize("guilty", GUILTY, ids=lambda cls: cls.__name__)
def test_battery_catches_a_callback_that_disturbs(guilty):
    """Negative controls."""
    deterministic = torch.backends.cudnn.deterministic
    try:
        with pytest.raises(AssertionError, match="the callbacks changed"), warnings.catch_warnings():
            assert_undisturbed(lambda: [guilty()], RECIPES[0])
    finally:
        torch.backends.cudnn.deterministic = deterministic
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()


def test_battery_catches_a_thawed_child():
    """A frozen normalisation that goes back to train mode."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == "frozen")
    with pytest.raises(AssertionError, match="the callbacks changed"):
        assert_undisturbed(lambda: [ThawsEvalMode()], recipe)


def test_battery_accepts_a_callback_that_does_nothing():
    """No false alarm."""
    assert_undisturbed(lambda: [pl.Callback()], RECIPES[0])


def test_differences_sees_every_bit():
    """NaN equals NaN, -0.0 is not 0.0, types and dtypes count."""
    nan = torch.tensor([float("nan"), 0.0])
    assert differences(nan, nan.clone()) == []
    assert differences(nan, torch.tensor([float("nan"), -0.0])) == ["run: values differ"]
    assert differences({"a": [1.0]}, {"a": [1]}) == ["run.a[0]: float became int"]
    assert differences([1, 2], [1]) == ["run: length 2 became 1"]
    assert differences(nan, nan.double()) == ["run: values differ"]
    assert differences(float("nan"), float("nan")) == []
