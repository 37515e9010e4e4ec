"""A callback that holds others."""

import inspect
import pickle
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn, TrainerState

from lightning_interp.callbacks._family import Family, with_children
from lightning_interp.callbacks._guarding import HOOKS, IN_BATCH
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.callbacks.schedule import BatchHooks
from lightning_interp.errors import AlertRaised, InterpWarning


class TrainerStub:
    """As much of a Trainer as the guard looks at."""

    state = TrainerState(fn=TrainerFn.FITTING)
    accumulate_grad_batches = 1
    callbacks = ()
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    sanity_checking = False
    is_global_zero = True
    world_size = 1


TRAINER = TrainerStub()
CLEANING = ["on_exception", "teardown"]


class Child(InterpCallback):
    """Writes down what it is called with."""

    def __init__(self, name=None, fails=None):
        super().__init__(name=name)
        self.calls = []
        self.fails = fails
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def _noted(hook):
    def call(self, trainer, *args, **kwargs):
        self.calls.append((hook, args))
        if hook == self.fails:
            raise RuntimeError("child")

    call.__name__ = hook
    return call


Noting = type("Noting", (Child,), {hook: _noted(hook) for hook in HOOKS})


class Parent(Family):
    """Writes down when it is called, in the list of its first child."""

    def setup(self, trainer, pl_module, stage):
        self.children[0].calls.append("parent")

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.children[0].calls.append("parent")
        if self.name == "bad":
            raise RuntimeError("parent")


def family(*children, name=None):
    parent = Parent(name=name)
    parent.children = list(children)
    return parent


@pytest.mark.parametrize("hook", sorted(HOOKS - {"setup"}))
def test_each_hook_reaches_each_child_once(hook):
    children = Noting("a"), Noting("b")
    parameters = list(inspect.signature(getattr(pl.Callback, hook)).parameters)[2:]
    arguments = tuple(3 if name == "batch_idx" else name for name in parameters)
    getattr(family(*children), hook)(TRAINER, *arguments)
    assert [[call for call in child.calls if call != "parent"] for child in children] == [[(hook, arguments)]] * 2


class Picky(Noting):
    """Needs the hooks that it is told to."""

    needs, more = (), 0

    def batch_hooks(self, trainer, batch_idx, step, *, stepping):
        self.calls.append((batch_idx, step, stepping))
        if self.needs is None:
            raise RuntimeError("no answer")
        return BatchHooks(self.needs, self.more)


def _a_batch(parent, index=3):
    parent.on_train_batch_start(TRAINER, "module", "batch", index)
    parent.on_before_zero_grad(TRAINER, "module", "optimizer")
    parent.on_before_backward(TRAINER, "module", "loss")
    parent.on_after_backward(TRAINER, "module")
    parent.on_before_optimizer_step(TRAINER, "module", "optimizer")
    parent.on_train_batch_end(TRAINER, "module", "outputs", "batch", index)


def _names(child):
    return [call[0] for call in child.calls if isinstance(call[0], str)]


def test_in_a_batch_a_child_gets_the_hooks_that_it_needs():
    none, some, every = Picky("none"), Picky("some"), Noting("every")
    some.needs = ("on_after_backward", "on_train_batch_end")
    _a_batch(family(none, some, every))
    assert none.calls == [(3, 7, True)]
    assert _names(some) == ["on_after_backward", "on_train_batch_end"]
    assert set(_names(every)) == IN_BATCH


def test_the_children_are_asked_anew_for_each_batch_and_each_fit():
    child = Picky()
    parent = family(child)
    _a_batch(parent)
    child.needs = IN_BATCH
    _a_batch(parent)
    assert set(_names(child)) == IN_BATCH
    child.needs = ()
    _a_batch(parent)
    assert len(_names(child)) == len(IN_BATCH)


def test_an_answer_holds_for_as_many_batches_as_the_child_says_and_no_longer_than_to_the_next_hook():
    child, other = Picky("child"), Picky("other")
    child.more, other.more = 2, 5
    parent = family(child, other)
    for index in range(5):
        _a_batch(parent, index)
    assert [call[0] for call in child.calls] == [0, 3]
    parent.on_validation_start(TRAINER, "module")
    _a_batch(parent, 5)
    assert child.calls[-2:] == [("on_validation_start", ("module",)), (5, 7, True)]
    _a_batch(parent, 0)  # of another epoch, whose start nobody said
    assert child.calls[-1] == (0, 7, True)


def test_an_answer_does_not_hold_longer_for_a_count_of_batches_that_stands():
    """With `training_step(self, dataloader_iter)` the count is the user's, but steps go on."""
    child, trainer = Picky(), TrainerStub()
    child.more = 3
    parent = family(child)
    for step, index in ((7, 0), (9, 1), (10, 1), (11, 2)):
        trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=step))
        parent.on_train_batch_start(trainer, "module", "batch", index)
    assert [call[:2] for call in child.calls] == [(0, 7), (2, 11)]


