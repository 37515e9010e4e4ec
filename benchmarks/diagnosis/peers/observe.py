"""Trains a run anew in a plain PyTorch loop, with all peers on it."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.diagnosis.faults import change_batch
from benchmarks.diagnosis.peers import autotrainer, cs231n, deepchecker, packages, sagemaker
from benchmarks.diagnosis.peers.finding import Finding
from benchmarks.diagnosis.peers.recorder import Recorder, Recording
from benchmarks.diagnosis.spec import Spec
from benchmarks.diagnosis.train import Setting, loss_of, prepare

REEXPRESSED = {
    "SageMaker Debugger rules": sagemaker,
    "CS231n's update ratio": cs231n,
    "AUTOTRAINER": autotrainer,
    "TheDeepChecker": deepchecker,
}
RULES: dict[str, frozenset[str]] = packages.RULES | {name: peer.RULES for name, peer in REEXPRESSED.items()}


def run(spec: Spec) -> dict[str, Any]:
    """The line of a run: what each peer said of it."""
    torch.set_num_threads(1)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages' hooks, in every run
        recording, found = watch(spec)
    found |= {name: peer.check(recording) for name, peer in REEXPRESSED.items()}
    return {
        "key": spec.key,
        "peers": {name: [list(finding) for finding in findings] for name, findings in found.items()},
        "seconds": time.process_time() - begin,
    }


def watch(spec: Spec) -> tuple[Recording, dict[str, list[Finding]]]:
    """Trains with the batches and rates of the run that was judged, and, like it, to the end whatever the loss is."""
    setting = prepare(spec)
    tools = packages.Packages(setting.net, setting.optimizer)
    recorder = Recorder(setting.net, setting.data, setting.epochs)
    for epoch in range(setting.epochs):
        setting.batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        results = [_step(spec, setting, tools, recorder, batch) for batch in setting.batches]
        train_loss, train_accuracy = torch.tensor(results, dtype=torch.float64).mean(0).tolist()
        recorder.end_epoch((train_loss, train_accuracy), _validate(spec, setting))
    recorder.detach()
    return recorder.recording, tools.finish()


def _step(
    spec: Spec, setting: Setting, tools: packages.Packages, recorder: Recorder, batch: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Loss and accuracy of a batch, before the step."""
    images, targets = change_batch(batch[0], batch[1], len(recorder.recording.losses), spec.fault)
    with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
        scores = tools.forward(images)
        loss = loss_of(scores, targets)
    value = float(loss.detach())
    setting.optimizer.zero_grad()
    tools.backward(loss)
    recorder.before_step()
    if spec.clip:
        nn.utils.clip_grad_norm_(setting.net.parameters(), spec.clip)
    tools.step(value)
    recorder.after_step(value)
    if setting.scheduler is not None:
        setting.scheduler.step()
    return value, _accuracy(scores, targets)


@torch.no_grad()
def _validate(spec: Spec, setting: Setting) -> tuple[float, float]:
    data = setting.data
    setting.net.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
        scores = setting.net(data.val_images)
        loss = float(loss_of(scores, data.val_targets))
    setting.net.train()
    return loss, _accuracy(scores, data.val_targets)


def _accuracy(scores: Tensor, targets: Tensor) -> float:
    """NaN in a regression."""
    if targets.is_floating_point():
        return float("nan")
    return float((scores.detach().argmax(1) == targets).float().mean())
