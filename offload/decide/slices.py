"""What slices of experts take and get: bytes by precision, and shares of the memory for experts. Torch-free.

Live, a store knows its slices (`offload/store/precisions.py`); a replay has no store, and goes by bits a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.costs.precision import NESTED_BITS, bits_of, parse_precisions, title

_BLOCK = 4096  # records are aligned to it, as offload/store/record.py lays them out


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
        names = parse_precisions(experts)
        nested = [name for name in names if name in NESTED_BITS]
        precisions: dict[str, tuple[int, ...]] = {}
        sizes: list[int] = []
        for name in names:
            if name not in nested:
                precisions[name] = (len(sizes),)
                plain = name in ("auto", own)
                sizes.append(expert_bytes if plain else _aligned(weights * bits_of(name) / 8))
            elif name == nested[0]:
                begun: tuple[int, ...] = ()  # slices of the nested format, lowest first
                below = list(NESTED_BITS)
                for level in reversed(nested):
                    added = below[below.index(level) :]  # all that the level below does not have
                    below = below[: below.index(level)]
                    begun = (*begun, len(sizes))
                    sizes.append(_aligned(weights * sum(NESTED_BITS[each] for each in added) / 8))
                    precisions[level] = begun
        titles = (own if name == "auto" else title(name) for name in names)
        return cls(tuple(titles), tuple(precisions[name] for name in names), tuple(sizes))


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
