"""The benchmark of what watching costs: whatever is measured has output, and the arithmetic of its tables."""

import argparse
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import attribution
from benchmarks.overhead import __main__ as command
from benchmarks.overhead import fits, goals, gpu_fits, machine, ours, peers, start, steps, table, timing, tools, turns
from benchmarks.overhead.direct import listening
from benchmarks.overhead.models import CASES, Case, kill, runnable
from benchmarks.overhead.watch import NothingMeasuredError, UnavailableError, Watch, finite, load, require
from lightning_interp import Interp


def tiny():
    """Ten filters, so that three of them are 30 %."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 10, 3, padding=1),
        nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10),
    )  # fmt: skip


TINY = Case("tiny", tiny, (3, 8, 8), 4, "small")
BUDGET = steps.Budget(steps=2, seconds=60.0)
INSTALLED = [*ours.watches(), peers.FiredCounts, peers.WeightHistograms]


class Ticks:
    """A clock that only we move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(process_time=lambda: self.now))

    def work(self, seconds):
        """Takes so long."""
        self.now += seconds


# ---------------------------------------------------------------------- times


def test_pairs_are_compared_one_by_one_and_not_by_their_medians():
    """The machine is slower in the second pair, for both."""
    pairs = timing.Pairs([1.0, 10.0, 1.0], [1.1, 12.0, 1.3])
    assert pairs.ratios == pytest.approx([1.1, 1.2, 1.3])
    assert pairs.ratio == pytest.approx(1.2)
    assert pairs.quartiles == pytest.approx((1.15, 1.25))
    assert (pairs.median_plain, pairs.median_other) == (1.0, 1.3)
    assert timing.Pairs([2.0], [3.0]).quartiles == (1.5, 1.5)


def test_turns_begin_with_each_of_the_two_every_other_time():
    calls = []

    def call(name):
        calls.append(name)
        return 1.0 if name == "plain" else 2.0

    pairs = timing.take_turns(lambda: call("plain"), lambda: call("other"), most=3)
    assert calls == ["plain", "other", "other", "plain", "plain", "other"]
    assert (pairs.plain, pairs.other) == ([1.0] * 3, [2.0] * 3)


@pytest.mark.parametrize(("most", "least", "seconds", "expected"), [(9, 1, 5.0, 2), (9, 4, 5.0, 4), (2, 4, 99.0, 2)])
def test_turns_end_when_the_time_is_up_but_not_before_the_fewest(most, least, seconds, expected):
    pairs = timing.take_turns(lambda: 1.0, lambda: 2.0, most=most, least=least, seconds=seconds)
    assert len(pairs.plain) == expected


def test_stopwatch_counts_the_outermost_of_nested_calls_once(monkeypatch):
    clock = Ticks(monkeypatch)
    watch = timing.Stopwatch()
    inner = watch.wrap(lambda: clock.work(2.0))

    def outer():
        clock.work(1.0)
        inner()

    watch.wrap(outer)()
    inner()
    clock.work(50.0)
    assert watch.take() == 5.0
    assert watch.take() == 0.0


def test_stopwatch_counts_a_call_that_raises_and_goes_on(monkeypatch):
    clock = Ticks(monkeypatch)
    watch = timing.Stopwatch()

    def fail():
        clock.work(1.0)
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            watch.wrap(fail)()
    assert watch.take() == 2.0


def test_stopwatch_takes_off_what_its_clock_costs(monkeypatch):
    """Each look at the clock takes a second."""
    clock = Ticks(monkeypatch)

    def look():
        clock.work(1.0)
        return clock.now

    monkeypatch.setattr(timing, "time", SimpleNamespace(process_time=look))
    watch = timing.Stopwatch()
    watch.wrap(lambda: clock.work(3.0))()
    assert watch.take() == 3.0


