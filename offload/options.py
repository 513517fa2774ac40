"""What a user can ask of a model, stated once: these fields are the flags, and the keywords of `from_pretrained`.

Three classes, each with all that the one before has: which checkpoint (`ModelOptions`), what goes where
(`PlanOptions`), and what a running model decides by (`LoadOptions`). None means "not said": what runs then is decided
where the option is used. Sizes are bytes, or text such as "8G" (binary) and "7.5GB" (decimal).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.errors import OffloadError


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which checkpoint, and what it is computed with."""

    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:N", or "emulated": an accelerator of host memory behind a link of some speed."""
    dtype: str = "auto"
    """What hidden states are computed in: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16"."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    local_files_only: bool = False
    """Use what is on disk, never the network."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ModelOptions):
    """What decides how many bytes of what go where: budgets and precisions."""

    gpu_mem: str | int | None = None
    """Most accelerator memory; by default most of what is free."""
    cpu_mem: str | int | None = None
    """Most resident memory of the whole process, its peak included; by default most of what is free."""
    expert_cache: str | int | None = None
    """Cap on the expert cache of the tier that computes, inside its budget."""
    context: int | None = None
    """Tokens of KV cache to keep room for, all sequences together; by default 4096, or the model's own limit."""
    link: str | float | None = None
    """Speed of the emulated device's link, in bytes/s or as in "3GB/s"."""
    preset: str | None = None
    """A published system (docs/presets.md), whose parts run where no option says otherwise; "auto" is what
    `offload tune` stored for this model, device and budgets."""
    scheduler: str | None = None
    """Who computes what the accelerator lacks: "gpu-only" (the default) fetches it, "cpu-only" leaves it to the CPU,
    "auto" and others divide each layer between the two (docs/scheduling.md)."""
    experts: str | None = None
    """What experts are stored and computed at: "auto" (the default), the checkpoint's own precision, or bf16, int8,
    nf4, int4, int2; with a `fallback` several of them, the best first: "auto,nf4", "int8>int4" (docs/precision.md)."""
    fallback: str | None = None
    """Which of several precisions serves an expert that is not there (docs/precision.md). All but "none" are lossy."""
    expert_store: str | Path | None = None
    """The folder of converted experts; by default in offload's cache folder."""
    dense: str = "auto"
    """What linear layers that belong to no expert are stored and computed at, routers and gates excepted: "auto" (as
    they are), "bf16", "int8" or "nf4", converted while they are loaded."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions(PlanOptions):
    """Everything that loading a model takes."""

    policy: str | None = None
    """Which expert leaves a full cache: "lfru" (the default) and others (docs/policies.md), or `module:Class`, with
    parameters as in "lfu(reset=True)"."""
    policy_profile: str | Path | None = None
    """The recorded trace that a policy which learns is trained on."""
    pool: str | None = None
    """"global" (the default): one cache for all layers; "layer": one for each."""
    predictor: str | None = None
    """Which experts come next, to fetch them ahead (docs/predictors.md), or `module:Class`. By default the next layers'
    gates are asked, where there is something to fetch and they can be, and it pays; "none" fetches on demand."""
    predictor_profile: str | Path | None = None
    """The recorded trace that a predictor which learns is trained on."""
    prefetch_depth: int | None = None
    """How many layers ahead experts are fetched; 2 by default."""
    prefill: str = "auto"
    """How prompts are read: "streamed", "kept" or "on-demand"; "auto" is the first that there is (docs/prefill.md)."""
    threads: int | None = None
    """CPU threads that compute; by default torch's choice, one where experts are small or the device is emulated."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen and when to stop; what is None comes from the model's generation config.

    Raises OffloadError for a combination that contradicts itself.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.top_p is not None:
            raise OffloadError("--top-p does nothing with --temperature 0: leave one of them out")
