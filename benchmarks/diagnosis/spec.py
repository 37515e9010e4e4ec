"""The specification of one run: what decides its outcome, and the key under which it is kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One training run.

    Attributes:
        architecture: See `models.ARCHITECTURES`, `models.HELD_OUT` and `fresh.FRESH`.
        data: See `data.load`.
        optimizer: `sgd` (momentum 0.9), `plain_sgd` (none), `nesterov` (0.9, and weight decay), or by the name of the
            class: `adam`, `adamw`, `rmsprop`, `nadam`, `adagrad`, `radam`, `adamax`.
        schedule: `constant`, `cosine`, `warmup` or `onecycle`.
        rate: Learning rate, the largest one of the schedule.
        seed: Of initialisation and order.
        epochs: Of the run; its long version has three times as many.
        batch_size: Images.
        clip: Largest gradient norm, 0 for none.
        precision: `32` or `bf16`.
        trait: What makes a healthy run hard, see `traits.py`; `none` for an ordinary one.
        fault: What was injected, see `faults.py`; `none` for nothing.
        remedy: What is done against a fault, see `remedies.py`; `none` for nothing.
        long: Whether this is the long version, against which the others are measured.
    """

    architecture: str
    data: str
    optimizer: str
    schedule: str = "constant"
    rate: float = 1e-3
    seed: int = 0
    epochs: int = 9
    batch_size: int = 32
    clip: float = 0.0
    precision: str = "32"
    trait: str = "none"
    fault: str = "none"
    remedy: str = "none"
    long: bool = False

    @property
    def key(self) -> str:
        """Changes with every field, so that a changed suite never takes an old result for its own."""
        values = asdict(self)
        if self.remedy == "none":
            del values["remedy"]  # runs that were kept before there were remedies keep their keys
        if self.long:
            values["watched"] = True  # at first they were trained without callbacks
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cell(self) -> str:
        """The same for all rates, lengths, faults and remedies of a cell."""
        return replace(self, rate=0.0, long=False, fault="none", remedy="none").key

    @property
    def twin(self) -> str:
        """Key of the run that differs only in having no fault injected, and hence no remedy."""
        return replace(self, fault="none", remedy="none").key

    @property
    def name(self) -> str:
        """For people."""
        extras = [
            self.trait,
            self.fault,
            self.remedy,
            "clip" if self.clip else "none",
            self.precision.replace("32", "none"),
        ]
        shown = " ".join(extra for extra in extras if extra != "none")
        batch = f"b{self.batch_size}" if self.batch_size != 32 else ""
        return " ".join(
            f"{self.architecture} {self.data} {self.optimizer} {self.schedule} {self.rate:.2g} "
            f"s{self.seed} e{self.epochs} {batch} {shown}".split()
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        """The inverse of `asdict`."""
        return cls(**values)
