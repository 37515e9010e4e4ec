"""The peers of the fault suite: from numbers written by hand to verdicts; and the recorder against a naive reading."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.diagnosis import replay
from benchmarks.diagnosis.data import load
from benchmarks.diagnosis.labels import LABELLED, Labelled
from benchmarks.diagnosis.peers import (
    autotrainer,
    compare,
    cs231n,
    deepchecker,
    observe,
    packages,
    sagemaker,
    sample,
    table,
)
from benchmarks.diagnosis.peers.finding import Finding, earliest
from benchmarks.diagnosis.peers.recorder import Epoch, Recorder, Recording, WeightStep
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.train import train_plain
from lightning_interp.rules import History

LN10 = math.log(10)
SPEC = Spec("norm", "digits", "sgd", rate=0.03, epochs=1)
# Ratio 1e-3 by mean and by norm; nothing wrong.
FINE = WeightStep(0.1, 1.0, 1e-4, 1e-3, 1e-3, 0.01, 0.01)


def recording(steps=30, layers=1, weight=FINE, **values):
    """A run in which nothing is wrong, but for what is given: `weight` for one or all steps, or by layer."""
    series = weight if isinstance(weight, list) else [weight] * steps
    weights = series if isinstance(series[0], list) else [series] * layers
    made = Recording(
        9,
        10,
        initial_spread={"0": 0.1},
        losses=[LN10 * 0.95**i for i in range(steps)],
        weights={str(i): layer for i, layer in enumerate(weights)},
        zero_gradients=[0.1] * steps,
        active={"relu": [[0.5, 0.4, 0.3, 0.6]] * steps},
        relu_input_variance={"relu": [1.0] * 10, "other": [2.0] * 10},
        epochs=[Epoch(min(steps - 1, 9), 1.0, 0.8, 1.0, 0.8), Epoch(steps - 1, 0.5, 0.9, 0.52, 0.88)],
    )
    return replace(made, **values)


def said(peer, of):
    """Name and step of its findings."""
    return [(finding.name, finding.step) for finding in peer.check(of)]


@pytest.mark.parametrize("peer", observe.REEXPRESSED.values())
def test_no_peer_says_anything_of_a_run_in_which_nothing_is_wrong(peer):
    assert peer.check(recording(steps=60)) == []


@pytest.mark.parametrize("name", observe.RULES)
def test_every_rule_that_a_peer_comes_to_has_a_label(name):
    assert observe.RULES[name] <= set(LABELLED)


def test_a_statement_counts_once_at_its_first_step():
    found = [Finding("a", None, 9), Finding("b", None, 3), Finding("a", None, 4)]
    assert earliest(found) == [Finding("b", None, 3), Finding("a", None, 4)]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(9e-3, []), (1.1e-4, []), (1.1e-2, ["learning_rate_too_high"]), (9e-5, ["learning_rate_too_low"])],
)
def test_cs231n_asks_for_a_median_within_a_factor_of_ten(norm, expected):
    weight = [FINE._replace(update_norm=norm)] * 16 + [FINE._replace(update_norm=1.0)] * 14
    assert [finding.rule for finding in cs231n.check(recording(weight=weight))] == expected


def test_sagemaker_dead_relu_needs_more_than_half_of_a_layer():
    half = [[0.0, 0.009, 0.2, 0.5]] * 30
    most = [[0.5] * 4] * 15 + [[0.0, 0.009, 0.002, 0.5]] * 15
    assert said(sagemaker, recording(active={"r": half})) == []
    assert said(sagemaker, recording(active={"r": most})) == [("DeadRelu", 15)]


def test_sagemaker_all_zero_and_tensors():
    assert ("AllZero", 0) in said(sagemaker, recording(active={"r": [[0.0, 0.0]] * 30}))
    broken = recording(weight=[FINE] * 20 + [FINE._replace(finite=False)] * 10)
    assert said(sagemaker, broken) == [("ExplodingTensor", 20)]
    small = [[FINE] * 30, [FINE._replace(grad_mean=9e-8)] * 30]
    assert said(sagemaker, recording(weight=small)) == [("VanishingGradient", 0)]
    assert said(sagemaker, recording(weight=FINE._replace(grad_mean=1.1e-7))) == []
    assert said(sagemaker, recording(weight=FINE._replace(grad_mean=math.nan))) == []


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(9.9, []), (10.1, ["learning_rate_too_high"]), (1.1e-8, []), (9e-9, ["learning_rate_too_low"])],
)
def test_sagemaker_weight_update_ratio(norm, expected):
    found = sagemaker.check(recording(weight=FINE._replace(update_norm=norm)))
    assert [finding.rule for finding in found] == expected


def test_sagemaker_unchanged_tensor_needs_three_saved_steps():
    still = FINE._replace(unchanged=True)
    assert said(sagemaker, recording(weight=[FINE] * 5 + [still] + [FINE] * 24)) == []
    assert said(sagemaker, recording(weight=[FINE] * 5 + [still] * 2 + [FINE] * 23)) == [("UnchangedTensor", 6)]


def test_sagemaker_compares_validation_losses_ten_epochs_apart():
    def at(losses):
        return recording(epochs=[Epoch(i, loss, 0.9, loss, 0.9) for i, loss in enumerate(losses)])

    assert said(sagemaker, at([1.0] * 10)) == []
    assert said(sagemaker, at([1.0] * 10 + [0.9])) == []
    assert said(sagemaker, at([1.0] * 11)) == [("LossNotDecreasing", 10)]


def test_sagemaker_overfit_is_ten_percent_of_the_training_loss():
    for val_loss, expected in ((1.09, []), (1.11, [("Overfit", 9)])):
        assert said(sagemaker, recording(epochs=[Epoch(9, 1.0, 0.5, val_loss, 0.5)])) == expected


def test_sagemaker_poor_initialisation_needs_a_loss_that_does_not_fall():
    uneven = {"a": [1.0] * 10, "b": [11.0] * 10}
    flat = [2.0] * 30
    assert said(sagemaker, recording(relu_input_variance=uneven)) == []
    assert said(sagemaker, recording(losses=flat)) == []
    assert said(sagemaker, recording(relu_input_variance=uneven, losses=flat)) == [("PoorWeightInitialization", 9)]
    narrow = FINE._replace(grad_spread=9e-4)
    assert said(sagemaker, recording(weight=narrow, losses=flat)) == [("PoorWeightInitialization", 9)]


def accuracies(train, val=None, **values):
    """A run of ten epochs with these accuracies."""
    pairs = zip(train, val or train, strict=True)
    return recording(epochs=[Epoch(3 * i, 1.0, a, 1.0, b) for i, (a, b) in enumerate(pairs)], **values)


def test_autotrainer_calls_it_slow_if_neither_accuracy_gains_and_neither_is_good():
    assert said(autotrainer, accuracies([0.1, 0.105, 0.11, 0.115])) == [("slow convergence", 6)]
    assert said(autotrainer, accuracies([0.1, 0.2, 0.3, 0.4])) == []
    assert said(autotrainer, accuracies([0.9, 0.905, 0.91, 0.915])) == []
    assert said(autotrainer, accuracies([0.1])) == []


def test_autotrainer_looks_at_gradients_only_if_the_accuracy_is_bad():
    bad, good = [0.1, 0.2, 0.3, 0.4], [0.7, 0.8, 0.9, 0.95]
    cases = {
        "dying ReLU": {"zero_gradients": [0.7] * 30},
        "gradient explode": {"weight": [[FINE._replace(grad_norm=71.0)] * 30, [FINE._replace(grad_norm=1.0)] * 30]},
        "gradient vanish": {"weight": [[FINE._replace(grad_norm=9e-5)] * 30, [FINE._replace(grad_norm=0.1)] * 30]},
    }
    for name, values in cases.items():
        assert said(autotrainer, accuracies(bad, **values)) == [(name, 6)]
        assert said(autotrainer, accuracies(good, **values)) == []
    # Below the norm but not the ratio, and the other way round.
    for first, last in ((9e-5, 1e-3), (2e-4, 1.0)):
        weight = [[FINE._replace(grad_norm=first)] * 30, [FINE._replace(grad_norm=last)] * 30]
        assert said(autotrainer, accuracies(bad, weight=weight)) == []


def test_autotrainer_counts_swings_of_a_good_run_and_finds_nan_at_once():
    assert autotrainer.swings([0.8, 0.9, 0.8, 0.9, 0.8]) == 1
    assert autotrainer.swings([0.8, 0.81, 0.8, 0.81, 0.8]) == 0
    assert said(autotrainer, accuracies([0.8, 0.9, 0.8, 0.9, 0.8])) == [("oscillating loss", 9)]
    assert said(autotrainer, accuracies([0.8, 0.81, 0.8, 0.81, 0.8])) == []
    assert said(autotrainer, accuracies([0.9], losses=[math.nan] * 30)) == [("gradient explode", 0)]
    regression = accuracies([math.nan] * 4, classes=0, zero_gradients=[0.9] * 30)
    assert said(autotrainer, regression) == []


def test_deepchecker_before_training():
    raw = recording(inputs=(120.0, 60.0, 0.0, 255.0))
    assert said(deepchecker, raw) == [("inputs not normalised", 0)]
    assert said(deepchecker, recording(inputs=(0.5, 0.3, 0.0, 1.0))) == []
    assert said(deepchecker, recording(initial_spread={"a": 0.0})) == [("poor initialisation", 0)]
    for first, expected in ((1.9 * LN10, []), (2.1 * LN10, [("first loss", 0)])):
        assert said(deepchecker, recording(losses=[first * 0.95**i for i in range(30)])) == expected


def test_deepchecker_buffers_ten_batches_of_activations():
    """Three of four units at 20 % in two of the batches 11 to 20: below 5 % on average; in three of them: above it."""
    for loud, expected in ((2, [("dead layer", 20)]), (3, [])):
        batches = (
            [[0.5] * 4] * 11 + [[0.2, 0.2, 0.2, 0.5]] * loud + [[0.0, 0.0, 0.0, 0.5]] * (10 - loud) + [[0.5] * 4] * 9
        )
        assert said(deepchecker, recording(active={"r": batches})) == expected


def test_deepchecker_gradients_by_size_and_by_growth():
    def run(*means):
        series = [FINE] * (21 - len(means)) + [FINE._replace(grad_mean=mean) for mean in means] + [FINE] * 9
        return said(deepchecker, recording(weight=series))

    assert run(9e-7) == [("vanishing gradient", 20)]
    assert run(1.1e6) == [("exploding gradient", 20)]
    assert run(0.5, 0.25, 0.12, 0.06, 0.03) == [("vanishing gradient", 20)]
    assert run(0.1, 0.2, 0.4, 0.8, 1.6) == [("exploding gradient", 20)]
    assert run(0.1, 0.2, 0.4, 0.8, 1.5) == []


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (0.02, [("updates too fast", "learning_rate_too_high")]),
        (0.009, []),
        (1.1e-5, []),
        (9e-6, [("updates too slow", "learning_rate_too_low")]),
        (0.0, [("untrained weights", "untrained_layer")]),
    ],
)
def test_deepchecker_judges_the_mean_logarithm_of_ten_updates(update, expected):
    found = deepchecker.check(recording(weight=FINE._replace(update_mean=update)))
    assert [(finding.name, finding.rule) for finding in found] == expected
    assert all(finding.step == 10 for finding in found)


def test_deepchecker_does_not_judge_updates_when_its_own_training_would_have_ended():
    late = [FINE] * 201 + [FINE._replace(update_mean=1e-9)] * 50
    assert said(deepchecker, recording(steps=251, weight=late)) == []


def test_deepchecker_loss_curves():
    flat = said(deepchecker, recording(steps=60, losses=[2.0] * 60))
    assert flat == [("stagnated loss", 40)]
    doubling = [0.1 * 2 ** (i / 9) for i in range(60)]
    assert ("diverging loss", 50) in said(deepchecker, recording(steps=60, losses=doubling))
    zigzag = [(4.0 if i // 10 % 2 else 2.0) * 0.9 ** (i // 10) for i in range(101)]
    assert "fluctuating loss" in dict(said(deepchecker, recording(steps=101, losses=zigzag)))
    assert said(deepchecker, recording(losses=[math.nan] * 30)) == [("loss is no number", 0)]


class Net(nn.Module):
    """One ReLU as a module, one as a function."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(3, 10)

    def forward(self, x):
        return self.head(nn.functional.relu(self.relu(self.conv(x)).amax((2, 3))))


