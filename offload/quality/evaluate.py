"""What a configuration costs in quality: perplexity, KL divergence and agreement, against the model at full precision.

The reference runs first and leaves its logits on disk, then every configuration runs alone over the same tokens: never
are two models loaded. All are OffloadedModels within the user's budgets, so models that do not fit can be judged. Texts
are read in passes as long as the workspace allows, which stream every layer's experts once a pass; a configuration that
degrades experts on a miss reads token by token, as in decoding, where misses happen. So does its reference: kernels
round differently for one token and for many, and where routers are undecided that alone changes which experts are used.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

from cache.errors import BudgetError, ModelError, OffloadError
from offload.decide.presets import compose
from offload.model import OffloadedModel
from offload.options import LoadOptions, PlanOptions, load_options
from offload.plan.prepare import make_plan
from offload.plan.tuned import find_tuned
from offload.quality.logits import LogitFile, divergence, pass_logits
from offload.stats import precision_shares
from offload.system import memory
from offload.system.paths import cache_dir
from offload.system.progress import progress_bar
from offload.talk.prompts import prompt_ids
from offload.talk.reply import check_ids

DEFAULT_TOKENS = 2048
Mode = Literal["passes", "decode"]
"""Whether texts are read in long passes or token by token."""
_LOSSY = frozenset({"preset", "experts", "fallback", "dense"})
"""What the reference does without: keyword arguments of `from_pretrained` that change what a model says."""
_SHARE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


@dataclass(frozen=True)
class Evaluation:
    """What one configuration made of one text. Bytes, hits and speed are this text's; peaks are the configuration's."""

    model: str
    text: str
    configuration: dict[str, Any]
    """The keyword arguments of `from_pretrained` that it was opened with, beside those that all share."""
    mode: Mode
    tokens: int
    """How many tokens were predicted, each from what precedes it in its window."""
    window: int
    """The most tokens that were read before the context began anew."""
    perplexity: float
    reference_perplexity: float
    kl: float
    """KL(reference || configuration) of the next token, in nats, averaged over tokens."""
    top1_agreement: float
    """Of how many tokens both find the same one likeliest, as a share."""
    precision_shares: dict[str, float]
    """Expert uses by the precision that they ran at, as shares."""
    hit_rate: float
    bytes_from_disk: int
    bytes_over_link: int
    expert_cache_bytes: int
    """What the computing tier's expert cache holds."""
    tokens_per_s: float
    """While passes ran: comparing with the reference is not counted."""
    peak_rss_bytes: int
    """The most resident memory while this configuration was loaded, where the system can say (Linux); else so far."""
    peak_gpu_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; a number that is not finite is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def evaluate(
    model: str | Path,
    texts: Mapping[str, str | Sequence[str]],
    configurations: Sequence[Mapping[str, Any]] = ({},),
    *,
    tokens: int = DEFAULT_TOKENS,
    decode: bool = False,
    progress: bool = False,
    **options: Any,
) -> Iterator[Evaluation]:
    """Judge `configurations` of `model` on `texts`, by name: yields a row for each text and configuration.

    A text is one string, or a list of prompts, which go through the model's chat template where it has one. Only its
    first `tokens` tokens count. It is cut into windows as long as the context; every token of a window but the first
    is predicted. `options` are the keyword arguments of `OffloadedModel.from_pretrained` that all share, the reference
    included; a configuration's own come on top. Its `expert_cache` may be a share of all experts at the model's own
    precision, such as "25%". `decode` reads token by token; configurations with a `fallback` always do.

    The first text finds the caches empty, others as the text before left them. The logits of the reference, two bytes a
    word and token for a model of 16 bits, are kept under offload's cache folder until the iterator is closed; twice,
    where some configurations read token by token and some do not. Raises OffloadError before anything runs for texts
    and shares that are none, and what `from_pretrained` raises.
    """
    if not texts:
        raise OffloadError("there is no text to judge by")
    shares = [_cache_share(configuration) for configuration in configurations]
    every = [load_options({**options, **configuration}) for configuration in configurations]
    plans = [_planning(given, share) for given, share in zip(every, shares, strict=True)]
    modes: list[Mode] = ["decode" if decode or _falls_back(model, asked) else "passes" for asked in plans]
    plain = load_options({name: value for name, value in options.items() if name not in _LOSSY})
    _refuse(model, every, plans)
    with ExitStack() as stack:
        with _opened(model, plain) as reference:
            samples = [_sample(reference, str(model), name, text, tokens) for name, text in texts.items()]
            rows, plan = sum(sample.predicted for sample in samples), reference.plan
            words = reference.config.get_text_config().vocab_size
            file = stack.enter_context(LogitFile(cache_dir(), rows * len(set(modes)), words, reference.dtype))
            starts = {mode: number * rows for number, mode in enumerate(dict.fromkeys(modes))}
            with progress_bar("full precision", rows * len(starts), show=progress) as bar:
                for mode, sample in itertools.product(starts, samples):
                    for logits in _logits(reference, sample, mode):
                        file.append(logits)
                        bar.advance(len(logits))
        del reference
        for number, (given, share, mode) in enumerate(zip(every, shares, modes, strict=True)):
            if share is not None:
                given = replace(given, expert_cache=math.ceil(share * plan.experts) * plan.slot_bytes)
            title = f"configuration {number + 1} of {len(every)}"
            with _opened(model, given) as loaded, progress_bar(title, rows, show=progress) as bar:
                row = starts[mode]
                for sample in samples:
                    loaded.reset_stats()
                    found = _Comparison()
                    for logits in _logits(loaded, sample, mode):
                        found.add(file.read(row, len(logits)), logits, sample.targets[found.tokens :][: len(logits)])
                        row += len(logits)
                        bar.advance(len(logits))
                    yield _row(loaded, sample, dict(configurations[number]), mode, found)
            del loaded


