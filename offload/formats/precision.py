"""What a precision's matrices are stored as, and what the records that hold it are called."""

from __future__ import annotations

import torch

from offload.formats import FORMATS, Format

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def form_of(precision: str) -> Format | torch.dtype:
    """What a precision's matrices are stored as."""
    if precision in PLAIN:
        return PLAIN[precision]
    return next(form for form in FORMATS.values() if precision in (form.name, *form.levels))


def record_name(precision: str) -> str:
    """What the records that hold a precision are called: levels of one format share them."""
    if ready_precision(precision) is not None:
        return precision
    form = form_of(precision)
    return form.name if isinstance(form, Format) else precision


def ready_name(precision: str) -> str | None:
    """What records of a precision that lie as this CPU computes with them are called: the order is in the name. None at
    a plain dtype."""
    form = form_of(precision)
    return f"{precision}-{form.packing}" if isinstance(form, Format) else None


def ready_precision(record: str) -> str | None:
    """The precision of records that lie as some CPU computes with them by their name; None for others."""
    precision, dash, _ = record.rpartition("-")
    return precision if dash else None
