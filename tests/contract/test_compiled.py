"""Compiled models and functions: bit-identical to the same compiled run, and what was never seen is said."""

import math
import os
import shutil
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch._dynamo
from torch import nn

from lightning_interp import ActivationSparsity, DeadFilters, InterpWarning, TopPatches, TrainingDynamics
from lightning_interp.callbacks.session import Session
from lightning_interp.functional.hooks import enter_mode, function_stack, leave_mode
from tests.contract.battery import Recipe, differences, run
from tests.contract.factories import WHOLE
from tests.contract.nets import Capture, Net, body, loader, quiet_trainer, seed_all

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_interp.InterpWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks
]


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing compiled is left over from another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Quiet(Net):
    """Keeps its diary outside of the graph."""

    @torch.compiler.disable
    def note(self, *args, **more):
        super().note(*args, **more)


class Plain(Quiet):
    """Steps without anything that can't be in a graph."""

    def training_step(self, batch, batch_idx):
        self.note("train", batch_idx, labels=batch[1].tolist())
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.note("val", batch_idx, labels=batch[1].tolist())
        self.write(nn.functional.cross_entropy(self(batch[0]), batch[1]))

    @torch.compiler.disable
    def write(self, loss):
        """Logging has graph breaks by the dozen, and would be most of the time."""
        self.log("val/loss", loss)


class Hidden(Quiet):
    """Calls its body, and not its head, in a compiled function: nothing of that can be seen from outside."""

    backend, fullgraph, rest = "eager", False, 1

    def __init__(self):
        super().__init__()
        part = self.net[: len(self.net) - self.rest]
        compiled = torch.compile(lambda x: part(x), backend=self.backend, fullgraph=self.fullgraph)
        self.__dict__["compiled"] = compiled

    def forward(self, x):
        x = self.compiled(x)
        return self.net[-1](x) if self.rest else x


class AllHidden(Hidden):
    """In one graph, which nothing may break: the function is refused then, and the run with it."""

    fullgraph, rest = True, 0


def lightning_module(backend):
    """`trainer.fit(torch.compile(model))`."""
    return torch.compile(Plain(), backend=backend)


def module_in_place(backend):
    """`model.compile()`, which Lightning does not look at."""
    model = Quiet()
    model.compile(backend=backend)
    return model


def child(backend):
    """Only the network, as most people do it."""
    model = Quiet()
    model.net = torch.compile(model.net, backend=backend)
    return model


def child_in_place(backend):
    """Likewise, with its own method."""
    model = Quiet()
    model.net.compile(backend=backend)
    return model


def called_before(backend):
    """Compiled and called, in both modes, before the fit."""
    model = child(backend)
    for training in (False, True):
        model.train(training)
        model(torch.randn(6, 1, 8, 8))
    return model


def forward_of_a_child(backend):
    """The method, which leaves no trace on the module itself."""
    model = Quiet()
    model.net.forward = torch.compile(model.net.forward, backend=backend)
    return model


def step(backend):
    """The training step alone."""
    model = Plain()
    model.training_step = torch.compile(model.training_step, backend=backend)
    return model


def a_layer(backend):
    """One layer of many."""
    model = Quiet()
    model.net[3] = torch.compile(model.net[3], backend=backend)
    return model


def hidden(backend):
    """A function around the body."""
    return type("Hidden", (Hidden,), {"backend": backend})()


def all_hidden(backend):
    """A function around all, in one graph."""
    return type("AllHidden", (AllHidden,), {"backend": backend})()


QUICK = [child, all_hidden]
THOROUGH = [lightning_module, module_in_place, child_in_place, called_before, forward_of_a_child, step, a_layer, hidden]
WAYS = [*QUICK, *(pytest.param(way, marks=pytest.mark.slow) for way in THOROUGH)]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
needs_cxx = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
COMPILERS = [
    ("aot_eager", called_before),
    ("aot_eager", hidden),
    pytest.param("inductor", child, marks=needs_cxx),
    pytest.param("inductor", lightning_module, marks=needs_cxx),
    pytest.param("inductor", all_hidden, marks=needs_cxx),
]


