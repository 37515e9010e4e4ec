"""torchmortem 0.1.1 and torch-audit 0.3.0, as published, with their default settings. Where not installed, left out.

Both only read, so they can watch the same training. Warnings and worse count, as with our own alerts.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.diagnosis.peers.finding import Finding, earliest

MORTEM, AUDIT, AUDIT_ALWAYS = "torchmortem 0.1.1", "torch-audit 0.3.0", "torch-audit 0.3.0, every step"
AUDIT_EVERY = 1000  # its default
# By the beginning of a finding's title. Saturation, rank, noise and weight norms have no counterpart among our rules,
# and a plateau may be a rate too low as well as the end of learning.
MORTEM_RULES = {
    "Vanishing gradients": "vanishing_gradient",
    "Gradient stalling": "vanishing_gradient",
    "Exploding gradients": "exploding_gradient",
    "Dead units": "dead_filters",
    "Update ratio too low": "learning_rate_too_low",
    "Update ratio too high": "learning_rate_too_high",
    "Training divergence": "learning_rate_too_high",
}
AUDIT_RULES = {
    "TA100": "non_finite",
    "TA102": "exploding_gradient",
    "TA104": "untrained_layer",
    "TA105": "dead_filters",
    "TA301": "bad_start",  # inputs of a suspicious range
    "TA405": "dead_filters",
}
# Advice on hardware, architecture and weight decay says nothing about the run; TA000 is an error of its own.
AUDIT_IGNORED = ("TA000", "TA2", "TA400", "TA401", "TA402", "TA403", "TA404")
RULES = {
    MORTEM: frozenset(MORTEM_RULES.values()),
    AUDIT: frozenset(AUDIT_RULES.values()),
    AUDIT_ALWAYS: frozenset(AUDIT_RULES.values()),
}
MODULES = {MORTEM: "torchmortem", AUDIT: "torch_audit", AUDIT_ALWAYS: "torch_audit"}


def missing() -> list[str]:
    """The packages that are not installed."""
    return sorted({module for module in MODULES.values() if importlib.util.find_spec(module) is None})


class Packages:
    """The packages that are installed, on one training loop; without any of them this is the bare loop."""

    def __init__(self, net: nn.Module, optimizer: Optimizer) -> None:
        self._net, self._optimizer, self._steps = net, optimizer, 0
        absent = missing()
        self._mortem: Any = None
        self._audit: Any = None
        if "torchmortem" not in absent:
            from torchmortem import Autopsy

            logging.getLogger("torchmortem").setLevel(logging.CRITICAL)
            self._mortem = Autopsy(net, optimizer=optimizer)
            self._mortem.attach()
            # It would keep every network until the process ends, to report on one that crashed.
            atexit.unregister(getattr(self._mortem, "_atexit_handler", None))  # type: ignore[arg-type]
        if "torch_audit" not in absent:
            from torch_audit import Auditor

            # Its findings bear their step, so those of its default are the ones at every thousandth.
            self._audit = Auditor(net, optimizer=optimizer, every_n_steps=1)
            self._audit.attach()
            self._audit.audit_static()
            self._audit.audit_init()

    def forward(self, images: Tensor) -> Tensor:
        """Scores, (N, outputs)."""
        scores: Tensor = self._audit.forward(images) if self._audit else self._net(images)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Gradients."""
        if self._audit:
            self._audit.backward(loss)
        else:
            loss.backward()

    def step(self, loss: float) -> None:
        """The optimizer's step."""
        if self._audit:
            self._audit.optimizer_step()
        else:
            self._optimizer.step()
        if self._mortem:
            self._mortem.step(loss=loss)
        self._steps += 1

    def finish(self) -> dict[str, list[Finding]]:
        """By package, what it found."""
        found: dict[str, list[Finding]] = {}
        if self._mortem:
            self._mortem.detach()
            found[MORTEM] = mortem_findings(self._mortem.get_report(), self._steps - 1)
        if self._audit:
            findings = self._audit.finish().findings
            self._audit.detach()
            found[AUDIT] = audit_findings(f for f in findings if f.step % AUDIT_EVERY == 0)
            found[AUDIT_ALWAYS] = audit_findings(findings)
        return found


def mortem_findings(report: Any, last: int) -> list[Finding]:
    """It reports after the training, so the step is the last one."""
    titles = [finding.title for finding in report.findings if finding.severity.name != "INFO"]
    rules = {title: next((r for t, r in MORTEM_RULES.items() if title.startswith(t)), None) for title in titles}
    return earliest(Finding(title.split(" in ")[0], rule, last) for title, rule in rules.items())


def audit_findings(findings: Any) -> list[Finding]:
    """Each rule at the first step at which it spoke."""
    kept = [f for f in findings if f.severity.value != "INFO" and not f.rule_id.startswith(AUDIT_IGNORED)]
    return earliest(Finding(f.rule_id, AUDIT_RULES.get(f.rule_id), f.step) for f in kept)