def test_hooks_are_counted_wherever_they_run_and_only_those_put_on_meanwhile(monkeypatch):
    clock = Ticks(monkeypatch)
    layer, watch = nn.Linear(2, 2), timing.Stopwatch()
    layer.register_forward_hook(lambda *_: clock.work(100.0))
    with listening(watch):
        layer.register_forward_pre_hook(lambda *_: clock.work(1.0))
        layer.register_forward_hook(lambda *_: clock.work(2.0))
        layer.weight.register_hook(lambda *_: clock.work(4.0))
    layer.register_forward_hook(lambda *_: clock.work(100.0))
    layer(torch.ones(1, 2)).sum().backward()
    assert watch.take() == 7.0


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("make", INSTALLED)
def test_each_watch_measures_something_and_takes_time(make):
    cost = steps.measure(TINY, make(), BUDGET)
    assert len(cost.pairs.plain) == len(cost.pairs.other) == len(cost.direct.other) == 2
    assert cost.pairs.ratio > 0
    assert cost.share >= 0


def test_share_is_the_time_in_methods_and_hooks_over_that_of_a_bare_step(monkeypatch):
    """A forward takes ten seconds, a hook on it two and the method after the step one."""
    clock = Ticks(monkeypatch)

    class Slow(nn.Linear):
        def forward(self, images):
            clock.work(10.0)
            return super().forward(images.flatten(1))

    class Known(Watch):
        def attach(self, model, optimizer, folder):
            model.register_forward_hook(lambda *_: clock.work(2.0))

        def after_step(self, loss):
            clock.work(1.0)

    cost = steps.measure(Case("slow", lambda: Slow(12, 10), (3, 2, 2), 2, "small"), Known(), BUDGET)
    assert cost.pairs == timing.Pairs([10.0, 10.0], [13.0, 13.0])
    assert cost.direct.other == [3.0, 3.0]
    assert cost.share == 0.3


@pytest.mark.parametrize(
    ("make", "method"),
    [*((make, "before_forward") for make in ours.watches()[:4]), (ours.Dynamics, "after_step"),
     (peers.WeightHistograms, "after_step")],
)  # fmt: skip
def test_watch_that_silently_broke_is_caught(make, method):
    watch = make()
    setattr(watch, method, lambda *_: None)
    with pytest.raises(NothingMeasuredError, match="has measured nothing"):
        steps.measure(TINY, watch, BUDGET)


def test_hook_that_silently_broke_is_caught(monkeypatch):
    monkeypatch.setattr(peers.FiredCounts, "_hook", lambda self, name: lambda *_: None)
    with pytest.raises(NothingMeasuredError, match="by hand"):
        steps.measure(TINY, peers.FiredCounts(), BUDGET)


def test_dead_filters_that_are_not_those_of_the_model_are_caught():
    watch = ours.DeadFilters("later", dead=0.3)
    stepper = steps.Stepper(TINY, Watch())
    watch.attach(stepper.model, stepper.optimizer, None)
    watch.before_forward()
    stepper.model(torch.randn(4, 3, 8, 8))
    watch.before_backward(None)
    with pytest.raises(NothingMeasuredError, match="with 0 of 10 filters of '0' silent"):
        watch.check()


def test_killed_filters_stay_dead_over_a_step():
    """The learning rate is zero."""
    stepper = steps.Stepper(TINY, ours.DeadFilters("x", dead=0.3))
    before = [weight.clone() for weight in stepper.model.parameters()]
    watch = stepper._watch
    watch.attach(stepper.model, stepper.optimizer, None)
    for _ in range(2):
        assert stepper.run() >= 0
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.model.parameters(), strict=True))
    assert [int((layer.weight == 0).sum()) for layer in stepper.model if isinstance(layer, nn.BatchNorm2d)] == [3, 3]


def test_killing_without_normalisation_acts_on_the_convolutions_and_no_other_filter_is_dead():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU())
    nn.init.constant_(model[0].weight, -0.1)
    nn.init.constant_(model[0].bias, -1.0)
    kill(model, 0.5)
    fires = (model(1 + torch.rand(2, 1, 3, 3)) > 0).transpose(0, 1).flatten(1).any(dim=1)
    assert fires.tolist() == [False, False, True, True]


