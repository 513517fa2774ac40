"""What a precision's matrices are stored as, and what the records that hold it are called."""

from __future__ import annotations

import torch

from offload.formats import FORMATS, Format

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

_READY = "-cpu"  # behind a precision's name: records that lie as a CPU computes with them


def form_of(precision: str) -> Format | torch.dtype:
    """What a precision's matrices are stored as."""
    if precision in PLAIN:
        return PLAIN[precision]
    return next(form for form in FORMATS.values() if precision in (form.name, *form.levels))


def record_name(precision: str) -> str:
    """What the records that hold a precision are called: levels of one format share them."""
    if precision.endswith(_READY):
        return precision
    form = form_of(precision)
    return form.name if isinstance(form, Format) else precision


def ready_name(precision: str) -> str:
    """What records of a precision that lie as a CPU computes with them are called."""
    return precision + _READY


def ready_precision(record: str) -> str | None:
    """The precision of such records by their name; None for others."""
    return record.removesuffix(_READY) if record.endswith(_READY) else None
