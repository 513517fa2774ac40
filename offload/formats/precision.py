"""The precisions that experts can be stored and computed at, by the names that users give them.

    auto                  the model's own dtype, from the checkpoint
    bf16, fp16, fp32      a plain dtype; the model's own comes from the checkpoint too, unless it was converted
    int8, nf4             quantised: see offload/formats/
    int8>int4>int2        nested: also int4, int2, or two of the three, such as int4>int2

Several, the best first and separated by commas or nested, are for fallbacks to choose from.
"""

from __future__ import annotations

import torch

from cache.errors import FormatError
from offload.formats import FORMATS, Format

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
NESTED = {"int8": "nested8", "int4": "nested4", "int2": "nested2"}
"""Levels of the nested format by the names they have inside its title."""

_READY = "-cpu"  # behind a precision's name: records that lie as a CPU computes with them


def parse_precisions(text: str) -> list[str]:
    """The precisions that `--experts TEXT` means, best first: names of plain dtypes, or of formats' levels.

    Raises FormatError, saying what there is.
    """
    names: list[str] = []
    for item in text.split(","):
        item = item.strip()
        levels = [level.strip() for level in item.split(">")]
        if len(levels) > 1 or item in ("int4", "int2"):
            if any(level not in NESTED for level in levels) or levels != sorted(levels, key=list(NESTED).index):
                raise FormatError(f'--experts "{item}": nested levels are int8>int4>int2, or two of them in this order')
            names += [NESTED[level] for level in levels]
        elif item == "auto" or item in PLAIN or (item in FORMATS and item != "nested"):
            names.append(item)
        else:
            raise FormatError(
                f'--experts "{item}": choose one of auto, bf16, fp16, fp32, int8, nf4, int4, int2, int8>int4>int2'
            )
    if len(set(names)) < len(names):
        raise FormatError(f'--experts "{text}": a precision is named twice')
    return names


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


def title(precision: str) -> str:
    """What users call it."""
    return next((name for name, level in NESTED.items() if level == precision), precision)