def outcome(way, backend, callbacks):
    """A run that compiles everything anew; few batches, all of one size but the last."""
    torch._dynamo.reset()
    recipe = Recipe(way.__name__, lambda: way(backend), data={"samples": 15}, trainer={"max_epochs": 2})
    return run(recipe, callbacks)


@pytest.mark.parametrize("way", WAYS)
def test_callbacks_leave_a_compiled_run_bit_identical(way):
    """All of them, each as often as it can be, and the one line."""
    expected = outcome(way, "eager", [])
    for make in (WHOLE["often"], WHOLE["Interp"]):
        assert differences(expected, outcome(way, "eager", make())) == []


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "way"), COMPILERS, ids=lambda value: getattr(value, "__name__", value))
def test_callbacks_leave_a_run_through_a_real_compiler_bit_identical(backend, way):
    """Fused kernels round differently, and draw other random numbers: a graph more or less would show."""
    expected = outcome(way, backend, [])
    for make in (WHOLE["often"], WHOLE["Interp"]):
        assert differences(expected, outcome(way, backend, make())) == []


# ---------------------------------------------------------------------- what is compiled, and how often


def graphs(make_callbacks):
    """Graphs that a run compiles, and breaks in them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(Recipe("graphs", AllHidden, data={"samples": 15}, trainer={"max_epochs": 2}), make_callbacks())
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_hidden_function_is_compiled_once_more_at_most():
    """For the one batch in which hooks wait in vain; a limit of eight kills runs in one graph, or ends compilation."""
    alone, breaks = graphs(list)
    assert breaks == 0
    watched, breaks = graphs(WHOLE["often"])
    assert watched <= alone + 2  # one for training, one for validation
    assert breaks == 0


# ---------------------------------------------------------------------- seen or said


def fit(model, *callbacks, **options):
    """What was said, and the trainer."""
    seed_all(0)
    trainer = quiet_trainer(callbacks=list(callbacks), logger=Capture(), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(), loader(12, seed=1, shuffle=False, noise=0.0))
    said = [str(warning.message) for warning in caught if issubclass(warning.category, InterpWarning)]
    assert len(said) == len(set(said))
    return said, trainer


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("rest", [0, 1])
def test_layers_that_were_never_seen_are_named_and_counted_over_the_fixed_samples(rest, split):
    """Filter by filter as by hand, at the end; a layer that is seen is not in the message."""
    model = type("Partly", (Hidden,), {"rest": rest})()
    watcher = DeadFilters(split=split, window_steps=2, on_error="raise")
    with torch.no_grad():
        model.net[0].bias[1] = model.net[3].bias[2] = -99.0
        model.net[1].eps = 1e9  # so that normalisation leaves a filter dead, and alive the others by their shift
        model.net[1].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    said, trainer = fit(model, watcher)
    (message,) = said
    assert "DeadFilters never saw net.0, net." in message
    assert "eager pass over 12 fixed samples" in message
    assert (", net.10" in message) is (rest == 0)
    by_hand = silent_by_hand(model)
    assert [watcher.dead["net.0"], watcher.dead["net.3"]] == by_hand
    assert 1 in by_hand[0]
    assert 2 in by_hand[1]
    assert Session.of(trainer).history.get("dead_filters", "net.0").steps[-1] == trainer.global_step - 1


def test_nothing_is_said_of_layers_that_nobody_calls():
    """A spare head, a teacher: no forward reaches them, compiled or not."""

    class Spare(Quiet):
        def __init__(self):
            super().__init__()
            self.spare = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())

    watchers = [DeadFilters(on_error="raise"), ActivationSparsity(every_n_train_steps=1, on_error="raise")]
    said, _ = fit(Spare(), *watchers, TopPatches(on_error="raise"))
    assert said == []
    assert "spare.0" not in watchers[0].dead


def test_sparsity_names_what_is_missing_from_its_numbers():
    """Whether all is hidden or only a part."""
    for kind, missing in ((AllHidden, "net.0, net.10, net.3 and 1 more"), (Hidden, "net.0, net.3, net.8")):
        torch._dynamo.reset()
        said, _ = fit(kind(), ActivationSparsity(every_n_train_steps=1, on_error="raise"))
        (message,) = said
        assert f"ActivationSparsity never saw {missing}, which a compiled function" in message


def test_top_patches_of_hidden_layers_come_from_an_eager_pass():
    """The same as those of the run that is not compiled, of whose last weights they are."""
    watcher, twin = TopPatches(k=2, on_error="raise"), TopPatches(k=2, on_error="raise")
    said, _ = fit(AllHidden(), watcher)
    (message,) = said
    assert "TopPatches never saw net.0" in message
    assert "first 12 images of the set, in an eager pass" in message
    fit(Quiet(), twin)
    assert watcher.top
    assert list(watcher.top) == list(twin.top)


def test_dynamics_of_hidden_layers_hold_everything_but_the_step_ratio():
    """A compiled function may draw other random numbers than its eager twin."""
    watcher = TrainingDynamics(dense_steps=100, on_error="raise")
    said, trainer = fit(AllHidden(), watcher)
    history = Session.of(trainer).history
    assert said == []
    assert len(history.get("step_ratio")) == 0
    assert history.get("gradient_norm").steps == list(range(trainer.global_step))
    torch._dynamo.reset()
    _, trainer = fit(Quiet(), TrainingDynamics(dense_steps=100, on_error="raise"))
    assert len(Session.of(trainer).history.get("step_ratio")) == trainer.global_step


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_batch_of_a_window_is_seen(split):
    """Observations equal batches, where the layers can be seen: a filter that fires on the last batch only is alive."""
    seen = []

    class Watcher(DeadFilters):
        def on_train_batch_end(self, trainer, *args):
            self._note(trainer, "train")
            super().on_train_batch_end(trainer, *args)

        def on_validation_batch_end(self, trainer, *args, **kwargs):
            self._note(trainer, "val")
            super().on_validation_batch_end(trainer, *args, **kwargs)

        def _note(self, trainer, phase):
            if phase == split and not trainer.sanity_checking:
                seen.append((self._window.forwards, self._window._liveness._watches["net.0"].forwards))

    with_dead = Net(body(0.0))
    with torch.no_grad():
        with_dead.net[1].weight[0] = with_dead.net[1].bias[0] = 0.0  # never proven alive, so always looked for
    with_dead.net[1].requires_grad_(False)
    said, _ = fit(with_dead, Watcher(split=split, on_error="raise"), max_epochs=1)
    assert said == []
    assert len(seen) == {"train": 4, "val": 2}[split]
    assert [watched for _, watched in seen] == [forwards for forwards, _ in seen]


# ---------------------------------------------------------------------- compiled in mid-run


class Later(Quiet):
    """From a batch of the third epoch on its body runs in compiled code."""

    way, batch_of_change = "module", 0

    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == self.batch_of_change:
            net = self.net
            if self.way == "module":
                net.compile(backend="eager")
            else:  # kept from torch, which would take it for a part of the model
                self.__dict__["function"] = torch.compile(lambda images: net(images), backend="eager")

    def forward(self, images):
        return self.__dict__.get("function", self.net)(images)


class LaterFunction(Later):
    """The same, hidden in a function."""

    way = "function"


def marked(kind, batch=0):
    """A filter that is dead for good in each of two layers, and others that may die of one batch."""
    model = kind()
    model.batch_of_change = batch
    with torch.no_grad():
        model.net[0].bias[1] = model.net[3].bias[2] = -99.0
        model.net[1].eps = 1e9
        model.net[1].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    return model


@pytest.mark.parametrize("kind", [Later, LaterFunction])
@pytest.mark.parametrize(("split", "steps", "batch"), [("train", 2, 0), ("train", 4, 2), ("val", 4, 1)])
def test_what_is_compiled_in_mid_run_is_said_and_counted_over_the_fixed_samples(kind, split, steps, batch):
    """Also where a window has seen a part of its batches."""
    model = marked(kind, batch)
    watcher = DeadFilters(split=split, window_steps=steps, on_error="raise")
    said, trainer = fit(model, watcher, max_epochs=5)
    (message,) = said
    if kind is Later:
        assert message.endswith(
            "The model was compiled during the training: DeadFilters measures in an eager pass over 12 fixed samples "
            "at the end of each window, and is exact over these."
        )
    else:
        assert "DeadFilters no longer sees net.0, net.10, net.3 and 1 more, which a compiled function" in message
    history = Session.of(trainer).history
    _, twin = fit(marked(Quiet), DeadFilters(split=split, window_steps=steps, on_error="raise"), max_epochs=5)
    for layer in ("net.0", "net.3", "net.8"):
        assert history.get("dead_filters", layer).steps == Session.of(twin).history.get("dead_filters", layer).steps
    by_hand = silent_by_hand(model)
    assert [watcher.dead["net.0"], watcher.dead["net.3"]] == by_hand
    assert 1 in by_hand[0]
    assert 2 in by_hand[1]


def silent_by_hand(model):
    """Filters of both layers that are silent on all fixed samples now."""
    images = next(iter(loader(12, seed=1, shuffle=False, noise=0.0, batch=12)))[0]
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        maps = [model.net[:3](images), model.net[:5](images)]
    model.train()
    return [(values.transpose(0, 1).flatten(1) == 0).all(1).nonzero().flatten().tolist() for values in maps]


@pytest.mark.parametrize("kind", [Later, LaterFunction])
def test_window_that_saw_a_part_of_its_batches_is_completed(kind):
    """What fires on the fixed samples is alive, though it was silent on the batch that was seen."""
    model, found = marked(kind, batch=1), {}
    watcher = DeadFilters(split="train", window_steps=4, on_error="raise")

    class Revive(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step in {8, 9}:  # the one batch that is seen finds it dead, all others alive
                with torch.no_grad():
                    pl_module.net[1].bias[0] = -99.0 if trainer.global_step == 8 else 99.0

        def on_train_batch_end(self, trainer, pl_module, *args):
            found[trainer.global_step - 1] = watcher.dead["net.0"], silent_by_hand(pl_module)[0]

    seed_all(1)
    fit(model, watcher, Revive(), max_epochs=3)
    assert found[11] == ([1], [1])


@pytest.mark.parametrize("kind", [Later, LaterFunction])
def test_sparsity_and_patches_say_so_too(kind):
    """Of patches the same are found as in the run that is not compiled."""
    sparsity = ActivationSparsity(every_n_train_steps=1, on_error="raise")
    patches, twin = TopPatches(k=2, on_error="raise"), TopPatches(k=2, on_error="raise")
    seed_all(1)
    said, trainer = fit(kind(), sparsity, patches, max_epochs=5)
    assert sum("ActivationSparsity" in message for message in said) == 1
    assert all("compiled" in message for message in said)
    assert Session.of(trainer).history.get("sparsity", "net.0").steps[-1] == 7  # two epochs of four steps
    assert sum("TopPatches no longer sees net.0, net.10, net.3 and 1 more" in message for message in said) == 1
    seed_all(1)
    fit(Quiet(), twin, max_epochs=5)
    assert patches.top
    assert patches.top == twin.top


class Compiled(Quiet):
    """Nothing but its loss is compiled."""

    def __init__(self):
        super().__init__()
        self.__dict__["scale"] = torch.compile(lambda value: value * 1.0, backend="eager")


class Sometimes(Compiled):
    """Leaves a block out in every other batch, the last one of an epoch included."""

    def training_step(self, batch, batch_idx):
        features = self.net[:3](batch[0])
        if batch_idx % 2 == 0:
            features = self.net[3:](features)
        return self.scale(features.square().mean())


class Skipping(Compiled):
    """Skips the first batch of each epoch, of which a window would see all."""

    def training_step(self, batch, batch_idx):
        loss = None if batch_idx == 0 and self.current_epoch else super().training_step(batch, batch_idx)
        return loss if loss is None else self.scale(loss)


@pytest.mark.parametrize("kind", [Sometimes, Skipping])
def test_a_layer_or_batch_that_is_left_out_is_not_taken_for_a_hidden_one(kind):
    """Though something else was compiled, and is in each step."""
    callbacks = [
        DeadFilters(split="train", window_steps=2, on_error="raise"),
        ActivationSparsity(every_n_train_steps=1, on_error="raise"),
        TopPatches(on_error="raise"),
    ]
    said, trainer = fit(kind(), *callbacks, max_epochs=4)
    assert said == []
    steps = Session.of(trainer).history.get("sparsity", "net.0").steps
    assert steps[-1] == trainer.global_step - 1
    assert Session.of(trainer).history.get("dead_filters", "net.0").steps[-1] == trainer.global_step - 1


@pytest.mark.parametrize("kind", [Later, LaterFunction])
def test_a_run_that_is_compiled_in_mid_run_stays_bit_identical(kind):
    """With everything at once, and with `Interp`."""
    recipe = Recipe(kind.__name__, kind, data={"samples": 15}, trainer={"max_epochs": 4})
    without = run(recipe, [])
    for factory in (WHOLE["often"], WHOLE["Interp"]):
        torch._dynamo.reset()
        assert differences(without, run(recipe, factory())) == []


# ---------------------------------------------------------------------- the mode


class _Own(torch.overrides.BaseTorchFunctionMode):
    """A mode of the user's."""