@pytest.mark.parametrize(
    ("indices", "asked", "awake"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4], [0, 4]),
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 2], [0, 2, 3, 4, 6, 7]),  # the count stands, but the steps go on
        ([0, 2, 4, 6, 8, 10], [0, 4, 8], [0, 2, 4]),  # the user takes two batches a step
    ],
)
def test_while_it_dozes_lightning_finds_no_hook_until_the_answer_holds_no_longer(indices, asked, awake):
    """A Trainer that, like Lightning's, calls what is callable; the child's answer holds for three batches more."""
    child, trainer = Picky(), TrainerStub()
    child.more = 3
    parent = family(child)
    trainer.callbacks = (parent,)
    found = []  # the steps in whose beginning a hook is found
    for step, index in enumerate(indices):
        trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=step))
        found += [step] if callable(parent.on_train_batch_start) else []
        for hook, *args in (("on_train_batch_start", "batch", index), ("on_train_batch_end", None, "batch", index)):
            if callable(getattr(parent, hook)):
                getattr(parent, hook)(trainer, "module", *args)
    assert [call[0] for call in child.calls] == asked
    assert found == awake


def test_a_child_that_answers_in_another_form_gets_all():
    class Old(Picky):
        def batch_hooks(self, trainer, batch_idx, step, *, stepping):
            return ("on_before_backward", "on_after_backward")

    child = Old()
    _a_batch(family(child))
    assert set(_names(child)) == IN_BATCH


def test_a_child_that_gives_no_answer_gets_all():
    child = Picky()
    child.needs = None
    _a_batch(family(child))
    assert set(_names(child)) == IN_BATCH


def test_a_family_in_a_family_passes_on_what_its_children_need():
    inner_child = Picky()
    inner_child.needs = ("on_before_backward",)
    _a_batch(family(family(inner_child)))
    assert _names(inner_child) == ["on_before_backward"]


def test_a_class_with_hooks_of_its_own_needs_them_whatever_its_parent_says():
    class Heir(Picky):
        def on_after_backward(self, trainer, pl_module):
            self.calls.append(("heir", ()))

    child = Heir()
    _a_batch(family(child))
    assert "heir" in _names(child)


def test_the_family_goes_first_in_setup_and_last_elsewhere():
    child = Noting()
    parent = family(child)
    parent.setup(TRAINER, "module", "fit")
    parent.on_train_end(TRAINER, "module")
    assert child.calls == ["parent", ("setup", ("module", "fit")), ("on_train_end", ("module",)), "parent"]


def test_children_that_the_family_makes_in_setup_are_set_up_and_those_that_it_drops_are_not():
    class Maker(Family):
        def setup(self, trainer, pl_module, stage):
            self.children = [made]

    made, dropped = Noting("made"), Noting("dropped")
    maker = Maker()
    maker.children = [dropped]
    maker.setup(TRAINER, "module", "fit")
    assert made.calls == [("setup", ("module", "fit"))]
    assert dropped.calls == []


def test_a_child_that_fails_rests_and_the_others_go_on():
    bad, good = Noting("bad", fails="on_train_start"), Noting("good")
    parent = family(bad, good)
    with pytest.warns(InterpWarning, match="Noting failed in on_train_start"):
        parent.on_train_start(TRAINER, "module")
    parent.on_train_end(TRAINER, "module")
    assert (bad.resting, good.resting, parent.resting) == (True, False, False)
    assert [call[0] for call in good.calls] == ["on_train_start", "on_train_end"]


def test_a_family_that_rests_still_serves_its_children():
    child = Noting()
    parent = family(child, name="bad")
    with pytest.warns(InterpWarning, match="Parent failed in on_train_end"):
        parent.on_train_end(TRAINER, "module")
    parent.on_train_start(TRAINER, "module")
    assert parent.resting
    assert child.calls[-1] == ("on_train_start", ("module",))


@pytest.mark.parametrize("hook", CLEANING)
def test_cleaning_reaches_all_even_if_one_raises(hook):
    def stop(*args):
        raise AlertRaised("stop")

    first, second = Noting("first"), Noting("second")
    setattr(first, hook, stop)
    with pytest.raises(AlertRaised):
        getattr(family(first, second), hook)(TRAINER, "module", "fit")
    assert second.calls == [(hook, ("module", "fit"))]


def test_states_are_kept_by_child():
    parent = family(Noting("a"), Noting("b"))
    parent.children[0].count, parent.children[1].count = 3, 4
    other = family(Noting("b"), Noting("new"), Noting("a"))
    other.load_state_dict(parent.state_dict())
    assert [child.count for child in other.children] == [4, 0, 3]


def test_a_child_without_a_sound_state_does_not_stop_the_checkpoint():
    parent = family(Noting("a"), Noting("b"))
    parent.children[0].state_dict = lambda: 1 / 0
    with pytest.warns(InterpWarning, match="state_dict"):
        assert list(parent.state_dict()) == ["Noting[b]", "schema"]
    with pytest.warns(InterpWarning, match="load_state_dict"):
        parent.load_state_dict({"Noting[b]": {}})


def test_families_in_families_are_found():
    inner = family(Noting("leaf"))
    outer = family(inner)
    found = list(with_children([pl.Callback(), outer]))
    assert found[1:] == [outer, inner, inner.children[0]]


def test_a_family_can_be_pickled():
    assert pickle.loads(pickle.dumps(Family(name="x"))).name == "x"
