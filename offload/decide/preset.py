"""What a preset is: which policy, pool, quota, predictor, prefetch rule, precisions, fallback, scheduler and placement
run together. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache.errors import PolicyError
from cache.policy import find_policy
from offload.decide.fallbacks.base import find_fallback
from offload.decide.placements.base import EMPTY
from offload.decide.prefetchers.base import OURS
from offload.decide.schedulers.base import divides
from predictors.base import build_predictor, find_predictor

PARTS = (
    *("policy", "pool", "quota", "predictor", "prefetcher", "prefetch_depth"),
    *("experts", "fallback", "scheduler", "placement"),
)
"""What a preset sets: the names of flags, and of `from_pretrained`'s arguments."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One composition; what is not said is what runs without a preset, but for the predictor, which then is "auto"."""

    name: str
    policy: str = "lfru"
    pool: str = "global"
    quota: str | None = None
    predictor: str = "none"
    prefetcher: str = OURS
    prefetch_depth: int | None = None
    experts: str = "auto"
    fallback: str = "none"
    scheduler: str = "gpu-only"
    placement: str = EMPTY
    source: str
    """Where it was published."""
    differs: str = ""
    """What is not as published."""

    @property
    def parts(self) -> dict[str, Any]:
        """What it sets, by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def divides(self) -> bool:
        """Whether the CPU may compute experts beside an accelerator."""
        return divides(self.scheduler)

    @property
    def lossless(self) -> bool:
        """Whether it leaves what the model says as it is."""
        return self.experts == "auto" and not find_fallback(self.fallback).lossy

    @property
    def learns(self) -> tuple[str, ...]:
        """The flags of its parts that cannot do without a recorded trace."""
        parts = {
            "--policy": find_policy(self.policy).learns,
            "--predictor": self.predictor != "auto" and _needs_profile(self.predictor),
        }
        return tuple(flag for flag, learns in parts.items() if learns)

    @property
    def needs_calibration(self) -> bool:
        """Whether `offload calibrate` has to have run."""
        return find_fallback(self.fallback).needs_calibration

    def check_profile(self, profile: object) -> None:
        """Raise PolicyError, saying what to pass, where a part needs a recorded trace and `profile` is None."""
        if profile is None and self.learns:
            who = f"preset {self.name}"
            if self.name == DEFAULT.name:  # the parts are the user's own
                who = " and ".join(f"{flag} {self.parts[flag.strip('-')]}" for flag in self.learns)
            raise PolicyError(
                f"{who} learns from a recorded trace: record one with `offload trace record`, "
                "and name it with --profile"
            )


def _needs_profile(predictor: str) -> bool:
    """Whether `predictor` cannot do without a recorded trace, unless that is the very one which runs."""
    if not find_predictor(predictor).causal:
        return False
    try:
        return build_predictor(predictor, 1, 1).learns
    except PolicyError:  # it has learnt, from a model of another shape; or its parameters are wrong, as is said later
        return False


DEFAULT = Preset(name="default", predictor="auto", source="what runs without a preset")
