"""Traces written as other programs would have logged them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.imports.logged import ImportOptions
from cache.traces.imports.read import Log
from cache.traces.tensorfile import Column, write_tensors
from cache.traces.trace import DECODE, PREFILL, Trace


def sequences(trace: Trace) -> Iterator[tuple[int, slice, int]]:
    """Number, rows and length of the prompt of each sequence."""
    for number in range(trace.num_sequences):
        start, end = trace.sequence_offsets[number : number + 2].tolist()
        yield number, slice(start, end), int((trace.phase[start:end] == PREFILL).sum())


def as_npy(ids: NDArray[Any]) -> str:
    """A .npy file in base64, as vLLM's server answers."""
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


def transformers_log(trace: Trace, folder: Path, kind: str = "safetensors") -> Path:
    """A file a sequence, of the trace's scores as logits."""
    assert trace.scores is not None
    for number, rows, prompt in sequences(trace):
        arrays = {f"layer.{layer}": trace.scores[rows, place] for place, layer in enumerate(trace.layers)}
        save_logits(folder / f"{number:03}.{kind}", arrays, prompt)
    return folder


def save_logits(path: Path, arrays: dict[str, NDArray[Any]], prompt: Any = None) -> Path:
    """`layer.N` and the prompt's length, where it is known."""
    if path.suffix == ".npz":
        np.savez(path, **arrays, **({} if prompt is None else {"prompt_tokens": prompt}))  # type: ignore[arg-type]
    else:
        columns = {name: Column(array.dtype, array.shape, [array]) for name, array in arrays.items()}
        write_tensors(path, columns, {} if prompt is None else {"prompt_tokens": str(prompt)})
    return path


def vllm_log(trace: Trace, folder: Path, kind: str = "npz") -> Path:
    """A file or line a sequence: "npz", "apart" (the prompt's ids), "jsonl", or "server" for its responses."""
    lines = []
    for number, rows, prompt in sequences(trace):
        ids = trace.experts[rows].astype(np.int32)
        path = folder / f"{number:03}.npz"
        if kind == "npz":
            np.savez(path, routed_experts=ids, prompt_tokens=prompt)
        elif kind == "apart":
            np.savez(path, routed_experts=ids[prompt:].astype(np.int16), prompt_routed_experts=ids[:prompt])
        elif kind == "jsonl":
            lines.append({"id": number, "routed_experts": ids.tolist(), "prompt_tokens": prompt})
        else:
            choices = [{"index": 0, "routed_experts": as_npy(ids)}]
            lines.append({"choices": choices, "usage": {"prompt_tokens": prompt}})
    if lines:
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


def orders_log(trace: Trace, folder: Path, dense: tuple[int, ...] = ()) -> Path:
    """A file a request, with null for `dense` layers."""
    for number, rows, prompt in sequences(trace):
        ids = trace.experts[rows]
        ends = [prompt, *range(prompt + 1, len(ids) + 1)]
        passes = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            by_layer: dict[str, Any] = {str(layer): None for layer in dense}
            by_layer |= {str(layer): ids[start:end, place].tolist() for place, layer in enumerate(trace.layers)}
            passes.append(by_layer)
        place = folder / "model" / "mmlu" / f"subject-{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03}.json").write_text(json.dumps(passes))
    return folder


def made_trace(
    seed: int, lengths: tuple[int, ...], layers: tuple[int, ...] = (0, 1), experts: int = 6, top_k: int = 2
) -> Trace:
    """Sequences of random logits whose prompts are their first half, or one token; their weights are the softmax over
    the chosen logits."""
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.linspace(-2, 2, experts), axis=-1)
    scores = np.stack([rng.permuted(scores) for _ in range(sum(lengths) * len(layers))])
    scores = scores.reshape(sum(lengths), len(layers), experts).astype(np.float16)
    ids = np.argsort(-scores, axis=-1)[..., :top_k]
    best = np.exp(np.take_along_axis(scores, ids, axis=-1).astype(np.float64))
    prompts = [max(1, length // 2) for length in lengths]
    steps = [np.maximum(np.arange(n) - p + 1, 0) for n, p in zip(lengths, prompts, strict=True)]
    phases = [np.where(np.arange(n) < p, PREFILL, DECODE) for n, p in zip(lengths, prompts, strict=True)]
    return Trace.from_arrays(
        ids,
        best / best.sum(-1, keepdims=True),
        np.cumsum([0, *lengths]),
        num_experts=experts,
        step=np.concatenate(steps),
        phase=np.concatenate(phases),
        scores=scores,
        metadata={"layers": ",".join(map(str, layers))},
    )


def imported(source: Path, options: ImportOptions, format: str = "auto") -> Trace:
    """The trace of the log, beside it."""
    out = source.parent / "out.safetensors"
    Log(source, format).write(out, options, overwrite=True)
    return Trace.open(out)
