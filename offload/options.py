"""What a user can ask of a model, stated once: these fields are the flags, and the keywords of `from_pretrained`.

Three classes, each with all that the one before has: which checkpoint, what goes where, and what a running model
decides by. None means "not said"; what runs then is decided where the option is used. Sizes are bytes, or text such as
"8G" (binary) and "7.5GB" (decimal). A new option is a field here, a flag in `offload/terminal/flags.py`, and its use.
"""

from __future__ import annotations

import difflib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from cache.errors import OffloadError

_P = ParamSpec("_P")
_Model = TypeVar("_Model")

RENAMED: Mapping[str, str] = {"policy_profile": "profile", "predictor_profile": "profile"}
"""Options by names that they had before, which are still taken."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which checkpoint, and what computes it.

    device: "auto", "cpu", "cuda", "cuda:N", or "emulated": an accelerator made of host memory behind a link.
    dtype: of hidden states: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
    revision: branch, tag or commit on the hub.
    exact: whether the CPU computes with the bits of torch's own kernels. False lets our products with plain bfloat16
        and float16 matrices, where they are faster, and a token's attention to shared keys and values round otherwise,
        several times as fast. By default it is False on CPUs without bfloat16 instructions, where torch's are slow.
    trust_remote_code: run Python code that comes with the model.
    local_files_only: use what is on disk, never the network.
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    exact: bool | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ModelOptions):
    """How many bytes of what go where.

    gpu_mem: most accelerator memory; by default most of what is free.
    cpu_mem: most resident memory of the whole process, its peak included; by default most of what is free.
    expert_cache: cap on the expert cache of the tier that computes, inside its budget.
    context: tokens of KV cache to keep room for, all sequences together; by default 4096, or the model's own limit.
    link: speed of the emulated device's link, in bytes/s or as in "3GB/s".
    preset: a published system (docs/presets.md), whose parts run where no option says otherwise; "auto" is what
        `offload tune` stored for this model, device and budgets.
    scheduler: who computes what the accelerator lacks: "gpu-only" (the default) fetches it, "cpu-only" leaves it to the
        CPU, "auto" and others divide each layer between the two (docs/scheduling.md).
    experts: what experts are stored and computed at: "auto" (the default), the checkpoint's own precision, or "bf16",
        "int8", "nf4", "int4", "int3", "int2". Experts are converted on first use, once. With a fallback several of
        them, the best first, as in "auto,nf4" or "int8>int4" (docs/precision.md). All but "auto" may change what the
        model says.
    fallback: which of several precisions serves an expert that is not there (docs/precision.md). All but "none" are
        lossy.
    expert_store: folder of converted experts; by default in offload's cache folder.
    activations: "int8" rounds what products with NF4 matrices on the CPU take in to 8 bits, in blocks of 64, which is
        faster and lossy; "auto" (the default) does not.
    dense: what linear layers that belong to no expert are stored and computed at, routers and gates excepted: "auto"
        (as they are), "bf16", "int8" or "nf4", converted while they are loaded. All but "auto" are lossy.
    """

    gpu_mem: str | int | None = None
    cpu_mem: str | int | None = None
    expert_cache: str | int | None = None
    context: int | None = None
    link: str | float | None = None
    preset: str | None = None
    scheduler: str | None = None
    experts: str | None = None
    fallback: str | None = None
    expert_store: str | Path | None = None
    dense: str = "auto"
    activations: str = "auto"

    def __post_init__(self) -> None:
        _check_whole(self, "context")
        _check_kind(self, str, "device", "preset", "scheduler", "experts", "fallback", "dense", "activations")
        _check_kind(self, str | os.PathLike, "expert_store")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(PlanOptions):
    """What a loaded model decides by.

    policy: which expert leaves a full cache: "lfru" (the default) and others (docs/policies.md), or `module:Class`,
        with parameters as in "lfu(reset=True)".
    pool: "global" (the default): one cache for all layers; "layer": one for each.
    quota: how layers with a cache each divide the room (docs/policies.md#how-layers-share): "even" (the default),
        "shallow", "dp", "distinct", "plec", or `module:Class`. It implies pool="layer".
    predictor: which experts come next, to fetch them ahead (docs/predictors.md), or `module:Class`. By default the next
        layers' gates are asked, where there is something to fetch and they can be, and it pays; "none" fetches on
        demand.
    prefetcher: which of the experts that the predictor expects are fetched, in which order: "ours" (the default) and
        others (docs/predictors.md), or `module:Class`.
    prefetch_depth: how many layers ahead experts are fetched, where there is time; by default the prefetcher's own, 2
        for most.
    profile: recorded trace that a policy, a quota, and a predictor, which learns is trained on.
    placement: which experts are in memory before the first token: "empty" (the default), "popular" (those that the
        profile used most, or this model before), "random", or `module:Class`.
    prefill: how prompts are read (docs/prefill.md): "streamed" keeps the experts that most of their tokens go to, and
        fetches the next layer's while one computes; "kept" only keeps them; "on-demand" does neither; "auto" is the
        first, or the last with a lossy fallback.
    threads: how many compute on the CPU, at most one a core; by default torch's choice, and one where experts are
        small.
    """

    policy: str | None = None
    pool: str | None = None
    quota: str | None = None
    predictor: str | None = None
    prefetcher: str | None = None
    prefetch_depth: int | None = None
    profile: str | Path | None = None
    placement: str | None = None
    prefill: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole(self, "prefetch_depth", "threads")
        _check_kind(self, str, "policy", "pool", "quota", "predictor", "prefetcher", "placement", "prefill")
        _check_kind(self, str | os.PathLike, "profile")


@dataclass(frozen=True, kw_only=True)
class Keywords(LoadOptions):
    """What `OffloadedModel.from_pretrained` takes by name.

    progress: show on standard error what is downloaded, converted and loaded.
    """

    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen and when to stop; what is None comes from the model's generation config.

    Raises OffloadError for numbers that nothing can be chosen by, and for a combination that contradicts itself.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_whole(self, "max_new_tokens", "seed")
        if self.temperature is not None and self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise OffloadError(
                f"--temperature {self.temperature}: it is 0, which always takes the likeliest token, or lies between "
                "1e-6 and 1e6"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OffloadError(
                f"--top-p {self.top_p}: give a share above 0 and up to 1, or --temperature 0 for the likeliest token"
            )
        if self.temperature == 0 and self.top_p is not None:
            raise OffloadError("--top-p does nothing with --temperature 0: leave one of them out")


def _check_whole(options: Any, *names: str) -> None:
    """Raises OffloadError for a field that is said and no whole number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise OffloadError(f"--{name.replace('_', '-')} {value!r}: write a whole number")


def _check_kind(options: Any, kind: Any, *names: str) -> None:
    """Raises OffloadError for a field that is said and of another kind than text, or a path."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not isinstance(value, kind):
            raise OffloadError(f"--{name.replace('_', '-')} {value!r}: write {'text' if kind is str else 'a path'}")


def renamed(given: Mapping[str, Any], say: Callable[[str, str], object]) -> dict[str, Any]:
    """`given` with the names that options have now; `say` is told an old name and the one that it has now.

    Raises OffloadError where names that are one option now are given two values.
    """
    found = {name: value for name, value in given.items() if name not in RENAMED}
    for old, new in RENAMED.items():
        value = given.get(old)
        if value is None:
            continue
        say(old, new)
        if found.get(new) not in (None, value):
            flags = (f"--{name.replace('_', '-')}" for name in (old, new))
            raise OffloadError(f"{' is '.join(flags)} now, and there is one: give {found[new]} or {value}, not both")
        found[new] = value
    return found


def load_options(given: Mapping[str, Any], stacklevel: int = 2) -> LoadOptions:
    """The options that are `given` by name, in Python. Warns of names that options had before, at `stacklevel`.

    Raises TypeError for a name that no option has, as Python does.
    """
    names = [field.name for field in fields(Keywords)]
    for name in given:
        if name not in (*names, *RENAMED):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise TypeError(f"from_pretrained() got an unexpected keyword argument '{name}'{hint}")

    def say(old: str, new: str) -> None:
        warnings.warn(f"{old}= is {new}= now", DeprecationWarning, stacklevel=stacklevel + 2)

    found = renamed(given, say)
    if "device" in found:
        found["device"] = "auto" if found["device"] is None else str(found["device"])  # a torch.device is taken, too
    return LoadOptions(**found)


def takes(
    keywords: Callable[_P, LoadOptions],
) -> Callable[[Callable[..., _Model]], Callable[Concatenate[type[_Model], str | Path, _P], _Model]]:
    """The decorated method has the parameters of `keywords` in place of its own `**`, and their explanations.

    For people who ask for help, for type checkers and for editors alike. The method takes a class and a model's name.
    """

    def decorate(method: Callable[..., _Model]) -> Callable[Concatenate[type[_Model], str | Path, _P], _Model]:
        signature = inspect.signature(method)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = inspect.signature(keywords).parameters.values()
        explained: Any = method
        explained.__signature__ = signature.replace(parameters=[*own, *named])
        texts = [inspect.getdoc(each) or "" for each in (method, ModelOptions, PlanOptions, LoadOptions, keywords)]
        explained.__doc__ = "\n\n".join(texts)
        return method

    return decorate
