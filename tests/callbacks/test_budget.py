"""What `Interp(budget=...)` leaves out, by a clock whose times are made up: nothing here is timed."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_interp import Interp, TopPatches
from lightning_interp.callbacks._budget import Account, affordable
from lightning_interp.callbacks._excited import Excited
from lightning_interp.callbacks.base import InterpCallback
from lightning_interp.callbacks.observer import Observer
from lightning_interp.functional import tracing
from tests.callbacks.budget_kit import STEPS, Clock, Sampler, Slow, fit, interp, use
from tests.callbacks.two_ranks import run_two_ranks
from tests.contract.battery import Recipe, assert_undisturbed, fit_quietly
from tests.contract.nets import Capture, Net, Stream, body, loader, pl, quiet_trainer, seed_all

# An epoch takes 100 made-up seconds: `Slow` has four steps of 25.
pytestmark = pytest.mark.filterwarnings(  # Lightning's own, which say nothing here
    "ignore:You defined a `validation_step` but have no",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:.*does not have many workers",
    "ignore:Be aware that when using `ckpt_path`",
)
amounts = st.floats(0, 1e4)
books = st.lists(st.builds(Account, spent=amounts, price=amounts), min_size=1, max_size=6)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    use(clock, monkeypatch)
    return clock


def share_of(log):
    """The last share that was logged."""
    return [row["interp.cost/share"] for _, row in log.rows if "interp.cost/share" in row][-1]


def said(caplog):
    """Level and message of our own lines."""
    return [(each.levelno, each.message) for each in caplog.records if each.name == "lightning_interp"]


def epochs_of(sampler, steps=STEPS):
    """Numbers, from 1, of the epochs at whose end it was shown; without the start."""
    return [(step + 1) // steps for step in sampler.steps[1:]]


# ---------------------------------------------------------------------- arithmetic


@given(books, st.floats(0, 1e5))
def test_what_is_affordable_keeps_within_the_seconds(accounts, seconds):
    """If all that may are shown, and each of all is shown once more at the end, the seconds are kept."""
    named = dict(enumerate(accounts))
    chosen = affordable(named, seconds)
    planned = sum(account.high if key in chosen else account.low for key, account in named.items())
    assert not chosen or planned <= seconds * (1 + 1e-6)


@given(books, st.floats(0, 1e5))
def test_whoever_will_have_had_less_goes_first(accounts, seconds):
    named = dict(enumerate(accounts))
    chosen = affordable(named, seconds)
    most = max((named[key].high for key in chosen), default=-1.0)
    assert chosen == {key for key, account in named.items() if account.high <= most}


@given(books, st.floats(0, 1e5))
def test_an_equal_share_is_never_refused(accounts, seconds):
    """Whatever the others have, as long as they have not spent more than their own shares."""
    share = seconds / len(accounts)
    if all(account.low <= share for account in accounts):
        named = dict(enumerate(accounts))
        assert {key for key, account in named.items() if account.high <= share} <= affordable(named, seconds)


# ---------------------------------------------------------------------- a run


def test_spacing_keeps_the_budget(clock):
    """10 s an event, 5 s of budget an epoch: every second epoch, once what was shown first is paid for."""
    sampler = Sampler("a", clock, 10.0)
    log = fit(interp(0.05, sampler), Slow(clock), 20)
    # The start, the first epoch and the end are 30 s, which are there after 6 epochs; then 10 s take 2 each.
    assert sampler.steps[0] == 0
    assert epochs_of(sampler) == [1, 8, 10, 12, 14, 16, 18, 20]
    assert share_of(log) == pytest.approx(90 / 2000)  # below 0.05


def test_cheap_ones_come_first_and_dear_ones_come_too(clock):
    """The cheap one would take a fifth of the budget, the dear one eight times all of it."""
    cheap, dear = Sampler("cheap", clock, 1.0), Sampler("dear", clock, 40.0)
    log = fit(interp(0.05, dear, cheap), Slow(clock, 100.0), 80, limit_train_batches=1)
    assert share_of(log) <= 0.05
    late = [step for step in cheap.steps if step >= 30]
    assert late == list(range(30, 80)), "each time, once the dear one's first times are paid for"
    assert len(dear.steps) >= 6
    assert sum(sampler.takes * len(sampler.steps) for sampler in (cheap, dear)) == pytest.approx(share_of(log) * 8000)


def test_two_dear_ones_get_as_much(clock):
    """In seconds, not in times."""
    one, other = Sampler("one", clock, 20.0), Sampler("other", clock, 40.0)
    fit(interp(0.05, one, other), Slow(clock, 100.0), 120, limit_train_batches=1)
    spent = [sampler.takes * len(sampler.steps) for sampler in (one, other)]
    assert abs(spent[0] - spent[1]) <= 40.0
    assert min(spent) >= 200.0


def test_nothing_is_left_out_where_there_is_enough(clock, caplog):
    sampler = Sampler("a", clock, 1.0)
    with caplog.at_level(logging.INFO, "lightning_interp"):
        fit(interp(0.1, sampler), Slow(clock), 6)
    assert epochs_of(sampler) == [1, 2, 3, 4, 5, 6]
    assert [level for level, _ in said(caplog)] == [logging.INFO]


def test_without_a_budget_nothing_is_left_out_and_nothing_said(clock, caplog):
    sampler = Sampler("a", clock, 1000.0)
    with caplog.at_level(logging.INFO, "lightning_interp"):
        log = fit(interp(None, sampler), Slow(clock), 3)
    assert epochs_of(sampler) == [1, 2, 3]
    assert said(caplog) == []
    assert not any("interp.cost/share" in row for _, row in log.rows)


@pytest.mark.parametrize("options", [{}, {"max_steps": 30}])
def test_first_and_last_are_shown_whatever_they_cost(clock, options):
    """Also where the end comes in the middle of an epoch."""
    sampler = Sampler("a", clock, 1e6)
    fit(interp(0.01, sampler), Slow(clock), 10, **options)
    assert sampler.steps == [0, 3, options.get("max_steps", 40) - 1]


def test_steps_are_left_out_too_and_the_first_that_is_due_is_not(clock):
    sampler = Sampler("a", clock, 10.0, every_n_train_steps=2)
    fit(interp(0.1, sampler), Slow(clock), 10)
    assert sampler.steps[:2] == [0, 1]
    assert sampler.steps[-1] == 39
    assert len(sampler.steps) < 11


def test_only_the_samplers_pay_for_what_the_rest_takes(clock):
    """What is always on takes all of the budget: the samplers are shown at the start and at the end."""

    class Always(InterpCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clock.now += 5.0

    always, sampler = Always(), Sampler("a", clock, 1.0)
    log = fit(interp(0.05, always, sampler), Slow(clock), 10)
    assert epochs_of(sampler) == [1, 10]
    assert share_of(log) == pytest.approx((200 + 3) / 1000)


def test_pictures_of_filters_are_left_out_and_dead_filters_are_not(clock):
    """The numbers of both are the same as without a budget; the last pictures are there."""

    def run(budget):
        seed_all(3)
        callback = interp(budget, Sampler("a", clock, 1e6), measuring=True)
        log = fit(callback, Slow(clock), 6, val=True)
        return log.of_interp(), callback.children[0].state_dict()["lifelines"]

    (free, alive), (kept, alive_too) = run(None), run(1e-9)
    assert kept.keys() == free.keys()
    assert len(free["interp/dead_filters"]) == 7
    assert kept == free
    assert alive_too == alive


def test_filter_grid_draws_less_often(clock, monkeypatch):
    callback = interp(1e-9, Sampler("a", clock, 1e6), measuring=True)
    drawn = []
    grid = next(child for child in callback.children if type(child).__name__ == "FilterGrid")
    monkeypatch.setattr(grid, "log_pictures", lambda trainer, quantity, pictures, *, step: drawn.append(step))
    # Made-up seconds: the clock stands still while it draws, so it is the sampler's account that must be empty.
    monkeypatch.setattr(type(grid), "_log_numbers", lambda self, trainer, *, step: setattr(clock, "now", clock.now + 9))
    fit(callback, Slow(clock), 6, max_steps=22)
    assert drawn == [0, 3, 21]


@pytest.mark.parametrize(("epochs", "checked", "shown"), [(1, 0.25, [0, 3]), (6, 1.0, [3, 23])])
def test_what_watches_the_validation_is_left_out_as_a_whole_run(clock, monkeypatch, epochs, checked, shown):
    """The first one, and the last one of the last planned epoch; the others are not even read."""
    patches, steps, reads = TopPatches(on_error="raise"), [], []

    def show(self, trainer, pl_module, rankings, excited, *, step):
        clock.now += 500.0
        steps.append(step)

    def begin_batch(self, count):
        reads.append(count)
        clock.now += 100.0

    monkeypatch.setattr(TopPatches, "_show", show)
    monkeypatch.setattr(Excited, "begin_batch", begin_batch)
    monkeypatch.setattr(Excited, "end_batch", lambda *_: None)
    monkeypatch.setattr(TopPatches, "_hidden", lambda *_: (set(), ""))
    callback = interp(0.05, patches)
    fit(callback, Slow(clock), epochs, val=True, val_check_interval=checked)
    assert steps == shown
    assert len(reads) == 2 * 2
    account = callback._budget.accounts["TopPatches"]
    assert (account.due, account.shown) == (4 if epochs == 1 else 6, 2)
    assert account.price == pytest.approx(700.0, rel=1e-3)


# ---------------------------------------------------------------------- what it says


def test_says_once_what_it_leaves_out_and_sums_up(clock, caplog):
    sampler, cheap = Sampler("a", clock, 10.0), Sampler("b", clock, 0.01)
    with caplog.at_level(logging.WARNING, "lightning_interp"):
        fit(interp(0.05, sampler, cheap), Slow(clock), 9)
    (_, first), (_, last) = said(caplog)
    assert re.search(
        r"keeps to 5 % of the training time \(10 % so far\): from step 8 on.*Sampler\[a\] \(10 s each", first
    )
    assert "it took 3.3 % (30 s), of which 0 %" in last
    # The second one costs next to nothing, but there was nothing until the first one's were paid for.
    assert "Sampler[a] shown 2 of 9 times; Sampler[b] shown 4 of 9 times" in last


# ---------------------------------------------------------------------- resume


def test_resumed_run_goes_on_as_if_never_stopped(clock, tmp_path):
    """Times, accounts and what was said."""

    def samplers():
        return Sampler("a", clock, 10.0), Sampler("b", clock, 3.0)

    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole = samplers()
    fit(interp(0.05, *whole), Slow(clock), 20, callbacks=[saver], enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=8.ckpt", weights_only=True)["callbacks"]["Interp"]
    assert json.loads(json.dumps(state["budget"])) == state["budget"]

    clock.now = 12345.0
    rest = samplers()
    callback = interp(0.05, *rest)
    fit(callback, Slow(clock), 20, ckpt_path=tmp_path / "epoch=8.ckpt")
    assert [sampler.steps for sampler in rest] == [[s for s in sampler.steps if s >= 36] for sampler in whole]
    assert callback._budget.trained == pytest.approx(2000)
    assert callback._budget.spent == pytest.approx(sum(s.takes * len(s.steps) for s in whole))


def test_a_second_fit_begins_anew(clock):
    sampler = Sampler("a", clock, 10.0)
    callback = interp(0.05, sampler)
    fit(callback, Slow(clock), 9)
    first, sampler.steps = sampler.steps, []
    fit(callback, Slow(clock), 9)
    assert sampler.steps == first


# ---------------------------------------------------------------------- kinds of runs


@pytest.mark.parametrize("level", ["standard", "full"])
def test_training_stays_bit_identical(level):
    """With all that can be left out."""

    def make():
        callback = Interp(level, budget=1e-6, on_error="raise")
        for child in callback.children:
            child.steps = 3 if hasattr(child, "class_indices") else getattr(child, "steps", None)
        return [callback]

    assert_undisturbed(make, Recipe("plain", trainer={"max_epochs": 4}))


def test_endless_loader(clock):
    """Steps instead of epochs; costs are logged though no epoch ends."""
    sampler = Sampler("a", clock, 1000.0, every_n_train_steps=2)
    train = DataLoader(Stream(endless=True), batch_size=6)
    log = fit(interp(0.01, sampler, measuring=True), Slow(clock), -1, train=train, max_steps=9)
    assert sampler.steps == [0, 1, 8]
    assert share_of(log) == pytest.approx(3000 / 225, rel=1e-3)
    assert {"interp.cost/DeadFilters", "interp.cost/FilterGrid"} <= {tag for _, row in log.rows for tag in row}


@pytest.mark.parametrize("options", [{"fast_dev_run": 2}, {"max_epochs": 0}, {"limit_train_batches": 0}])
def test_runs_that_hardly_run(options):
    trainer = quiet_trainer(callbacks=[Interp("full", budget=0.02, on_error="raise")], **options)
    trainer.fit(Net(), loader(), loader(12, seed=1, shuffle=False))
    assert trainer.global_step == (2 if "fast_dev_run" in options else 0)


@pytest.mark.slow
def test_rank_zero_decides_for_all(tmp_path):
    """The clocks of the two ranks differ a hundredfold; samplers on which the ranks meet, and one that fails."""
    results = run_two_ranks("ddp_budget.py", tmp_path)
    for result in results:
        assert result["steps"] == results[0]["steps"]
        assert result["after_failure"] == results[0]["after_failure"]
    assert [(step + 1) // 4 for step in results[0]["steps"] if step] == [1, 8, 10, 12, 14, 16, 18, 20]
    assert results[0]["after_failure"][-1] == 39
    assert 2 < len(results[0]["after_failure"]) < 11


# ---------------------------------------------------------------------- costs


def test_cost_holds_the_event_that_is_logged_and_what_families_hold(clock):
    sampler = Sampler("a", clock, 7.0)
    log = fit(interp(None, sampler), Slow(clock), 2)
    assert [row["interp.cost.a/Sampler"] for _, row in log.rows if "interp.cost.a/Sampler" in row] == [7, 14, 21]


def costs_of(log, before):
    """The callbacks that have said what they cost before this step."""
    tags = {tag for step, row in log.rows if step < before for tag in row if tag.startswith("interp.cost/")}
    return {tag.removeprefix("interp.cost/") for tag in tags}


@pytest.mark.parametrize("level", ["standard", "full"])
def test_every_callback_of_a_run_says_what_it_cost(level):
    log, callback = Capture(), Interp(level, on_error="raise")
    for child in callback.children:
        child.steps = 3
    quiet_trainer(callbacks=[callback], logger=log, max_epochs=1).fit(Net(), loader())
    assert costs_of(log, 4) == {type(child).__name__ for child in callback.children}


def test_costs_are_said_before_an_endless_epoch_ends():
    """By all that has anything to show of a stream by then."""
    log, callback = Capture(), Interp(on_error="raise")
    trainer = quiet_trainer(callbacks=[callback], logger=log, max_epochs=-1, max_steps=25)
    fit_quietly(trainer, Net(), DataLoader(Stream(endless=True), batch_size=6))
    assert costs_of(log, 24) == {type(child).__name__ for child in callback.children} - {"EmbeddingProjection"}


def test_seconds_inside_the_forward_are_shared_among_the_readers(monkeypatch):
    """Three a reading, by a clock that only readers move."""
    clock, seen, counted = Clock(), [], {"one": 0.0, "other": 0.0}
    monkeypatch.setattr(tracing, "time", SimpleNamespace(perf_counter=clock))
    model = body().eval()
    observer = Observer(model)

    def read(end):
        seen.append(end.unit)
        clock.now += 3.0

    def reader(name):
        def count(seconds):
            counted[name] += seconds

        return count

    def other(end):
        read(end)

    observer.open(read, count=reader("one"))
    observer.open(other, count=reader("other"))
    model(torch.zeros(2, 1, 8, 8))
    observer.close_reader(read)
    observer.close_reader(other)
    assert len(seen) >= 6
    assert counted == {"one": 1.5 * len(seen), "other": 1.5 * len(seen)}
