"""Records to any other logger: scalars by `log_metrics`, pictures by `log_image` where there is one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning_interp.records import Image, Record, Scalar
from lightning_interp.sinks.grouping import by_step


def write(logger: Any, records: Sequence[Record]) -> None:
    """Writes scalars, and pictures in the style of the WandbLogger; histograms, embeddings and text are left out.

    Args:
        logger: Any Lightning logger.
        records: Any records.
    """
    for step, group in by_step(record for record in records if isinstance(record, Scalar)).items():
        logger.log_metrics({record.tag: record.value for record in group}, step=step)
    log_image = getattr(logger, "log_image", None)
    if callable(log_image):
        captioned = _takes(log_image, "caption")
        for record in records:
            if isinstance(record, Image):
                extra = {"caption": [record.caption]} if captioned and record.caption else {}
                log_image(key=record.tag, images=[record.pixels], step=record.step, **extra)


def _takes(function: Any, argument: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == argument or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