def test_mode_that_comes_late_stands_where_it_would_have_stood():
    """Whoever leaves takes the topmost off, and must find their own; a default device is at the bottom."""
    ours, before, after = _Own(), _Own(), _Own()
    names = {id(ours): "ours", id(before): "before", id(after): "after"}

    def stack():
        return [names.get(id(mode), "device") for mode in function_stack()]

    with before:
        above = function_stack()
        with torch.device("cpu"), after:
            enter_mode(ours, above)
            assert stack() == ["before", "ours", "device", "after"]
        assert stack() == ["before", "ours"]
        leave_mode(ours)
        try:
            torch.set_default_device("cpu")
            enter_mode(ours, above)
            assert stack() == ["device", "before", "ours"]
        finally:
            torch.set_default_device(None)
            del torch._GLOBAL_DEVICE_CONTEXT.device_context  # torch 2.6 leaves it empty, and stumbles over it later
        assert stack() == ["before", "ours"]
        leave_mode(ours)
    assert stack() == []


def test_user_who_enters_a_mode_for_the_forward_finds_it_again():
    """A default device, and a mode: both end with their block, while ours goes on."""
    left = []

    class Moded(Quiet):
        def forward(self, x):
            own = _Own()
            with torch.device("cpu"), own:
                scores = self.net(x)
            left.append(any(mode is own for mode in function_stack()) or torch.get_default_device().type != "cpu")
            return scores

    watcher = DeadFilters(split="train", on_error="raise")
    _, trainer = fit(Moded(), watcher, TrainingDynamics(dense_steps=100, on_error="raise"), max_epochs=1)
    assert left
    assert not any(left)
    assert watcher.dead
    assert not math.isnan(Session.of(trainer).history.get("step_ratio").points[-1].value)