def test_the_recorder_agrees_with_a_naive_reading():
    torch.manual_seed(0)
    data, net = load("digits"), Net()
    with torch.no_grad():
        net.conv.bias[0] = -20.0
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    recorder = Recorder(net, data, 1)
    images, targets = data.images[:16], data.targets[:16]
    for _ in range(2):
        before = net.conv.weight.detach().clone()
        conv = net.conv(images).detach()
        loss = nn.functional.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        recorder.before_step()
        gradients = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        recorder.after_step(loss.item())
        net.eval()
        net(images)  # a validation batch is nobody's business
        net.train()
    recorder.detach()
    net(images)
    found, change, gradient = recorder.recording, net.conv.weight.detach() - before, gradients[0]
    step = found.weights["conv"][1]
    assert step.weight_mean == pytest.approx(float(before.abs().sum()) / before.numel())
    assert step.weight_norm == pytest.approx(math.sqrt(sum(v * v for v in before.flatten().tolist())))
    assert step.update_norm == pytest.approx(math.sqrt(sum(v * v for v in change.flatten().tolist())), rel=1e-4)
    assert step.update_mean == pytest.approx(float(change.abs().mean()), rel=1e-4)
    assert step.grad_mean == pytest.approx(float(gradient.abs().mean()))
    low, high = gradient.flatten().quantile(0.05), gradient.flatten().quantile(0.95)
    assert step.grad_spread == pytest.approx(float(high - low))
    assert (step.finite, step.unchanged) == (True, False)
    zeros = sum((g == 0).sum() for g in gradients) / sum(g.numel() for g in gradients)
    assert found.zero_gradients[1] == pytest.approx(float(zeros))
    shares = [float((conv[:, unit] > 1e-5).float().mean()) for unit in range(3)]
    assert found.active == {"relu": [pytest.approx(found.active["relu"][0]), pytest.approx(shares)]}
    assert found.active["relu"][0][0] == 0.0
    assert found.relu_input_variance["relu"][1] == pytest.approx(float(conv.var()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_the_run_is_the_one_that_was_judged_and_monitors_do_not_change_it():
    """Loss by loss the same as without anything on it, whichever packages are installed."""
    for spec in (SPEC, replace(SPEC, optimizer="adam", rate=2e-3, clip=1.0, precision="bf16", schedule="cosine")):
        found, _ = observe.watch(spec)
        assert found.losses == train_plain(spec)
        assert len(found.epochs) == 1
        assert found.epochs[0].train_loss == pytest.approx(sum(found.losses) / len(found.losses))


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_published_packages_are_run_where_installed_and_left_out_where_not():
    _, found = observe.watch(SPEC)
    installed = {name for name, module in packages.MODULES.items() if module not in packages.missing()}
    assert set(found) == installed


def test_torchmortem_titles_come_to_rules_and_information_is_left_out():
    def finding(title, severity):
        return SimpleNamespace(title=title, severity=SimpleNamespace(name=severity))

    titles = {
        "Dead units in net.0": "WARNING", "Dead units in net.2": "CRITICAL", "Update ratio too low in net.0": "WARNING",
        "Stagnant weight norms": "WARNING", "Catapult phase detected": "INFO",
    }  # fmt: skip
    report = SimpleNamespace(findings=[finding(*item) for item in titles.items()])
    assert set(packages.mortem_findings(report, 99)) == {
        Finding("Dead units", "dead_filters", 99),
        Finding("Update ratio too low", "learning_rate_too_low", 99),
        Finding("Stagnant weight norms", None, 99),
    }


def test_torch_audit_advice_on_code_and_information_are_left_out():
    def finding(rule, severity, step):
        return SimpleNamespace(rule_id=rule, severity=SimpleNamespace(value=severity), step=step)

    found = [
        finding("TA105", "WARN", 7), finding("TA105", "WARN", 3), finding("TA103", "INFO", 1),
        finding("TA400", "WARN", 0), finding("TA200", "WARN", 0), finding("TA304", "WARN", 0),
        finding("TA405", "WARN", 0),
    ]  # fmt: skip
    assert packages.audit_findings(found) == [
        Finding("TA304", None, 0),
        Finding("TA405", "dead_filters", 0),
        Finding("TA105", "dead_filters", 3),
    ]


def judged(spec, faulty, alerts=(), **labels):
    """A labelled run."""
    raised = [
        {"rule": rule, "severity": "warning", "status": "raised", "layer": None, "step": 60, "cause": None}
        for rule in alerts
    ]
    record = {"key": spec.key, "spec": asdict(spec), "alerts": raised}
    return Labelled(spec, record, dict.fromkeys(LABELLED, False) | labels, faulty=faulty)


def test_the_sample_is_half_healthy_and_has_every_kind_of_fault():
    rules = ("learning_rate_too_high", "learning_rate_too_low", "undertrained", "dead_filters")
    runs = [judged(replace(SPEC, seed=i), False) for i in range(50)]
    runs += [judged(replace(SPEC, seed=100 + i), True, learning_rate_too_high=True) for i in range(50)]
    runs += [judged(replace(SPEC, seed=200 + i), True, **{rule: True}) for i, rule in enumerate(rules[1:])]
    runs += [judged(replace(SPEC, fault=fault), True) for fault in ("nan_batch", "labels_all")]
    runs += [judged(replace(SPEC, seed=300), None)]
    chosen = sample.sample(runs, 20)
    assert len(chosen) == len({run.spec.key for run in chosen}) == 20
    assert sum(run.faulty is False for run in chosen) == 10
    assert all(any(run.labels[rule] for run in chosen) for rule in rules)
    assert {run.spec.fault for run in chosen} == {"none", "nan_batch", "labels_all"}
    assert chosen == sample.sample(runs[::-1], 20)
    assert sum(run.faulty is False for run in sample.sample(runs[:52], 20)) == 18


def test_figures_of_a_peer_by_hand():
    rule = "learning_rate_too_high"
    cases = [
        (judged(SPEC, True, **{rule: True}), [Finding("fast", rule, 3)]),
        (judged(SPEC, True, **{rule: True}), [Finding("noise", None, 3)]),
        (judged(SPEC, False), [Finding("fast", rule, 3)]),
        (judged(SPEC, False), [Finding("noise", None, 3)]),
        (judged(SPEC, False, **{rule: None}), [Finding("fast", rule, 3)]),
        (judged(SPEC, None), [Finding("fast", rule, 3)]),
        (judged(SPEC, False), []),
    ]
    verdicts = [table.theirs(run, findings) for run, findings in cases]
    assert table.recall(verdicts, rule)[:2] == (1, 2)
    assert table.precision(verdicts, rule)[:2] == (1, 3)
    assert table.false_alarms(verdicts)[:2] == (1, 4)
    assert table.anything(verdicts, True)[:2] == (2, 2)
    assert table.anything(verdicts, False)[:2] == (3, 4)


def test_our_own_row_is_made_by_the_same_measure():
    ours = table.ours(judged(SPEC, True, ["dead_filters"], dead_filters=True))
    assert (ours.rules, ours.anything) == (frozenset({"dead_filters"}), True)


def test_a_comparison_goes_on_where_it_stopped_and_leaves_the_suite_alone(tmp_path):
    base = {
        "guess": LN10, "steps": 200, "final": 0.1, "early": [LN10, 2.0], "finite": True,
        "still": [], "val_losses": [1.0, 0.4, 0.4], "counts": [[0.0, 0.0]] * 3, "born": [0.0, 0.0],
        "watched_labels": False, "alerts": [], "seconds": 1.0,
    }  # fmt: skip
    specs = [replace(SPEC, rate=rate, long=long) for rate in (0.01, 0.03) for long in (False, True)]
    lines = [json.dumps({"key": spec.key, "spec": asdict(spec), **base}) for spec in specs]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "plan.json").write_text(json.dumps({spec.key: spec.cell for spec in specs}))
    for spec in specs:
        replay.write_history(History().state_dict(), tmp_path, spec.key)
    trained = []

    def train(spec):
        trained.append(spec)
        return {
            "key": spec.key,
            "peers": {"CS231n's update ratio": [["update ratio too low", "learning_rate_too_low", 9]]},
        }

    for _ in range(2):
        text, failed = compare.compare(tmp_path, jobs=0, train=train)
    assert failed == 0
    assert sorted(spec.rate for spec in trained) == [0.01, 0.03]
    assert {path.name for path in tmp_path.iterdir()} == {"runs.jsonl", "peers.jsonl", "plan.json", "histories"}
    assert "| CS231n's update ratio | 100 % (2/2; 34-100)" in text
    assert "| lightning-interp | 0 % (0/2; 0-66)" in text
    assert (
        "| CS231n's update ratio | 0/0 | 0 % (0/2; 0-66) | - | - |" in text
    )  # never said; said and wrong; no such rule
    assert "| TheDeepChecker |" not in text
    assert "left out: torchmortem 0.1.1, torch-audit 0.3.0" in text
