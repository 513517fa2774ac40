"""What a comparison is asked and what it answers: the setting that all rows share, and the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cache.errors import BudgetError, OffloadError, PolicyError
from cache.quota import Quota, make_quota
from cache.traces.trace import Trace
from offload.costs.machine import MachineProfile
from offload.decide.prefetchers.base import OURS
from offload.decide.sharing import nothing_to_share
from offload.system.sizes import format_bytes, parse_bytes

BRACKETS = ("lru", "belady", "belady-bypass")
"""What every other policy is measured against: gap closed = (hits - LRU's) / (Belady's - LRU's)."""


@dataclass(frozen=True)
class Row:
    """One trace under one policy at one capacity. Bytes and seconds are None where an expert's size, or the machine,
    is not known."""

    trace: str
    policy: str
    params: dict[str, Any]
    pool: str
    quota: str
    """How layers share; "none" where all have one cache."""
    warm: bool
    causal: bool
    admission: str
    """"forced": a missing expert always enters the cache; "bypass": only if it outranks what would have to go."""
    profile: str | None
    """The trace that the policy was trained on."""
    capacity: str
    """As it was asked for."""
    capacity_fraction: float
    capacity_slots: int
    capacity_bytes: int | None
    predictor: str
    """What says which experts come next; "none": all are fetched on demand."""
    prefetcher: str
    """Which of these are fetched, and in which order; "none" without a predictor."""
    prefetch_depth: int
    """How many layers ahead; 0 without a predictor."""
    device: str
    """Where experts are computed: "cpu" or "gpu"."""
    accesses: int
    hits: int
    hit_rate: float
    late_hits: int
    misses: int
    bypasses: int
    useful_prefetches: int
    wasted_prefetches: int
    bytes_moved: int | None
    stall_s: float | None
    tokens_per_s: float | None
    warm_up: int = 0
    """Sequences that were replayed first, and are not counted."""
    gap_closed: float | None = None
    """Of the distance from LRU to Belady with forced admission; None where there is none."""
    gap_closed_bypass: float | None = None
    """Of the distance from LRU to Belady with bypass."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """How to replay: what does not differ from row to row."""

    pool: str = "layer"
    quota: str | None = None
    """How layers share, where each has a cache of its own; None: evenly."""
    warm: bool = False
    warm_up: int = 0
    """Sequences to replay first and not to count."""
    timed: bool = False
    """Event by event through the live decision loop, instead of counting."""
    profile: str | None = None
    """A trace to train on, for policies that learn and quotas that measure."""
    machine: MachineProfile | None = None
    expert_bytes: int | None = None
    """By default what the trace says."""
    dense_layer_bytes: int = 0
    """Weights beside the experts that every layer reads."""
    dense_pass_bytes: int = 0
    """Weights that every pass reads once."""
    format: str = "bf16"
    predictor: str = "none"
    prefetcher: str = OURS
    prefetch_depth: int | None = None
    """By default the prefetcher's own."""
    device: str = "cpu"
    """"gpu": experts are computed on the machine's accelerator, whose cache has the capacity."""
    host_capacity: str = "100%"
    """What host memory holds behind the accelerator."""
    threads: int | None = None
    """That compute on the CPU; by default as many as were measured."""
    prefill: str = "auto"
    """How presets read prompts; everything else reads them on demand."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise OffloadError(f'--device "{self.device}": experts are computed on the "cpu" or the "gpu"')
        if (self.predictor != "none" or self.device == "gpu") and not self.timed:
            raise OffloadError("prefetching and accelerators are about time: replay with --timed")
        if self.warm_up < 0:
            raise PolicyError(f"--warm-up {self.warm_up}: a number of sequences is 0 or more")
        if self.warm_up and not self.warm:
            raise PolicyError("--warm-up does nothing with --cold, which empties all caches: add --warm")
        if self.prefetch_depth is not None and self.prefetch_depth < 1:
            raise PolicyError(f"--prefetch-depth {self.prefetch_depth}: at least one layer ahead")
        if self.pool not in ("layer", "global"):
            raise PolicyError(f'--pool "{self.pool}": one cache for all layers is "global", one for each is "layer"')
        if self.quota is not None:
            if self.pool == "global":
                raise nothing_to_share(self.quota)
            make_quota(self.quota, 1, 1)


def adapts_in_vain(quota: Quota, setting: Setting) -> bool:
    """Whether `quota`, with all that it could learn beforehand, changes with what it sees of a run, and nothing comes
    of that here: nothing is run event by event, or every sequence begins anew."""
    return quota.adapts and not (setting.timed and (setting.warm or quota.every_pass))


def check_quota(quota: Quota, setting: Setting) -> None:
    """Raises PolicyError where `adapts_in_vain`."""
    if adapts_in_vain(quota, setting):
        how = "--timed" if quota.every_pass else "--timed --warm, or name a --profile to learn from"
        raise PolicyError(f"--quota {quota.name} changes with what it has seen of a run: replay with {how}")


def with_gaps(rows: Sequence[Row]) -> list[Row]:
    """`rows` with the share of the gap that each closes, wherever its brackets are among them."""
    brackets = {(_place(row), row.policy): row.hits for row in rows if row.policy in BRACKETS}

    def share(row: Row, best: str) -> float | None:
        low, high = (brackets.get((_place(row), name)) for name in ("lru", best))
        return None if low is None or high is None or high <= low else (row.hits - low) / (high - low)

    return [
        replace(row, gap_closed=share(row, "belady"), gap_closed_bypass=share(row, "belady-bypass")) for row in rows
    ]


def _place(row: Row) -> tuple[Any, ...]:
    return row.trace, row.pool, row.quota, row.warm, row.warm_up, row.device, row.predictor, row.capacity


def slots_of(trace: Trace, text: str, expert_bytes: int | None, *, flag: str = "--capacity") -> int:
    """The experts that fit, of all layers together. `flag` is what said `text`. Raises BudgetError."""
    layers, experts = trace.num_layers, trace.num_experts
    if text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise BudgetError(f'{flag} "{text}": a share of the experts lies between 0% and 100%')
        return int(share * experts + 0.5) * layers
    nbytes = parse_bytes(text, flag)
    if expert_bytes is None:
        raise BudgetError(
            f"{flag} {format_bytes(nbytes)}: {trace.name} does not say how large an expert is: "
            "give --expert-bytes, or a share such as 25%"
        )
    return min(nbytes // expert_bytes, layers * experts)
