"""One sequence as another program logged it, checked; and a trace of many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.trace import DECODE, PREFILL, describe, expert_dtype
from cache.traces.writer import Rows, TraceWriter, remove_partial

_PROMPTS_UNKNOWN = "not marked: every token counts as decoded"
_NO_WEIGHTS = "equal: the log has none"


@dataclass(frozen=True)
class ImportOptions:
    """What a log does not say itself. What is given and has no meaning for a format is a TraceError.

    `num_experts`: of a layer, where the log has ids only. `top_k`: experts a token goes to, where it has logits only.
    `prompt_tokens`: so many first tokens of every sequence are its prompt. `layers`: which layers of a log's arrays are
    MoE layers. `scores`: whether logits become the trace's scores. `limit`: the most sequences.
    """

    num_experts: int | None = None
    top_k: int | None = None
    prompt_tokens: int | None = None
    layers: tuple[int, ...] | None = None
    scores: bool = False
    limit: int | None = None

    def refuse(self, format: str, *names: str) -> None:
        """Raises TraceError for the first of `names` that was given."""
        for name in names:
            if getattr(self, name) not in (None, False):
                flag = "--" + name.replace("_", "-")
                raise TraceError(f"{flag} does nothing for a log of the format {format}: leave it out")


@dataclass(frozen=True)
class Logged:
    """A sequence of n tokens. Making one checks it, and raises TraceError that says what is wrong and where.

    `experts` are integers [n, L, K] below `num_experts`, those of one token and layer all different. `weights` are
    float32 [n, L, K], descending, and `scores` float16 [n, L, E], where the log has them. `layers` are the model's
    indices. The first `prompt` tokens were read in one pass, each further one is decoded; None: the log does not say.
    """

    name: str
    num_experts: int
    layers: tuple[int, ...]
    experts: NDArray[np.int64]
    prompt: int | None
    weights: NDArray[np.float32] | None = None
    scores: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        tokens, layers, top_k = self.experts.shape
        if not tokens or not layers or not top_k:
            raise TraceError(
                f"{self.name}: {tokens} tokens, {layers} layers, {top_k} experts a token: there is nothing"
            )
        if self.prompt is not None and not 0 <= self.prompt <= tokens:
            raise TraceError(f"{self.name}: a prompt of {self.prompt} tokens, in a sequence of {tokens}")
        if self.num_experts < top_k:
            raise TraceError(f"{self.name}: a token goes to {top_k} experts, of {self.num_experts}")
        outside = (self.experts < 0) | (self.experts >= self.num_experts)
        self._refuse(outside, self.experts, f"expert {{}} of {self.num_experts}")
        ordered = np.sort(self.experts, axis=-1)
        self._refuse(ordered[..., 1:] == ordered[..., :-1], ordered[..., 1:], "expert {} twice")

    def _refuse(self, wrong: NDArray[np.bool_], values: NDArray[Any], what: str) -> None:
        if wrong.any():
            token, layer, _ = place = np.unravel_index(wrong.argmax(), wrong.shape)
            raise TraceError(f"{self.name}: token {token}, layer {self.layers[layer]}: {what.format(values[place])}")

    @property
    def shape(self) -> dict[str, Any]:
        """What all sequences of a trace have in common, by the words that an error has for it."""
        return {
            "the MoE layers": list(self.layers),
            "experts a layer": self.num_experts,
            "experts a token": self.experts.shape[2],
        }

    def passes(self, sequence: int, forward: int) -> Iterable[Rows]:
        """The rows of its forward passes, which are numbered from `forward`."""
        tokens = len(self.experts)
        prompt = self.prompt or 0
        ends = [*([prompt] if prompt else []), *range(prompt + 1, tokens + 1)]
        weights = self.weights
        if weights is None:
            weights = np.full(self.experts.shape, 1 / self.experts.shape[2], np.float32)
        experts = self.experts.astype(expert_dtype(self.num_experts))
        for step, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            rows = slice(start, end)
            yield Rows(
                np.full(end - start, sequence),
                forward + step,
                step,
                np.full(end - start, PREFILL if end <= prompt else DECODE, np.uint8),
                experts[rows],
                weights[rows],
                None if self.scores is None else self.scores[rows],
            )


def write_logged(
    sequences: Iterable[Logged],
    path: str | os.PathLike[str],
    metadata: dict[str, str],
    *,
    on_sequence: Callable[[], object] = lambda: None,
    overwrite: bool = False,
) -> int:
    """Write the trace `path` of `sequences`, and give their number.

    Atomic: after an error nothing is there, and after a KeyboardInterrupt, which goes on, a trace of the sequences that
    were written. `metadata` is what the user and the format say; the rest is added. Raises TraceError for sequences
    that are not of one model, and for none; OutputError and DiskSpaceError.
    """
    writer: TraceWriter | None = None
    first: Logged | None = None
    forward = count = 0
    try:
        for sequence in sequences:
            if writer is None or first is None:
                first = sequence
                if overwrite:
                    remove_partial(path)
                writer = TraceWriter(path, _described(first, metadata), scores=first.scores is not None)
            _same_model(first, sequence)
            for rows in sequence.passes(count, forward):
                writer.append(rows)
                forward = rows.forward + 1
            writer.keep()
            count += 1
            on_sequence()
    except KeyboardInterrupt:
        if writer is not None:
            writer.finish()
        raise
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    if writer is None:
        raise TraceError("the log has no sequence")
    writer.finish()
    return count


def _described(first: Logged, metadata: dict[str, str]) -> dict[str, str]:
    layers, top_k = first.experts.shape[1:]
    said = {**metadata, **describe(layers, first.num_experts, top_k, first.layers)}
    if first.weights is None:
        said["weights"] = _NO_WEIGHTS
    if first.prompt is None:
        said["prompts"] = _PROMPTS_UNKNOWN
    return said


def _same_model(first: Logged, other: Logged) -> None:
    for what, here in first.shape.items():
        if other.shape[what] != here:
            raise TraceError(f"{other.name}: {what}: {other.shape[what]}, and in {first.name} {here}: not of one model")
    if (first.prompt is None) != (other.prompt is None):
        without, having = (first, other) if first.prompt is None else (other, first)
        raise TraceError(f"{having.name} says how long its prompt is, {without.name} does not")