class Absent(Watch):
    """A tool that is not installed."""

    name = "absent tool"

    def attach(self, model, optimizer, folder):
        load("no_such_package_at_all.hook")


class Broken(Watch):
    """A tool that raises."""

    name = "broken tool"

    def after_step(self, loss):
        raise ValueError("no such | thing")


def test_missing_and_broken_tools_are_named_and_the_others_go_on():
    lines = list(steps.rows([TINY], [Absent, Broken, peers.FiredCounts], BUDGET))
    assert [problem for _, problem in lines] == ["missing", "failed", ""]
    assert lines[0][0][:3] == ["tiny", "absent tool", "not installed"]
    assert lines[1][0][:3] == ["tiny", "broken tool", "failed: ValueError: no such | thing"]
    assert all(len(line) == len(steps.HEAD) for line, _ in lines)


def test_tool_that_does_not_import_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "sulky_tool.py").write_text("raise AttributeError('torch has no foo')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnavailableError, match=r"does not import with torch .*AttributeError: torch has no foo"):
        load("sulky_tool")
    assert "sulky_tool" not in sys.modules


def test_goals_stand_beside_our_watches_and_the_two_samplers_share_one():
    lines = [line for line, _ in steps.rows([TINY], ours.watches(), BUDGET)]
    assert [line[1] for line in lines] == [
        "DeadFilters, first batch of a window", "DeadFilters, later in it, no filter dead",
        "DeadFilters, later in it, 30 % dead", "ActivationSparsity, a sampled batch",
        "TrainingDynamics, a probed step", f"both: {goals.SAMPLING}",
    ]  # fmt: skip
    assert [line[-1].partition(":")[0] for line in lines] == ["<= 5 %", "<= 0.5 %", "<= 3 %", "", "", "<= 1 %"]
    assert [line[2] for line in lines[3:5]] == ["1 step in 50", "1 step in 200"]


def test_share_of_all_steps_is_that_of_the_sampled_ones_over_how_rare_they_are():
    sampled = steps.StepCost(timing.Pairs([1.0], [1.5]), timing.Pairs([1.0], [0.5]))
    probed = steps.StepCost(timing.Pairs([1.0], [2.0]), timing.Pairs([1.0], [1.0]))
    line = steps._sampling(TINY, {ours.Sparsity.name: sampled, ours.Dynamics.name: probed})
    assert line[-2:] == ["1.5 %", "<= 1 %: **not met**"]  # 50 % in 50 and 100 % in 200


def test_resnet_goals_are_tighter_than_those_of_the_small_network():
    assert goals.of_step(f"DeadFilters, {ours.NONE_DEAD}", "resnet").limit == 0.0005
    assert goals.of_step(f"DeadFilters, {ours.NONE_DEAD}", "small").limit == 0.005
    assert goals.of_step("fastai ActivationStats", "resnet") is None


def test_networks_of_a_gpu_are_left_out_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(case.device == "cpu" for case in runnable())
    assert [case.name for case in runnable("32x32")] == ["resnet18, 32x32, batch 64"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runnable() == list(CASES)


# ---------------------------------------------------------------------- tables


def test_verdicts_at_the_limit_above_it_and_of_nothing():
    assert goals.percent(0.05).verdict(0.05) == "<= 5 %: met"
    assert goals.percent(0.05).verdict(0.0501) == "<= 5 %: **not met**"
    assert goals.percent(0.05).verdict(float("nan")) == "<= 5 %: **not met**"
    assert goals.OCCLUSION.verdict(3.0) == "3 times as fast: met"
    assert goals.OCCLUSION.verdict(2.9) == "3 times as fast: **not met**"


def test_table_is_markdown_whatever_a_cell_holds():
    text = table.markdown("T", ["a", "b"], [["x | y", "two\nlines"]])
    assert text == "### T\n\n| a | b |\n|---|---|\n| x \\| y | two lines |"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123, "12 %"), (0.0234, "2.3 %"), (0.0005, "0.050 %"), (0.00005, "0.0050 %"), (0.0, "0 %"), (3.28, "328 %")],
)
def test_shares_have_two_significant_figures(value, shown):
    assert table.share(value) == shown


