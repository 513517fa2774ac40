"""What a run did and how fast: one snapshot, the same names everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cache.stats import TierStats
from cache.types import Phase, Tier


@dataclass(slots=True)
class Speed:
    """Tokens processed and the seconds they took. A decode token's time runs from the end of the pass before it, so
    that sampling counts; a prompt's only while its passes run."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """0.0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class TierReport:
    """One tier's counters, its cache's capacity and the most it held, in bytes."""

    counts: TierStats
    capacity_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Stats:
    """A snapshot of everything counted since loading, or since `reset_stats`. Peaks are the whole process's."""

    tiers: dict[Tier, TierReport]
    computing: Tier
    bytes_from_disk: int
    bytes_over_link: int
    stall_s: float
    """Seconds the computing thread waited for experts with nothing else to compute."""
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    cpu_mem_bytes: int
    gpu_mem_bytes: int | None
    speed: dict[Phase, Speed] = field(default_factory=dict)
    precision_uses: dict[str, int] = field(default_factory=dict)
    """Experts computed, by the precision they had then; those "skipped", and those "replaced" by other experts, if a
    fallback did."""
    dropped_share: float = 0.0
    """Of the experts that routers chose for tokens, those that a fallback dropped before anything was computed."""
    prefetch: str | None = None
    """Whether prefetching is "on" or has switched itself "off"; None without a predictor."""
    prefetch_gain: float | None = None
    """By how much a pass was shorter with it than without in the last trial, as a share."""

    @property
    def hit_rate(self) -> float:
        """Of the tier that computes: hits / accesses."""
        return self.tiers[self.computing].counts.hit_rate

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; the computing tier's counters also on top."""
        counts = self.tiers[self.computing].counts
        prefill, decode = (self.speed.get(phase, Speed()) for phase in (Phase.PREFILL, Phase.DECODE))
        return {
            "hit_rate": counts.hit_rate,
            "hits": counts.hits,
            "late_hits": counts.late_hits,
            "misses": counts.misses,
            "bypasses": counts.bypasses,
            "on_cpu": counts.on_cpu,
            "prefetches": counts.prefetches,
            "useful_prefetches": counts.useful_prefetches,
            "wasted_prefetches": counts.wasted_prefetches,
            "cancelled_prefetches": counts.cancelled_prefetches,
            "prefetch": self.prefetch,
            "prefetch_gain": self.prefetch_gain,
            "precision_uses": self.precision_uses,
            "dropped_share": self.dropped_share,
            "bytes_from_disk": self.bytes_from_disk,
            "bytes_over_link": self.bytes_over_link,
            "stall_s": self.stall_s,
            "prefill_tokens": prefill.tokens,
            "decode_tokens": decode.tokens,
            "prefill_tokens_per_s": prefill.tokens_per_s,
            "decode_tokens_per_s": decode.tokens_per_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_gpu_bytes": self.peak_gpu_bytes,
            "cpu_mem_bytes": self.cpu_mem_bytes,
            "gpu_mem_bytes": self.gpu_mem_bytes,
            "tiers": {
                tier.value: {
                    **asdict(report.counts),
                    "capacity_bytes": report.capacity_bytes,
                    "peak_bytes": report.peak_bytes,
                }
                for tier, report in self.tiers.items()
            },
        }


def precision_shares(uses: Mapping[str, int], dropped_share: float) -> dict[str, float]:
    """Of what routers chose, the share at each precision; "dropped" where a fallback dropped experts of tokens.

    Experts that several tokens use count once, so in prompts the shares of those and what was dropped add up roughly.
    """
    total = sum(uses.values()) or 1
    shares = {name: count / total * (1 - dropped_share) for name, count in uses.items()}
    return shares | ({"dropped": dropped_share} if dropped_share else {})
