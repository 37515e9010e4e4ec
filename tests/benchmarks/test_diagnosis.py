"""The fault suite: labels, figures, and that an interrupted suite goes on where it stopped."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.diagnosis import labels, replay, runner, score, tables, tune
from benchmarks.diagnosis.cells import EASY, is_extra, is_fresh, is_held_out, is_sampled, suite
from benchmarks.diagnosis.census import census
from benchmarks.diagnosis.data import load
from benchmarks.diagnosis.faults import FAULTS, change_data
from benchmarks.diagnosis.fresh import FRESH
from benchmarks.diagnosis.models import ARCHITECTURES, HELD_OUT
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.train import final_loss, run, train_plain
from lightning_interp.rules import History, NonFiniteRule
from tests.callbacks import dynamics_kit

LN10 = math.log(10)
SPEC = Spec("plain", "digits", "sgd", rate=0.03, epochs=1)


def record(spec, final=0.1, **values):
    """A line as a run writes it."""
    base = {
        "key": spec.key, "spec": asdict(spec), "guess": LN10, "steps": 200, "final": final, "early": [LN10, 2.0],
        "finite": True, "val_losses": [1.0, 0.5, 0.4, 0.4], "counts": [[0.0, 0.0]] * 3, "born": [0.0, 0.0], "still": [],
        "watched_labels": False, "alerts": [], "seconds": 1.0,
    }  # fmt: skip
    return base | values


def alert(rule, severity="warning", cause=None, step=60):
    """An alert as a run writes it."""
    return {"rule": rule, "severity": severity, "status": "raised", "layer": None, "step": step, "cause": cause}


def ladder(finals, longs=None, **values):
    """The lines of a cell: rate to the loss that was reached, and to that of the long version."""
    lines = [record(replace(SPEC, rate=rate), final, **values) for rate, final in finals.items()]
    return lines + [record(replace(SPEC, rate=r, long=True), f) for r, f in (longs or finals).items()]


def by_rate(lines, plan=None, *, long=False):
    """Labelled runs of one length by their rate."""
    return {run.spec.rate: run for run in labels.label_all(lines, plan) if run.spec.long is long}


@given(st.integers(1, 500), st.data())
def test_wilson_limits_solve_the_equation_that_defines_them(total, data):
    """At either limit p, the share seen lies z standard errors of p away."""
    hits = data.draw(st.integers(0, total))
    interval = score.wilson(hits, total)
    for limit in (interval.low, interval.high):
        assert (hits / total - limit) ** 2 == pytest.approx(score.Z95**2 * limit * (1 - limit) / total, abs=1e-9)
    assert 0 <= interval.low <= hits / total + 1e-12
    assert hits / total - 1e-12 <= interval.high <= 1


def test_wilson_of_nothing_is_unknown():
    """No runs, no figure."""
    assert math.isnan(score.wilson(0, 0).share)
    assert tables.percent(score.wilson(0, 0)) == "-"


def test_rate_labels_follow_what_other_rates_gain():
    """By hand: 0.001 is too low, 1 too high, and 0.01 in between would gain from three times the steps."""
    found = labels.rate_labels(
        {0.001: 0.1, 0.01: 0.75, 0.1: 0.98, 1.0: 0.0}, {0.001: 0.25, 0.01: 0.97, 0.1: 1.0, 1.0: 0.05}
    )
    high, low, short = labels.RATE_RULES
    assert [found[rate][high] for rate in found] == [False, False, False, True]
    assert [found[rate][low] for rate in found] == [True, None, False, False]
    assert [found[rate][short] for rate in found] == [None, True, False, False]


def test_the_best_rate_is_never_too_high_nor_too_low():
    """Nothing gains on it."""
    short = {10.0**-i: value for i, value in enumerate((0.2, 0.9, 0.95, 0.4))}
    best = labels.rate_labels(short, short)[0.01]
    assert best == {"learning_rate_too_high": False, "learning_rate_too_low": False, "undertrained": False}


def test_progress_goes_from_a_guess_to_the_best_and_a_lost_run_has_none():
    """Half-way is 0.5; NaN and a loss above the guess are 0."""
    assert labels.progress(LN10 / 2, LN10, 0.0) == pytest.approx(0.5)
    assert labels.progress(None, LN10, 0.0) == labels.progress(5.0, LN10, 0.0) == 0.0


def test_a_cell_is_labelled_only_when_all_its_rungs_are_there():
    """A run that is still to come leaves the rate labels unknown, and the run neither healthy nor faulty."""
    lines = ladder({0.01: 2.2, 0.1: 0.1})
    plan = {line["key"]: Spec.from_dict(line["spec"]).cell for line in lines}
    whole, part = by_rate(lines, plan), by_rate(lines[:-1], plan)
    assert whole[0.01].labels["learning_rate_too_low"] is True
    assert whole[0.01].faulty is True
    assert whole[0.1].faulty is False
    assert part[0.1].labels["learning_rate_too_low"] is None
    assert part[0.1].faulty is None


@given(st.floats(0, 3), st.floats(0, 1), st.floats(0.01, 5))
def test_a_settled_run_can_gain_nothing_whatever_the_best_of_its_cell_is(final, part, guess):
    """Brute force over what another rate or length might reach."""
    best = part * final
    if labels.settled(final, guess) and guess > best:
        assert (final - 0.0) / (guess - best) < labels.NO_GAIN


def test_long_versions_are_labelled_by_arithmetic_or_by_what_clearly_did_better():
    """A tenth of what there was to gain is left: nothing is wrong; above that only a clear gain of others tells."""
    lines = ladder({0.01: 2.0, 0.1: 1.0, 1.0: 2.3}, {0.01: 0.15, 0.1: 0.1, 0.3: 0.6, 1.0: 2.0})
    found = by_rate(lines, long=True)
    high, low, short = labels.RATE_RULES
    assert [found[rate].faulty for rate in found] == [False, False, None, True]
    assert [found[rate].labels[high] for rate in found] == [False, False, None, True]
    assert [found[rate].labels[low] for rate in found] == [False, False, None, None]
    assert [found[rate].labels[short] for rate in found] == [False, False, None, None]


def test_a_run_without_a_ladder_is_healthy_only_if_it_is_settled():
    """There is nothing to compare it with."""
    found = by_rate([record(replace(SPEC, rate=rate), final) for rate, final in ((0.01, 0.2), (0.1, 0.3), (1.0, None))])
    assert [found[rate].faulty for rate in found] == [False, None, None]
    assert all(run.progress is None for run in found.values())


def test_overfitting_is_what_stopping_early_would_have_saved():
    """A rise of the validation loss counts if the training loss is low, and not within noise."""
    rise = [1.0, 0.4, 0.8, 0.9]
    assert labels.overfitting(rise, 0.01, LN10) is True
    assert labels.overfitting(rise, 2.0, LN10) is False
    assert labels.overfitting([1.0, 0.3, 0.32, 0.31], 0.01, LN10) is False
    assert labels.overfitting([1.0, 0.9, 0.9, 0.9], 0.01, LN10) is None
    assert labels.overfitting([1.6, 0.6, 0.2], 0.1, LN10) is False  # still falling
    assert labels.overfitting([1.0, 0.2, 0.1, 0.2, 3.0, 0.1], 0.1, LN10) is False  # high for once
    assert labels.overfitting([1.0, 0.2, 0.4, 0.5], 0.2, LN10) is None
    assert labels.overfitting([1.0, 0.2, 0.1, 0.2, 0.2, 0.2, 0.12, 0.6, 0.9], 0.1, LN10) is False  # of the last third


def test_few_images_are_overfitted_if_all_of_them_would_have_done_better():
    """The twin with all images is the counterfactual; without it the gap tells nothing."""
    few = record(SPEC, 0.01, val_losses=[1.0, 0.9, 0.9, 0.9])
    for val_loss, expected in ((0.2, True), (0.88, False)):
        assert labels.memorised(few, record(SPEC, 0.01, val_losses=[1.0, 0.9, val_loss])) is expected
    assert labels.memorised(few, None) is None


def test_deaths_count_when_they_last():
    """Dead at the end: yes. Revived after the first epoch: an alert then was right, silence too."""
    assert labels.share_label([(0.0, 0.0), (0.1, 0.0), (0.25, 0.0)], 0) is True
    assert labels.share_label([(0.9, 0.0), (0.1, 0.0), (0.0, 0.0)], 0) is None
    assert labels.share_label([(0.9, 0.1), (0.1, 0.1), (0.0, 0.1)], 1) is False
    assert labels.share_label([(0.5, 0.0)], 0) is True


def test_deaths_are_blamed_on_the_rate_only_if_a_lower_one_leaves_more_alive():
    """The counterfactual for the cause of death."""
    dead, alive = [[0.5, 0.0]] * 3, [[0.0, 0.0]] * 3
    for low, right in ((alive, True), (dead, False)):
        lines = ladder({0.01: 0.1, 0.1: 0.1})
        lines[0]["counts"], lines[1]["counts"] = low, dead
        found = by_rate(lines)[0.1]
        assert found.labels["dead_filters"] is True
        assert found.labels["learning_rate_too_high"] is False
        assert ("learning_rate_too_high" in found.causes) is right


def test_deaths_are_blamed_on_the_initialisation_only_if_half_of_them_are_older_than_the_training():
    """By brute force over the network as it began."""
    for born, right in ((0.25, True), (0.24, False)):
        lines = ladder({0.1: 0.1}, counts=[[0.5, 0.0]] * 3, born=[born, 0.0])
        assert ("initialisation" in by_rate(lines)[0.1].causes) is right
    assert by_rate(ladder({0.1: 0.1}, born=[0.9, 0.0]))[0.1].causes == frozenset()


def test_units_of_a_linear_layer_are_counted_along_the_last_axis():
    """Three of six hidden units of a ConvNeXt-like block are off; along axis 1, height, nothing would be."""
    linear = nn.Linear(4, 6)
    with torch.no_grad():
        linear.bias[:3] = -1e4
    block = nn.Sequential(linear, nn.GELU())
    assert census(block, torch.randn(8, 5, 5, 4)) == (0.5, 0.5)


def test_figures_of_a_rule_by_hand():
    """Two found of three, one false alarm in a healthy run."""
    lines = ladder({0.001: 2.25, 0.002: 2.2, 0.004: 2.15, 0.1: 0.1, 0.2: 0.1})
    for i in (0, 1, 3):
        lines[i]["alerts"] = [alert("learning_rate_too_low", cause="learning rate too low")]
    runs = list(by_rate(lines).values())
    found = score.rule_score(runs, "learning_rate_too_low")
    assert found.recall[:2] == (2, 3)
    assert found.precision[:2] == (2, 3)
    assert found.false_alarms[:2] == (1, 2)
    assert found.delay == 60
    assert score.causes(runs)[:2] == (2, 2)
    assert [verdict for _, verdict in score.failures(runs)].count("missed learning_rate_too_low") == 1


def test_a_wrong_cause_is_counted_and_information_is_no_alarm():
    """The primary alert is the most severe one."""
    lines = ladder({0.001: 2.25, 0.1: 0.1})
    lines[0]["alerts"] = [alert("learning_rate_too_low"), alert("bad_start", "critical", "inputs")]
    lines[1]["alerts"] = [alert("dead_filters", "info")]
    runs = list(by_rate(lines).values())
    assert score.causes(runs)[:2] == (0, 1)
    assert score.wrong_causes(runs, "bad_start")[:2] == (1, 1)
    assert score.wrong_causes(runs, "learning_rate_too_low")[:2] == (0, 0)
    assert score.false_alarms(runs)[:2] == (0, 1)


def test_an_injection_that_does_no_harm_is_no_fault():
    """A small initialisation in a network with BatchNorm: same progress as its twin."""
    for final, fault in ((0.1, False), (2.0, True), (0.6, None)):
        spec = replace(SPEC, rate=0.1, fault="init_small")
        runs = labels.label_all([*ladder({0.01: 0.3, 0.1: 0.1}), record(spec, final)])
        assert runs[-1].faulty is fault


def test_a_report_names_every_rule_and_every_wrong_verdict():
    """The tables are there and hold the failing run."""
    lines = ladder({0.001: 2.25, 0.1: 0.1})
    text = tables.report(lines)
    assert all(f"`{rule}`" in text for rule in labels.LABELLED)
    assert "missed learning_rate_too_low" in text


def test_an_interrupted_suite_goes_on_where_it_stopped(tmp_path):
    """Also after a line that was cut off, and a run that failed is tried again."""
    specs = [SPEC, replace(SPEC, seed=1)]
    calls = []

    def train(spec):
        calls.append(spec)
        if len(calls) == 2:
            raise RuntimeError("no luck")
        return record(spec)

    assert runner.run_all(specs, tmp_path, jobs=0, train=train) == 1
    with (tmp_path / runner.RECORDS).open("a") as file:
        file.write('{"key": "cut of')
    assert runner.run_all(specs, tmp_path, jobs=0, train=train) == 0
    assert runner.run_all(specs, tmp_path, jobs=0, train=train) == 0
    assert calls == [specs[0], specs[1], specs[1]]
    assert {line["key"] for line in runner.read_records(tmp_path)} == {spec.key for spec in specs}
    assert runner.read_plan(tmp_path) == {spec.key: spec.cell for spec in specs}


def test_no_run_is_started_after_the_time_is_up(tmp_path):
    """`hours=0` starts none."""
    assert runner.run_all([SPEC], tmp_path, jobs=0, hours=0, train=record) == 0
    assert not runner.read_records(tmp_path)


def test_keys_tell_all_runs_apart_and_every_fault_has_its_twin():
    """Ladders hold at least two rates in both lengths, and the held-out ones share nothing that matters."""
    for specs in (suite(), suite(reduced=True)):
        keys = {spec.key for spec in specs}
        assert len(keys) == len(specs)
        assert all(spec.twin in keys for spec in specs)
        both = [spec for spec in specs if spec.fault == "none" and replace(spec, long=True).key in keys]
        assert min(Counter((spec.cell, spec.long) for spec in both).values()) >= 2
        alone = {spec.cell for spec in specs if spec.fault == "none"} - {spec.cell for spec in both}
        assert all(spec.data in EASY for spec in specs if spec.cell in alone)
        assert {spec.fault for spec in specs} == {*FAULTS, "none"}
    groups = [[spec for spec in suite() if spec.architecture in names] for names in (ARCHITECTURES, HELD_OUT, FRESH)]
    assert sum(map(len, groups)) == len(suite())
    assert [{(is_held_out(spec), is_fresh(spec)) for spec in group} for group in groups] == [
        {(False, False)}, {(True, False)}, {(False, True)},
    ]  # fmt: skip
    for one, other in combinations(groups, 2):
        shared = {spec.data for spec in one} & {spec.data for spec in other}
        assert shared <= set(EASY)  # of runs without a ladder
        assert not {spec.optimizer for spec in one} & {spec.optimizer for spec in other}


def test_the_census_counts_units_that_no_image_reaches():
    """Three of four channels are held down; one image is enough to keep a unit alive."""
    conv = nn.Conv2d(1, 4, 1)
    nn.init.zeros_(conv.weight)
    conv.weight.data[3] = 1.0
    conv.bias.data = torch.tensor([-1.0, -1.0, 0.0, -1.0])
    images = torch.zeros(5, 1, 2, 2)
    assert census(nn.Sequential(conv, nn.ReLU()), images) == (1.0, 0.0)
    images[2, 0, 1, 1] = 2.0
    assert census(nn.Sequential(conv, nn.ReLU()), images) == (0.75, 0.0)
    conv.bias.data = torch.tensor([-40.0, -1.0, 1.0, 1.0])
    assert census(nn.Sequential(conv, nn.GELU()), images) == (0.25, 0.25)


@pytest.mark.parametrize(("fault", "share"), [("labels_5", 0.05), ("labels_20", 0.2)])
def test_so_many_labels_are_wrong_as_the_fault_says(fault, share):
    """Every moved label is wrong."""
    data = load("textures")
    changed = change_data(data, fault)
    assert float((changed.targets != data.targets).float().mean()) == pytest.approx(share, abs=1e-3)


def test_the_loss_of_a_run_that_ended_in_nan_is_unknown():
    """And otherwise the mean of its end."""
    assert final_loss([1.0, math.nan], 20) is None
    assert final_loss([9.0] * 50 + [1.0] * 20, 20) == 1.0


def test_the_run_with_alerts_trains_exactly_as_the_plain_one_and_can_be_judged_anew(tmp_path):
    """The same losses to the last digit, a line of strict JSON, and a history that gives the same alerts."""
    kept = run(SPEC)
    plain = train_plain(SPEC)
    assert kept["steps"] == len(plain) == 37
    assert kept["final"] == final_loss(plain, 37)
    history = kept.pop("history")
    json.dumps(kept, allow_nan=False)
    replay.write_history(history, tmp_path, kept["key"])
    again = replay.replay([kept], tmp_path)[0]["alerts"]
    assert replay.replay([kept, kept], tmp_path, jobs=2) == 2 * replay.replay([kept], tmp_path)
    names = ("rule", "severity", "step")
    assert [[a[n] for n in names] for a in again] == [[a[n] for n in names] for a in kept["alerts"]]


def test_a_replay_raises_nothing_before_it_happened():
    """A NaN at step 120 is named at the look after it."""
    history = History()
    for step in range(200):
        history.record("loss", math.nan if step >= 120 else 1.0, step=step)
    history.note("non_finite_step", 120)
    found = replay.judge(history, [NonFiniteRule()], 200)
    assert next(alert["step"] for alert in found) == 150


def test_the_variant_is_chosen_on_the_others_and_judged_on_the_one_left_out():
    """Variant 0 is right on one network, variant 1 on the other: each is chosen where it does not count."""
    runs = []
    for architecture in ("plain", "norm"):
        lines = ladder({0.001: 2.25, 0.1: 0.1})
        for line in lines:
            spec = replace(Spec.from_dict(line["spec"]), architecture=architecture)
            line |= {"key": spec.key, "spec": asdict(spec)}
        runs += by_rate(lines).values()
    rule = "learning_rate_too_low"
    said = {}
    for each in runs:
        right = bool(each.labels[rule])
        said[each.spec.key] = [right, not right] if each.spec.architecture == "plain" else [not right, right]
    recall, precision = tune.leave_one_out(runs, said, rule)
    assert (recall.hits, recall.total, precision.hits, precision.total) == (0, 2, 0, 2)
    same = {each.spec.key: [bool(each.labels[rule])] * 2 for each in runs}
    recall, precision = tune.leave_one_out(runs, same, rule)
    assert (recall[:2], precision[:2]) == ((2, 2), (2, 2))


def test_every_variant_of_a_grid_is_a_rule_and_the_default_is_among_them():
    for kind in tune.GRIDS:
        found = tune.variants(kind)
        assert kind() in found
        assert len(set(found)) == len(found) == math.prod(map(len, tune.GRIDS[kind].values()))


def test_where_no_rate_learns_anything_progress_means_nothing():
    """The best one is at 0.9 of a guess: the rates are neither right nor wrong, and the run is not healthy."""
    found = by_rate(ladder({0.01: 2.2, 0.1: 2.1}))
    assert all(run.labels["learning_rate_too_low"] is None and run.faulty is None for run in found.values())


def test_samples_and_thresholds_are_taken_of_ladders_only():
    """Long versions and runs without a ladder are told from the rest by their specification alone."""
    extra = [spec for spec in suite() if is_extra(spec)]
    ladders = Counter(spec.cell for spec in suite() if spec.long)
    assert all(spec.long or spec.cell not in ladders for spec in extra)
    assert all(spec.cell in ladders for spec in suite() if spec not in set(extra))
    assert {spec for spec in suite() if not is_sampled(spec)} == {*extra, *filter(is_fresh, suite())}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.filterwarnings(*dynamics_kit.CHATTER)
def test_thinned_probes_are_those_of_a_run_that_takes_fewer(seed):
    """Trained twice, with the first 50 steps probed and with 25; with the second seed step 27 brings a NaN."""

    def trained(dense):
        torch.manual_seed(seed)
        model = dynamics_kit.Plain()
        data = dynamics_kit.loader(70)
        if seed:
            data.dataset.tensors[0][27 * dynamics_kit.BATCH] = math.nan
        return dynamics_kit.fit(model, dynamics_kit.strict(dense_steps=dense, every_n_train_steps=200), data).history

    thinned, expected = replay.thinned(trained(50), 25), trained(25)
    found, wanted = ({key: (s.steps, repr(s.values)) for key, s in each.series.items()} for each in (thinned, expected))
    assert found == wanted
    assert thinned.facts == expected.facts
    assert expected.get("learning_rate").steps[24:30] == [24, 29, 34, 39, 44, 49]
    assert any(name == "non_finite_step" and layer for name, layer in expected.facts) is (seed == 1)
