"""How fast a model runs here, beside what was predicted for it: `offload bench` and every trial of `offload tune`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cache.errors import ContextError
from cache.traces.trace import Trace
from cache.types import Phase, Tier
from offload.costs.machine import MachineProfile
from offload.model import OffloadedModel
from offload.options import LoadOptions
from offload.simulation.forecast import Speeds, forecast, predicted_beside
from offload.stats import Stats
from offload.system.cores import at_most_cores
from offload.traces.router import TraceRouter


@dataclass(frozen=True)
class BenchResult:
    """One configuration: medians of what was measured, and what was predicted; `unpredicted` says why there
    is no more than peaks of memory."""

    model: str
    device: str
    tokens: int
    prompt_tokens: int
    repeat: int
    trace: str | None
    actual: Speeds
    predicted: Speeds
    unpredicted: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types: what was measured, and the same with `predicted_` in front."""

        values = {
            name: getattr(self, name) for name in ("model", "device", "tokens", "prompt_tokens", "repeat", "trace")
        }
        return {**values, **predicted_beside(self.predicted, self.actual), "unpredicted": self.unpredicted}


def bench(
    model: str | Path,
    options: LoadOptions | None = None,
    *,
    tokens: int = 64,
    prompt_tokens: int = 64,
    repeat: int = 3,
    trace: Trace | None = None,
    profile: MachineProfile | None = None,
    progress: bool = False,
) -> BenchResult:
    """Load `model` once, generate once to warm up, then `repeat` times: `tokens` after a random prompt each time.

    With a `trace` its rows are followed, by the run and by the prediction; without, the prediction takes a typical
    model's locality. Raises OffloadError.
    """

    options = options or LoadOptions()
    with OffloadedModel.open(model, options, progress=progress) as loaded:
        if prompt_tokens + tokens > loaded.context:
            raise ContextError(
                f"a prompt of {prompt_tokens} tokens and {tokens} more do not fit a context of {loaded.context}: "
                "raise --context, or lower --prompt-tokens and --tokens"
            )
        predicted, unpredicted = forecast(
            loaded.plan,
            profile,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            generations=repeat,
            trace=trace,
            rules=loaded.rules,
            threads=at_most_cores(options.threads),
        )
        return BenchResult(
            model=str(model),
            device=loaded.plan.device,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            repeat=repeat,
            trace=None if trace is None else trace.name,
            actual=_measure(loaded, trace, tokens, prompt_tokens, repeat),
            predicted=predicted,
            unpredicted=unpredicted,
        )


def _measure(model: OffloadedModel, trace: Trace | None, tokens: int, prompt_tokens: int, repeat: int) -> Speeds:

    first_s, decode, prefill, hit_rates, host_hit_rates = [], [], [], [], []
    layers = range(model.plan.layers)
    with nullcontext() if trace is None else TraceRouter(model, trace, layers=layers):
        _generate(model, tokens, prompt_tokens, seed=0)
        for seed in range(1, 1 + repeat):
            model.reset_stats()
            first = _generate(model, tokens, prompt_tokens, seed)
            stats = model.stats
            first_s.append(first.prompt_s)
            decode.append(stats.speed[Phase.DECODE].tokens_per_s)
            prefill.append(stats.speed[Phase.PREFILL].tokens_per_s)
            hits, host_hits, missed = (
                after - before for after, before in zip(_lookups(stats), first.lookups, strict=True)
            )
            accesses = hits + missed
            hit_rates.append(hits / accesses if accesses else 0.0)
            if Tier.CPU is not stats.computing:
                host_hit_rates.append(host_hits / missed if missed else 1.0)
        peaks = model.stats
    return Speeds(
        decode_tokens_per_s=median(decode) or None,
        prefill_tokens_per_s=median(prefill),
        time_to_first_token_s=median(first_s),
        hit_rate=median(hit_rates),
        host_hit_rate=median(host_hit_rates) if host_hit_rates else None,
        peak_rss_bytes=peaks.peak_rss_bytes,
        peak_gpu_bytes=peaks.peak_gpu_bytes,
    )


class _First:
    """A streamer that notes when the first token of a reply came, and what had been looked up until then."""

    def __init__(self, model: OffloadedModel) -> None:
        self.prompt_s = 0.0
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


def _lookups(stats: Stats) -> tuple[int, int, int]:
    """(hits of the tier that computes, hits of host memory behind it, misses of the tier that computes) so far."""

    counts = stats.tiers[stats.computing].counts
    host = 0 if stats.computing is Tier.CPU else stats.tiers[Tier.CPU].counts.hits
    return counts.hits, host, counts.accesses - counts.hits


def _generate(model: OffloadedModel, tokens: int, prompt_tokens: int, seed: int) -> _First:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
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
