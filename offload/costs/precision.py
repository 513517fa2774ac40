"""The precisions of experts: the names that users give them, and the bits that a weight takes at each. Torch-free.

    auto                  the model's own dtype, from the checkpoint
    bf16, fp16, fp32      a plain dtype; the model's own comes from the checkpoint too, unless it was converted
    int8, nf4             quantised: see offload/formats/
    int8>int4>int3>int2   nested: also int4, int3, int2, or some of the four in this order, such as int4>int2

Several, the best first and separated by commas or nested, are for fallbacks to choose from.
"""

from __future__ import annotations

from cache.errors import FormatError

PLAIN_BITS = {"bf16": 16.0, "fp16": 16.0, "fp32": 32.0, "fp64": 64.0}
QUANTISED_BITS = {"int8": 8.0, "nf4": 4.5}
"""Scales included (one for a whole row of int8 is too little to count)."""
NESTED = {"int8": "nested8", "int4": "nested4", "int3": "nested3", "int2": "nested2"}
"""Levels of the nested format by the names they have inside its title, the best one first."""
NESTED_BITS = {"nested8": 4.0, "nested4": 1.0, "nested3": 1.0, "nested2": 2.5}
"""What each level adds to the next lower one."""


def parse_precisions(text: str) -> list[str]:
    """The precisions that `--experts TEXT` means, best first: names of plain dtypes, or of formats' levels.

    Raises FormatError, saying what there is.
    """
    names: list[str] = []
    for item in text.split(","):
        item = item.strip()
        levels = [level.strip() for level in item.split(">")]
        if len(levels) > 1 or item in ("int4", "int3", "int2"):
            if any(level not in NESTED for level in levels):
                raise _disorder(item)
            names += [NESTED[level] for level in levels]
        elif item == "auto" or item in PLAIN_BITS or item in QUANTISED_BITS:
            names.append(item)
        else:
            raise FormatError(
                f'--experts "{item}": choose one of auto, bf16, fp16, fp32, int8, nf4, int4, int3, int2, '
                "int8>int4>int3>int2"
            )
    if len(set(names)) < len(names):
        raise FormatError(f'--experts "{text}": a precision is named twice')
    if [name for name in names if name in NESTED_BITS] != [name for name in NESTED_BITS if name in names]:
        raise _disorder(text)
    return names


def title(precision: str) -> str:
    """What users call it."""
    return next((name for name, level in NESTED.items() if level == precision), precision)


def bits_of(precision: str) -> float:
    """Bits of a weight at a precision that is not nested. Raises FormatError."""
    bits = PLAIN_BITS | QUANTISED_BITS
    if precision not in bits:
        raise FormatError(f'"{precision}": sizes are known of {", ".join(bits)}')
    return bits[precision]


def _disorder(text: str) -> FormatError:
    return FormatError(f'--experts "{text}": nested levels are int8>int4>int3>int2, or some of them in this order')
