"""How fast a model runs here, beside what was predicted for it: `offload bench` and every trial of `offload tune`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cache.errors import ContextError, ProfileError
from cache.traces.trace import Trace
from cache.types import Phase, Tier
from offload.costs.machine import MachineProfile
from offload.costs.moe_lens import MoeLensBound
from offload.model import OffloadedModel
from offload.options import LoadOptions
from offload.plan.budgets import Plan
from offload.simulation.forecast import Speeds, costs, forecast, peaks, predicted_beside
from offload.stats import Stats
from offload.system.cores import at_most_cores
from offload.traces.router import TraceRouter

_ALL = 0.9
"""A batch that uses such a share of a layer's experts in each pass is taken to read all weights."""

_MANY = 512
"""Tokens an expert, for which reading its weights once hardly counts."""


@dataclass(frozen=True)
class BenchResult:
    """One configuration: medians of what was measured, and what was predicted; `unpredicted` says why there
    is no more than peaks of memory."""

    model: str
    device: str
    tokens: int
    prompt_tokens: int
    repeat: int
    batch: int
    """Sequences that are generated at once."""
    trace: str | None
    actual: Speeds
    predicted: Speeds
    unpredicted: str | None
    batch_tokens_per_s: float
    """Tokens of prompts and replies together, by the time from the prompts to the last token."""
    bound: MoeLensBound | None
    """What that can be at most; None where MoE-Lens' bound says nothing."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types: what was measured, the same with `predicted_` in front, and the bound with what was
        measured of it."""

        names = ("model", "device", "tokens", "prompt_tokens", "repeat", "batch", "trace")
        values = {name: getattr(self, name) for name in names}
        bound = None
        if self.bound is not None:
            measured = {"measured_tokens_per_s": self.batch_tokens_per_s, "share": self.share}
            bound = {**self.bound.as_dict(), **measured}
        predicted = predicted_beside(self.predicted, self.actual)
        return {**values, **predicted, "unpredicted": self.unpredicted, "moe_lens": bound}

    @property
    def share(self) -> float | None:
        """What was measured, as a share of the bound."""
        return None if self.bound is None else self.batch_tokens_per_s / self.bound.tokens_per_s


def bench(
    model: str | Path,
    options: LoadOptions | None = None,
    *,
    tokens: int = 64,
    prompt_tokens: int = 64,
    repeat: int = 3,
    batch: int = 1,
    trace: Trace | None = None,
    profile: MachineProfile | None = None,
    progress: bool = False,
) -> BenchResult:
    """Load `model` once, generate once to warm up, then `repeat` times: `tokens` after a random prompt each time, in
    `batch` sequences at once.

    With a `trace` its rows are followed, by the run and by the prediction; without, the prediction takes a typical
    model's locality. Nothing is predicted of several sequences. Raises OffloadError.
    """

    options = options or LoadOptions()
    with OffloadedModel.open(model, options, progress=progress) as loaded:
        if batch * (prompt_tokens + tokens) > loaded.context:
            each = f" in each of {batch} sequences" if batch > 1 else ""
            raise ContextError(
                f"a prompt of {prompt_tokens} tokens and {tokens} more{each} do not fit a context of {loaded.context}: "
                "raise --context, or lower --prompt-tokens and --tokens"
            )
        threads = at_most_cores(options.threads)
        predicted = Speeds(**peaks(loaded.plan))
        unpredicted: str | None = "it is for one sequence at a time"
        if batch == 1:
            predicted, unpredicted = forecast(
                loaded.plan,
                profile,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                generations=repeat,
                trace=trace,
                rules=loaded.rules,
                threads=threads,
            )
        actual, used, per_s = _measure(loaded, trace, tokens, prompt_tokens, repeat, batch)
        return BenchResult(
            model=str(model),
            device=loaded.plan.device,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            repeat=repeat,
            batch=batch,
            trace=None if trace is None else trace.name,
            actual=actual,
            predicted=predicted,
            unpredicted=unpredicted,
            batch_tokens_per_s=per_s,
            bound=bound_of(loaded.plan, profile, prompt_tokens, tokens, used, threads) if batch > 1 else None,
        )