def test_durations_are_in_their_own_unit():
    assert [table.duration(value) for value in (2.5, 0.0123, 8.1e-6)] == ["2.50 s", "12.3 ms", "8.1 us"]
    assert table.ratio(timing.Pairs([1.0, 1.0, 1.0], [1.0, 1.1, 1.3])) == "1.10 (1.05-1.20)"


def test_machine_says_versions_and_what_differs_from_the_pinned_ones(monkeypatch):
    assert f"torch {machine.version('torch')}" in machine.describe()
    assert set(machine.TOOLS) <= machine.pinned().keys()
    monkeypatch.setattr(machine, "pinned", lambda: {"torch": "0.1"})
    assert machine.version("torch").endswith("(not 0.1 as in peers.txt)")
    assert machine.version("no-such-package-at-all") == "(not installed)"


# ---------------------------------------------------------------------- fits


def test_trainings_take_turns_and_only_their_own_time_counts(monkeypatch):
    clock, order = Ticks(monkeypatch), []
    monkeypatch.setattr(turns, "time", timing.time)

    def training(me, seconds):
        def run(turn):
            clock.work(0.5)
            for batch in range(6):
                turn.on_train_batch_start(None, None, None, batch)
                order.append(me)
                clock.work(seconds)

        return run

    found = turns.run_in_turns([(training(0, 1.0), 2), (training(1, 2.0), 3)])
    assert order == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert found.seconds == [6.5, 12.5]
    assert found.before == [0.5, 0.5]


def test_training_that_fails_is_reported_and_the_other_one_ends():
    done = []

    def fails(turn):
        turn.on_train_batch_start(None, None, None, 0)
        raise KeyError("broken")

    def ends(turn):
        for batch in range(3):
            turn.on_train_batch_start(None, None, None, batch)
        done.append(True)

    threads = threading.active_count()
    with pytest.raises(KeyError, match="broken"):
        turns.run_in_turns([(fails, 1), (ends, 1)])
    assert done == [True]
    assert threading.active_count() == threads


@pytest.mark.filterwarnings("ignore")
def test_fit_counts_its_callbacks_and_finds_all_that_they_wrote():
    cost = fits.measure(TINY, epochs=1, steps=2)
    assert cost.steps == 2
    assert cost.plain > 0
    assert 0 < cost.direct < cost.watched
    assert {"TrainingDynamics", "DeadFilters", "EmbeddingProjection"} <= cost.reported.keys()
    lines = list(fits.rows(TINY, [cost]))
    assert all(len(line) == len(fits.HEAD) for line in lines)
    assert lines[0][-1].startswith("<= 15 %")


@pytest.mark.filterwarnings("ignore")
def test_fit_without_the_callbacks_is_shorter_and_its_time_is_scaled_up(monkeypatch):
    """Five epochs are watched, one is not; its start, of two seconds, counts once."""

    def run(trainings):
        counted = [steps for _, steps in trainings]
        assert counted == [10, 50]
        return SimpleNamespace(seconds=[12.0, 60.0], before=[2.0, 3.0])

    monkeypatch.setattr(fits, "run_in_turns", run)
    monkeypatch.setattr(fits, "reported", lambda folder, interp: {})
    cost = fits.measure(TINY, epochs=5, steps=1)
    assert (cost.plain, cost.watched) == (52.0, 60.0)


@pytest.mark.filterwarnings("ignore")
def test_fit_of_a_gpu_is_measured_stretch_by_stretch():
    """On a CPU here: 50 dense steps and 10 more, two epochs; moments are in order and all of the fit is in them."""
    found = gpu_fits.measure(TINY, epochs=2, steps=60)
    assert found.steps == [50, 10]
    assert [len(epoch) for epoch in found.watched] == [3, 3]
    assert min(map(min, found.watched)) > 0
    assert found.step > 0
    assert found.end > 0
    assert found.begin > 0
    assert {"TrainingDynamics", "DeadFilters"} <= found.reported.keys()


