"""Which rules a live model decides by, as the user named them: checked before anything large is read. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cache import policy as policies
from cache import quota as quotas
from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import EvictionPolicy
from cache.quota import Quota
from cache.traces.trace import Trace
from offload.decide.loads import SplitCosts
from offload.decide.placements.base import EMPTY, find_placement, make_placement
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import OURS, PrefetchRule, make_rule
from offload.decide.prefill import PREFILLS, Prefill
from offload.decide.preset import Preset
from offload.decide.schedulers.base import divides, make_scheduler
from offload.decide.sharing import nothing_to_share
from offload.decide.split import Split
from predictors import base as predictors
from predictors.base import Predictor

DEPTH = 2
"""Layers to look ahead if neither the user nor the prefetch rule says."""

AHEAD = "cross-layer-gate"
"""The predictor that "auto" is, where one can be of use: it needs no training, and is right most often."""


def nothing_to_divide(scheduler: str, device: str = "emulated") -> PolicyError:
    """Why a scheduler cannot run where there is no accelerator; `device` names one."""
    return PolicyError(
        f"--scheduler {scheduler} divides layers between an accelerator and the CPU, and here the CPU computes "
        f"everything: leave it out, or choose another --device, such as {device}"
    )


def too_deep(depth: int | None, layers: int) -> str | None:
    """What to say of a `depth` to look ahead that is more than all layers."""
    if depth is None or depth <= layers:
        return None
    return f"--prefetch-depth {depth}: the model has {layers} MoE layers, so it looks {layers} ahead"


def _goes_by_profile(predictor: str) -> bool:
    """Whether `predictor` makes use of a profile. What knows the future goes by the trace that runs instead."""
    kind = predictors.find_predictor(predictor)
    return kind.can_learn and kind.causal


def depth_of(rule: PrefetchRule, asked: int | None, num_layers: int) -> int:
    """How many layers `rule` looks ahead in a model."""
    own = DEPTH if rule.reach is None else rule.reach or num_layers
    return min(asked or own, num_layers)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Names of policy, quota, predictor and scheduler with their parameters; the parts are made for a model's shape.

    Raises PolicyError for a combination that means nothing.
    """

    policy: str = "lfru"
    pool: str = "global"
    quota: str | None = None
    """How layers share, where each has a cache of its own; None: evenly."""
    predictor: str = "none"
    prefetcher: str = OURS
    prefetch_depth: int | None = None
    profile: Trace | None = None
    """What a policy, a quota and a predictor that learn are trained on."""
    scheduler: str = "gpu-only"
    placement: str = EMPTY
    prefill: str = "auto"
    optional: bool = False
    """Whether the predictor is what "auto" came to: where its gates cannot be asked, nothing is predicted."""

    def __post_init__(self) -> None:
        if self.pool not in ("global", "layer"):
            raise PolicyError(f'--pool "{self.pool}": one cache for all layers is "global", one for each is "layer"')
        if self.quota is not None:
            if self.pool == "global":
                raise nothing_to_share(self.quota)
            quotas.make_quota(self.quota, 1, 1)
        if self.predictor == "none" and self.prefetch_depth is not None:
            raise PolicyError(f"--prefetch-depth {self.prefetch_depth} does nothing without a --predictor")
        if self.predictor == "none" and self.prefetcher != OURS:
            raise PolicyError(f"--prefetcher {self.prefetcher} does nothing without a --predictor")
        if self.prefetch_depth is not None and self.prefetch_depth < 1:
            raise PolicyError(f"--prefetch-depth {self.prefetch_depth}: at least one layer ahead")
        make_rule(self.prefetcher)
        make_scheduler(self.scheduler)
        make_placement(self.placement, 1, 1)
        if self.prefill not in ("auto", *PREFILLS):
            raise PolicyError(f'--prefill "{self.prefill}": prompts are read {", ".join(PREFILLS)}, or auto')

    @classmethod
    def of(cls, preset: Preset, profile: Trace | None, prefill: str = "auto") -> Rules:
        """The rules of what runs. Raises PolicyError."""
        return cls(
            policy=preset.policy,
            pool=preset.pool,
            quota=preset.quota,
            predictor=preset.predictor,
            prefetcher=preset.prefetcher,
            prefetch_depth=preset.prefetch_depth,
            profile=profile,
            scheduler=preset.scheduler,
            placement=preset.placement,
            prefill=prefill,
        )

    @property
    def learners(self) -> list[str]:
        """The flags of parts that make use of a profile."""
        uses = {
            "--policy": policies.find_policy(self.policy).can_learn,
            "--quota": self.quota is not None and quotas.find_quota(self.quota).can_learn,
            "--predictor": self.predictor != "auto" and _goes_by_profile(self.predictor),
            "--placement": find_placement(self.placement).needs_counts,
        }
        return [flag for flag, learns in uses.items() if learns]

    def make_policy(self, num_layers: int, num_experts: int, slots: int) -> EvictionPolicy:
        """The policy of a tier with room for so many experts. Raises PolicyError, and TraceError for its profile."""
        lanes = self.lanes(num_layers, num_experts, slots)
        policy = policies.make_policy(self.policy, lanes, self.profile)
        if not policy.causal:
            raise PolicyError(f'eviction policy "{policy.name}" needs to know the future: it runs in a replay only')
        return policy

    def lanes(self, num_layers: int, num_experts: int, slots: int) -> Lanes:
        """A tier's caches: one, or one a layer."""
        if self.pool == "global":
            return Lanes.shared(num_layers, num_experts, slots)
        return Lanes.per_layer(num_layers, num_experts, quotas.even(slots, num_layers, num_experts))

    def make_quota(self, num_layers: int, num_experts: int) -> Quota | None:
        """None where all is shared evenly, or by all layers. Raises PolicyError, and TraceError for its profile."""
        if self.quota is None:
            return None
        return quotas.make_quota(self.quota, num_layers, num_experts, self.profile)

    def make_predictor(self, num_layers: int, num_experts: int) -> Predictor:
        """Raises PolicyError, and TraceError for its profile."""
        return predictors.make_predictor(self.predictor, num_layers, num_experts, self.profile)

    def check_causal(self) -> None:
        """Raises PolicyError for a predictor that knows what a recorded trace says next: a running model may say
        something else."""
        if not predictors.find_predictor(self.predictor).causal:
            raise PolicyError(
                f'predictor "{self.predictor}" needs to know the future: it runs in a replay, and live where '
                "`use_predictor` is told the trace that the model is about to repeat"
            )

    def check_placement(self, num_layers: int, num_experts: int) -> None:
        """Raises PolicyError for a placement that cannot be made, and TraceError for its profile."""
        placement = make_placement(self.placement, num_layers, num_experts)
        if placement.needs_counts and self.profile is not None:
            self.profile.check_model(num_layers, num_experts)

    @property
    def splits(self) -> bool:
        """Whether the CPU may compute experts beside an accelerator."""
        return divides(self.scheduler)

    def make_split(self, costs: SplitCosts) -> Split | None:
        """None where the accelerator computes everything. Raises PolicyError."""
        return Split(make_scheduler(self.scheduler), costs) if self.splits else None

    def without_predictor(self) -> Rules:
        """The same, and nothing is predicted."""
        return replace(self, predictor="none", prefetcher=OURS, prefetch_depth=None)

    def make_prefetcher(self, num_layers: int, num_experts: int) -> Prefetcher | None:
        """None where nothing is predicted and prompts are not streamed."""
        predictor = self.make_predictor(num_layers, num_experts)
        if self.predictor != "none":
            rule = make_rule(self.prefetcher)
            return Prefetcher(predictor, depth_of(rule, self.prefetch_depth, num_layers), rule)
        if self.prefill == "streamed":
            return Prefetcher(predictor, 1, adaptive=False)
        return None

    def make_prefill(self, num_layers: int, num_experts: int) -> Prefill | None:
        """None where prompts are read as replies are made."""
        if self.prefill not in ("streamed", "kept"):
            return None
        return Prefill(num_layers, num_experts, streams=self.prefill == "streamed")

    def settled(self, *, lossy: bool = False, ahead: bool = False) -> Rules:
        """These rules with "auto" decided. `ahead`: whether something may have to be fetched, and it is not known yet
        that the next gates cannot be asked.

        `lossy`: whether what the model says depends on what is resident. Then "auto" fetches nothing ahead: what would
        have landed in time differs from run to run, and two runs should be alike. Nor do prompts take the places of a
        steady policy where the CPU computes what is missing: nothing would be fetched to take them back.
        """
        own = self
        if own.prefill == "auto":
            stays = own.splits and policies.find_policy(own.policy).steady
            own = replace(own, prefill="on-demand" if lossy or stays else "streamed")
        if own.predictor != "auto":
            return own
        predictor = AHEAD if ahead and not lossy else "none"
        if predictor == "none":
            return replace(own.without_predictor(), optional=True)
        return replace(own, predictor=predictor, optional=True)