def bound_of(
    plan: Plan, profile: MachineProfile | None, prompt_tokens: int, tokens: int, used: float, threads: int | None
) -> MoeLensBound | None:
    """MoE-Lens' bound for batches of a plan. None where it says nothing: on an accelerator, which has the KV cache;
    where experts are read from disk; where a pass uses fewer than nearly all of them, `used` being the share; and where
    the machine has not been measured."""
    if plan.computing_tier is not Tier.CPU or plan.slots(Tier.CPU) < plan.experts or used < _ALL:
        return None
    work = plan.work
    if profile is None or work is None:
        return None
    try:
        cost = costs(plan, profile, threads)
    except ProfileError:
        return None
    many = _MANY * work.experts_per_layer // work.top_k
    layer_s = cost.layer_s(many, work.experts_per_layer) + work.experts_per_layer * cost.expert_s(Tier.CPU, _MANY)
    each_layer = work.dense_layer_bytes + work.experts_per_layer * plan.slot_bytes
    return MoeLensBound(
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        kv_tokens=plan.context,
        model_bytes=plan.layers * each_layer + work.dense_pass_bytes,
        bytes_per_s=profile.host_read_bytes_per_s,
        compute_tokens_per_s=many / (cost.pass_s(many) + plan.layers * layer_s),
    )


def _measure(
    model: OffloadedModel, trace: Trace | None, tokens: int, prompt_tokens: int, repeat: int, batch: int
) -> tuple[Speeds, float, float]:
    """(medians, the share of experts that a decoding pass uses, tokens/s of prompts and replies together)."""

    first_s, decode, prefill, hit_rates, host_hit_rates, used, per_s = [], [], [], [], [], [], []
    layers = range(model.plan.layers)
    with nullcontext() if trace is None else TraceRouter(model, trace, layers=layers):
        _generate(model, tokens, prompt_tokens, batch, seed=0)
        for seed in range(1, 1 + repeat):
            model.reset_stats()
            first = _generate(model, tokens, prompt_tokens, batch, seed)
            stats = model.stats
            first_s.append(first.prompt_s)
            decode.append(stats.speed[Phase.DECODE].tokens_per_s)
            prefill.append(stats.speed[Phase.PREFILL].tokens_per_s)
            hits, host_hits, missed = (
                after - before for after, before in zip(_lookups(stats), first.lookups, strict=True)
            )
            accesses = hits + missed
            hit_rates.append(hits / accesses if accesses else 0.0)
            used.append(accesses / ((tokens - 1) * model.plan.experts))
            per_s.append(batch * (prompt_tokens + tokens) / first.all_s)
            if Tier.CPU is not stats.computing:
                host_hit_rates.append(host_hits / missed if missed else 1.0)
        stats = model.stats
    speeds = Speeds(
        decode_tokens_per_s=median(decode) or None,
        prefill_tokens_per_s=median(prefill),
        time_to_first_token_s=median(first_s),
        hit_rate=median(hit_rates),
        host_hit_rate=median(host_hit_rates) if host_hit_rates else None,
        peak_rss_bytes=stats.peak_rss_bytes,
        peak_gpu_bytes=stats.peak_gpu_bytes,
    )
    return speeds, median(used), median(per_s)


class _First:
    """A streamer that notes when the first token of a reply came, and what had been looked up until then."""

    def __init__(self, model: OffloadedModel) -> None:
        self.prompt_s = self.all_s = 0.0
        self.lookups = (0, 0, 0)
        self._model = model
        self._calls = 0
        self._start_s = time.perf_counter()

    def put(self, value: Any) -> None:
        """transformers calls it with the prompt, then with each token."""
        self._calls += 1
        if self._calls == 2:
            self.prompt_s = time.perf_counter() - self._start_s
            self.lookups = _lookups(self._model.stats)

    def end(self) -> None:
        """The reply is over."""
        self.all_s = time.perf_counter() - self._start_s


def _lookups(stats: Stats) -> tuple[int, int, int]:
    """(hits of the tier that computes, hits of host memory behind it, misses of the tier that computes) so far."""

    counts = stats.tiers[stats.computing].counts
    host = 0 if stats.computing is Tier.CPU else stats.tiers[Tier.CPU].counts.hits
    return counts.hits, host, counts.accesses - counts.hits


def _generate(model: OffloadedModel, tokens: int, prompt_tokens: int, batch: int, seed: int) -> _First:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(model.device)
    first = _First(model)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=first,
    )
    return first