def test_stretches_of_a_gpu_by_hand():
    watched = [[0.20, 0.12, 3.0], [0.10, 0.22, 2.0], [0.10, 0.20, 3.0]]
    found = gpu_fits.GpuFit(1e-3, 0.5, 0.21, watched, [100, 100], {"A": 0.42, "B": 1.05})
    assert [line[1:] for line in gpu_fits.rows(TINY, found)] == [
        ["a step without", "1.0 ms", ""],
        ["before the first step", "210.0 ms", ""],
        ["first epoch, steps 1 to 100", "100 %", "<= 1 %: **not met**"],
        ["first epoch, steps 101 to 200", "20 %", "<= 1 %: **not met**"],
        ["later epochs, steps 1 to 100", "0 %", "<= 1 %: met"],
        ["later epochs, steps 101 to 200", "110 %", "<= 1 %: **not met**"],
        ["the end of an epoch, more than without", "2.17 s", ""],
        ["whole fit, 3 epochs of 200 steps", "336 %", "<= 1 %: **not met**"],
        ["of it, `interp.cost/B`", "50 %", ""],
        ["of it, `interp.cost/A`", "20 %", ""],
    ]


def test_shares_of_a_fit_are_of_the_time_without_the_callbacks():
    cost = fits.FitCost(100.0, 110.0, 8.0, [10e-6, 20e-6, 30e-6], [1e-6, 5e-6], steps=6, reported={"A": 1.0, "B": 6.0})
    lines = [line[1:] for line in fits.rows(TINY, [cost])]
    assert lines == [
        ["whole fit, ratio (1 in turns)", "1.100", "<= 15 %: met"],
        ["whole fit, direct share", "8.0 %", "<= 15 %: met"],
        ["of it, `interp.cost/B`", "6.0 %", ""],
        ["of it, `interp.cost/A`", "1.0 %", ""],
        ["steps without any hook on the model", "50 %", ""],
        ["callbacks in such a step, median", "20.0 us", "<= 12 us: **not met**"],
        ["there a callback with six empty hooks", "3.0 us", ""],
    ]


def test_fit_whose_callback_rests_or_wrote_nothing_is_caught(tmp_path):
    interp = Interp()
    with pytest.raises(NothingMeasuredError, match=r"interp\.cost"):
        fits.reported(tmp_path, interp)
    interp.children[0].resting = True
    with pytest.raises(NothingMeasuredError, match="rests"):
        fits.reported(tmp_path, interp)


# ---------------------------------------------------------------------- tools


def test_embeddings_are_written_by_both_and_the_lesser_time_is_ours(monkeypatch):
    monkeypatch.setattr(tools, "_POINTS", 40)
    monkeypatch.setattr(tools, "_DIMENSIONS", 8)
    with tools.embeddings() as (comparison,):
        line = comparison.line(2)
    assert line[0] == "writing 40 x 8 embeddings (wall time)"
    assert line[-1].startswith("<= 20 ms: ")


def test_embeddings_that_were_not_written_are_caught(monkeypatch):
    from benchmarks import projector

    monkeypatch.setattr(tools, "_POINTS", 40)
    monkeypatch.setattr(projector.Logs, "ours", lambda self, step: 1e-3)
    with tools.embeddings() as (comparison,), pytest.raises(NothingMeasuredError, match="ours"):
        comparison.line(1)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_occlusion_beside_captum_has_the_same_maps(monkeypatch):
    monkeypatch.setattr(attribution, "MODELS", {"tiny, 2 images": (tiny, 2, 16, "3")})
    with tools.attributions() as comparisons:
        lines = [comparison.line(1) for comparison in comparisons]
    assert [line[1] for line in lines] == [
        "captum Saliency", "captum Occlusion, one window a forward", "captum Occlusion, 64 images a forward",
    ]  # fmt: skip
    assert all(line[-1].startswith("3 times as fast: ") for line in lines[1:])