def _refuse(model: str | Path, every: Sequence[LoadOptions], plans: Sequence[PlanOptions]) -> None:
    """Raise what opening a configuration would, before the reference runs."""
    for given, asked in zip(every, plans, strict=True):
        compose(asked, partial(find_tuned, model, asked)).check_profile(given.profile)
    for asked in dict.fromkeys(plans):
        make_plan(model, asked)


@dataclass(frozen=True)
class _Sample:
    """A text as windows of token ids, two or more each."""

    name: str
    windows: Sequence[torch.Tensor]

    @property
    def targets(self) -> torch.Tensor:
        """Every token that is predicted."""
        return torch.cat([window[1:] for window in self.windows])

    @property
    def predicted(self) -> int:
        """How many there are."""
        return sum(len(window) - 1 for window in self.windows)


@dataclass
class _Comparison:
    """Sums over tokens."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Two models' logits [M, V], and the tokens [M] that came."""
        p, q = (functional.log_softmax(rows.double(), -1) for rows in (reference, logits))
        chosen = targets.unsqueeze(-1)
        self.tokens += len(targets)
        self.reference_loss -= float(p.gather(-1, chosen).sum())
        self.loss -= float(q.gather(-1, chosen).sum())
        self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.kl += divergence(p, q)


@contextmanager
def _opened(model: str | Path, options: LoadOptions) -> Iterator[OffloadedModel]:
    """A model of its own: what is left of the one before is collected first, and the peak of memory begins anew."""
    gc.collect()
    memory.restart_peak()
    with OffloadedModel.open(model, options) as loaded:
        yield loaded


def _sample(model: OffloadedModel, name: str, text_name: str, text: str | Sequence[str], tokens: int) -> _Sample:
    """The first `tokens` tokens of a text, in windows. Raises ModelError and OffloadError."""
    if model.tokenizer is None:
        raise ModelError(f"{name} has no tokenizer: texts cannot be read")
    if isinstance(text, str):
        documents = [list(model.tokenizer(text, verbose=False)["input_ids"])]
    else:
        documents = [prompt_ids(model, name, prompt) for prompt in text]
    windows = []
    for document in documents:
        document = document[: max(tokens, 0)]
        tokens -= len(document)
        if document:
            check_ids(model, document)
        windows += [window for window in torch.tensor(document).split(model.context) if len(window) > 1]
    if not windows:
        raise OffloadError(f"{text_name} has less than two tokens to judge by: give a longer text or more --tokens")
    return _Sample(text_name, windows)


def _logits(model: OffloadedModel, sample: _Sample, mode: Mode) -> Iterator[torch.Tensor]:
    """What the model says of every target, as blocks [M, V] on the CPU."""
    for window in sample.windows:
        cache = None
        for ids in window[:-1].to(model.device).split(1 if mode == "decode" else model.plan.chunk):
            blocks, cache = pass_logits(model, ids.unsqueeze(0), cache)
            yield from (rows[0] for rows in blocks)


def _row(
    model: OffloadedModel,
    sample: _Sample,
    configuration: dict[str, Any],
    mode: Mode,
    found: _Comparison,
) -> Evaluation:
    stats = model.stats
    report = stats.tiers[stats.computing]
    speeds = stats.speed.values()
    return Evaluation(
        model=model.plan.model,
        text=sample.name,
        configuration=configuration,
        mode=mode,
        tokens=found.tokens,
        window=max(map(len, sample.windows)),
        perplexity=_exp(found.loss / found.tokens),
        reference_perplexity=_exp(found.reference_loss / found.tokens),
        kl=found.kl / found.tokens,
        top1_agreement=found.agreed / found.tokens,
        precision_shares=precision_shares(stats.precision_uses, stats.dropped_share),
        hit_rate=stats.hit_rate,
        bytes_from_disk=stats.bytes_from_disk,
        bytes_over_link=stats.bytes_over_link,
        expert_cache_bytes=report.capacity_bytes,
        tokens_per_s=sum(speed.tokens for speed in speeds) / sum(speed.seconds for speed in speeds),
        peak_rss_bytes=stats.peak_rss_bytes,
        peak_gpu_bytes=stats.peak_gpu_bytes,
    )


def _planning(options: LoadOptions, share: float | None) -> PlanOptions:
    """The options that a plan is made by, without a cache that is a share of all experts."""
    given = {field.name: getattr(options, field.name) for field in fields(PlanOptions)}
    return PlanOptions(**given | ({} if share is None else {"expert_cache": None}))


def _falls_back(model: str | Path, options: PlanOptions) -> bool:
    return compose(options, partial(find_tuned, model, options)).fallback != "none"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _cache_share(configuration: Mapping[str, Any]) -> float | None:
    """The share of all experts that a configuration's expert cache is to hold, if it is given as one."""
    given = configuration.get("expert_cache")
    match = _SHARE.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share <= 1:
        raise BudgetError(f"--expert-cache {given}: a share of all experts is above 0% and at most 100%")
    return share
