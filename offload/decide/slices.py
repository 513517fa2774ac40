"""What slices of experts take and get: bytes by precision, and shares of the memory for experts. Torch-free.

Live, a store knows its slices (`offload/store/precisions.py`); a replay has no store, and goes by bits a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import FormatError

_BLOCK = 4096  # records are aligned to it, as offload/store/record.py lays them out
_PLAIN_BITS = {"bf16": 16.0, "fp16": 16.0, "fp32": 32.0, "fp64": 64.0}
_BITS = {"int8": 8.0, "nf4": 4.5, "int4": 4.5, "int2": 2.5}
"""A weight, scales included (one for a whole row of int8 is too little to count)."""
_NESTED_BITS = {"int8": 4.0, "int4": 2.0, "int2": 2.5}
"""What each level of the nested format adds to the next lower one."""


@dataclass(frozen=True)
class Slices:
    """The slices of every expert, the way a store would have them."""

    names: tuple[str, ...]
    """Precisions, the best first."""
    precisions: tuple[tuple[int, ...], ...]
    """The slices that each takes."""
    sizes: tuple[int, ...]
    """Bytes of each slice."""

    @classmethod
    def of(cls, experts: str, expert_bytes: int, own: str = "bf16") -> Slices:
        """What `--experts` names, of experts that take `expert_bytes` at the precision `own`. Raises FormatError."""
        weights = 8 * expert_bytes / bits_of(own)
        names: list[str] = []
        precisions: list[tuple[int, ...]] = []
        sizes: list[int] = []
        for item in experts.split(","):
            levels = [level.strip() for level in item.split(">")]
            nested = len(levels) > 1 or levels[0] in ("int4", "int2")
            if not nested:
                name = own if levels[0] == "auto" else levels[0]
                names.append(name)
                precisions.append((len(sizes),))
                sizes.append(expert_bytes if name == own else _aligned(weights * bits_of(name) / 8))
                continue
            begun: list[tuple[int, ...]] = []
            below = list(_NESTED_BITS)
            for level in reversed(levels):
                if level not in below:
                    raise FormatError(f'"{item}": nested levels are int8>int4>int2, or two of them in this order')
                added = below[below.index(level) :]  # all that the level below does not have
                below = below[: below.index(level)]
                sizes.append(_aligned(weights * sum(_NESTED_BITS[each] for each in added) / 8))
                begun.append((*(begun[-1] if begun else ()), len(sizes) - 1))
            names += levels
            precisions += reversed(begun)
        return cls(tuple(names), tuple(precisions), tuple(sizes))


def bits_of(precision: str) -> float:
    """Bits of a weight at a precision by itself. Raises FormatError."""
    bits = {**_PLAIN_BITS, **_BITS}
    if precision not in bits:
        raise FormatError(f'"{precision}": sizes are known of {", ".join(bits)}')
    return bits[precision]


def slice_shares(precisions: Sequence[Sequence[int]], sizes: Sequence[int], low_share: float) -> list[float]:
    """What each slice gets of the memory for experts: most of them are held at the best precision, `low_share` is for
    the others, at the lowest."""
    shares = [0.0] * len(sizes)
    for slices, share in ((precisions[0], 1 - low_share), (precisions[-1], low_share)):
        total = sum(sizes[i] for i in slices)
        for i in slices:
            shares[i] += share * sizes[i] / total
    for slices in precisions[1:-1]:
        for i in slices:
            if not shares[i]:  # between the best and the lowest, and a slice of neither: as much as the lowest has
                shares[i] = low_share
    total_share = sum(shares)
    return [share / total_share for share in shares]


def divide(
    room: int, experts: int, sizes: Sequence[int], shares: Sequence[float], held: Sequence[int] = ()
) -> list[int]:
    """Slots of each slice in `room` bytes, at most one for each expert; those `held` have their place already.

    What one slice does not need, the next ones get.
    """
    counts = list(held) or [0] * len(sizes)
    left = room
    for fair in (True, False):
        for i, (nbytes, share) in enumerate(zip(sizes, shares, strict=True)):
            fitting = int((room * share if fair else left) // nbytes)
            more = min(fitting, left // nbytes, experts - counts[i]) if share else 0
            counts[i] += more
            left -= more * nbytes
    return counts


def _aligned(nbytes: float) -> int:
    return -(-int(nbytes) // _BLOCK) * _BLOCK