def test_maps_that_differ_or_are_empty_are_caught():
    one, two = (tools._Kept(lambda factor=factor: torch.ones(2, 2) * factor) for factor in (1.0, 1.1))
    none = tools._Kept(lambda: torch.zeros(2, 2))
    for kept in (one, two, none):
        kept.run()
    tools._same_maps("x", one, one)()
    with pytest.raises(NothingMeasuredError, match="differ"):
        tools._same_maps("x", one, two)()
    with pytest.raises(NothingMeasuredError, match="x has measured nothing"):
        tools._same_maps("x", none, none)()


def test_projections_are_maps_of_all_points(monkeypatch):
    monkeypatch.setattr(tools, "_MAPPED", 30)
    comparison = tools._projected("PCA", "nothing", tools.project_pca, lambda x: x[:, :2])[0]
    assert comparison.line(1)[0] == "PCA of 30 x 64, afresh"
    short = tools._projected("PCA", "nothing", tools.project_pca, lambda x: x[:10, :2])[0]
    with pytest.raises(NothingMeasuredError, match="PCA: a map"):
        short.line(1)


def test_ratio_says_how_many_times_as_fast_ours_is():
    comparison = tools.Comparison("w", "b", lambda: 2.0, lambda: 6.0, lambda: None, goals.OCCLUSION)
    assert comparison.line(3) == ["w", "b", "2.00 s", "6.00 s", "3.00 (3.00-3.00)", "3 times as fast: met"]


def test_tool_that_is_missing_or_broken_is_named(monkeypatch):
    def broken():
        raise ValueError("odd")

    monkeypatch.setattr(tools, "SECTIONS", {"A": (lambda: load("no_such_package_at_all"), "a"), "B": (broken, "b")})
    assert list(tools.rows(1)) == [
        (["A", "a", "not installed", "", "", ""], "missing"),
        (["B", "b", "failed: ValueError: odd", "", "", ""], "failed"),
    ]


# ---------------------------------------------------------------------- start and command line


def test_import_is_what_the_second_process_takes_more():
    assert start.beyond(timing.Pairs([1.0, 5.0, 2.0], [1.25, 5.5, 3.0])) == 0.5


def test_new_processes_differ_by_the_import():
    pairs = start.measure(1)
    assert pairs.plain[0] > 0
    assert pairs.other[0] > 0


def test_import_that_does_not_happen_is_caught(monkeypatch):
    monkeypatch.setattr(start, "_IMPORT", "print([])")
    with pytest.raises(NothingMeasuredError, match="import"):
        start.measure(1)


@pytest.mark.parametrize(
    ("problems", "arguments", "status"),
    [
        (set(), [], 0),
        ({"missing"}, [], 0),
        ({"missing"}, ["--require-peers"], 1),
        ({"failed"}, [], 1),
    ],
)
def test_status_says_what_failed_and_what_is_missing_if_that_was_asked(
    problems, arguments, status, monkeypatch, capsys
):
    monkeypatch.setattr(command, "report", lambda options: iter([("part", problems), ("end", set())]))
    assert command.main(arguments) == status
    assert capsys.readouterr().out == "part\n\nend\n\n"


def test_only_the_chosen_sections_are_measured(monkeypatch):
    monkeypatch.setattr(start, "text", lambda rounds: f"start {rounds}")
    options = command.parser().parse_args(["start", "--starts", "3"])
    assert [part for part, _ in command.report(options)] == [machine.describe(), "start 3"]


def test_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["stops"])
    assert "no section 'stops'" in capsys.readouterr().err


def test_options_have_the_sizes_of_the_goals():
    """Ten epochs of at least a hundred steps."""
    options = command.parser().parse_args([])
    assert isinstance(options, argparse.Namespace)
    assert (options.epochs, options.batches) == (10, 100)


def test_what_is_required_must_be_there():
    require([1], "x")
    with pytest.raises(NothingMeasuredError, match="x has measured nothing"):
        require([], "x")
    assert finite([1, float("nan"), torch.tensor(2.0), float("inf")]) == [1.0, 2.0]
