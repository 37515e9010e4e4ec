"""Weights split over processes: what works does so without changing anything; the rest is refused by name."""

import logging
import re

import pytest
import pytorch_lightning as pl
import torch

from lightning_interp import ArgumentError, Interp
from lightning_interp.callbacks._family import with_children
from tests.contract.factories import CLASSES, WHOLE
from tests.contract.nets import NAMESPACES, kit, loader
from tests.contract.test_ddp import run_together

STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")
WORKING = {"DeadFilters", "ActivationSparsity", "TrainingDynamics", "Alerts", "Interp"}
ALONE = [cls for cls in CLASSES if cls.__name__ not in WORKING]


def pretend(namespace, name, *, derived=False):
    """A Trainer with a strategy of that name on one process: all that a refusal may look at."""
    classes = kit(namespace)
    made = type(name, (classes.pl.strategies.SingleDeviceStrategy,), {})
    made = type("OurOwn", (made,), {}) if derived else made
    return lambda callbacks: classes.trainer(callbacks=callbacks, strategy=made("cpu")), classes.Net()


@pytest.mark.parametrize("cls", ALONE, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_one_rank_does_alone_is_refused_by_name(strategy, cls):
    """Before anything runs, with a way out."""
    trainer, model = pretend(NAMESPACES[0], strategy)
    message = rf"{cls.__name__} .* on one rank, which {strategy} does not allow\. .*strategy=\"ddp\""
    with pytest.raises(ArgumentError, match=message):
        trainer([cls()]).fit(model, loader())
    assert model.diary == []


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("derived", [False, True])
def test_interp_leaves_out_what_it_must_and_names_it(derived, namespace, caplog):
    """Those inside `Alerts` too; also with a strategy that the user has derived."""
    trainer, model = pretend(namespace, "FSDPStrategy", derived=derived)
    interp = Interp("full", on_error="raise")
    before = {type(child).__name__ for child in interp.children}
    with caplog.at_level(logging.WARNING, logger="lightning_interp"), pytest.warns(match="The weights are split"):
        trainer([interp]).fit(model, loader(), loader(12, seed=1, shuffle=False))
    kept = {type(child).__name__ for child in with_children([interp])}
    assert kept == WORKING
    (said,) = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    named = set(re.search(r"leaves out (.*)\.", said)[1].split(", "))
    assert named == before - WORKING == {cls.__name__ for cls in ALONE}


def test_known_strategies_that_split_weights_are_recognised():
    """The names that Lightning has now."""
    from lightning_interp.callbacks._ranks import is_sharded

    for name in dir(pl.strategies):
        strategy = getattr(pl.strategies, name)
        if isinstance(strategy, type) and not getattr(strategy, "__abstractmethods__", None):
            trainer = type("Trainer", (), {"strategy": strategy.__new__(strategy)})
            assert is_sharded(trainer) is (name in STRATEGIES), name


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The scenarios on two processes, with `fully_shard`, which also works on a CPU."""
    names = ["sharded_watching", "sharded_Interp", "sharded_counts"]
    return run_together(tmp_path_factory.mktemp("sharded"), names)


needs_sharding = pytest.mark.skipif(
    not hasattr(torch.distributed, "fsdp") or not hasattr(torch.distributed.fsdp, "fully_shard"),
    reason="this torch has no `fully_shard`",
)


@pytest.mark.slow
@needs_sharding
@pytest.mark.parametrize("name", ["sharded_watching", "sharded_Interp"])
def test_callbacks_leave_sharded_processes_bit_identical(name, sharded):
    """The part of the weights and of the optimizer that each rank holds, generators, and the user's metrics."""
    for result in sharded[name]:
        assert "error" not in result, result["error"]
        assert result["sharded"]
        assert result["differences"] == []
        assert {message.split(":")[0] for message in result["said"]} == {"The weights are split over processes"}


@pytest.mark.slow
@needs_sharding
def test_dead_filters_of_sharded_weights_are_those_of_the_union(sharded):
    """Filters 0 and 1 fire on one rank each, 2 never, 3 always."""
    for result in sharded["sharded_counts"]:
        assert "error" not in result, result["error"]
        assert result["dead"] == [2]
        assert result["sparsity"] is not None


def test_all_callbacks_are_either_refused_or_known_to_work():
    """A new one must be put on one of the lists."""
    assert {type(callback).__name__ for callback in WHOLE["often"]()} <= WORKING | {cls.__name__ for cls in ALONE}
    assert all(cls.works_alone is (cls in ALONE) for cls in CLASSES)
