"""Router logits, as transformers returns them with `output_router_logits=True`, one file a sequence.

A .safetensors or .npz file has `layer.N` [tokens, experts] for each MoE layer N of one forward pass over prompt and
reply; and in the metadata of the one, or as an array of the other, `prompt_tokens`, if anyone said so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.imports.arrays import read_npz, whole_number
from cache.traces.imports.logged import ImportOptions, Logged
from cache.traces.tensorfile import read_tensors

NAME = "transformers"
SUFFIXES = (".safetensors", ".npz")
METADATA = {"score_function": "softmax"}

_LAYER = re.compile(r"layer\.(0|[1-9]\d{0,5})")
_PROMPT = "prompt_tokens"
_BLOCK = 4096  # tokens
_SUM_TO_ONE = 1e-2  # as near as probabilities in half precision come


def sequences(files: Sequence[Path], options: ImportOptions) -> Iterator[Logged]:
    """A sequence a file. Raises TraceError and OSError."""
    options.refuse(NAME, "layers")
    if options.top_k is None:
        raise TraceError("logits do not say how many experts a token goes to: give --top-k")
    for path in files:
        yield _sequence(path, options.top_k, options)


def _sequence(path: Path, top_k: int, options: ImportOptions) -> Logged:
    by_layer, prompt = _read(path)
    if prompt is None:
        prompt = options.prompt_tokens
    elif options.prompt_tokens is not None:
        raise TraceError(f"{path} says itself that its prompt has {prompt} tokens: leave --prompt-tokens out")
    layers = tuple(sorted(by_layer))
    tokens, num_experts = _shape(path, by_layer)
    if options.num_experts not in (None, num_experts):
        raise TraceError(f"{path} has logits of {num_experts} experts, not of {options.num_experts}")
    if top_k > num_experts:
        raise TraceError(f"--top-k {top_k}: {path} has logits of {num_experts} experts")
    experts = np.empty((tokens, len(layers), top_k), np.int64)
    weights = np.empty(experts.shape, np.float32)
    scores = np.empty((tokens, len(layers), num_experts), np.float16) if options.scores else None
    for place, layer in enumerate(layers):
        for start in range(0, tokens, _BLOCK):
            rows = slice(start, start + _BLOCK)
            logits = _logits(by_layer[layer][rows], f'{path}: "layer.{layer}"', start, top_k)
            experts[rows, place], weights[rows, place] = _chosen(logits, top_k)
            if scores is not None:
                scores[rows, place] = _half(logits, f'{path}: "layer.{layer}"')
    return Logged(str(path), num_experts, layers, experts, prompt, weights, scores)


def _read(path: Path) -> tuple[dict[int, NDArray[Any]], int | None]:
    """The arrays by layer, and the prompt's length, where the file says it."""
    arrays: Mapping[str, NDArray[Any]]
    prompt = None
    if path.suffix == ".npz":
        arrays = dict(read_npz(path))
        if _PROMPT in arrays:
            prompt = whole_number(arrays.pop(_PROMPT), f"{path}: {_PROMPT}")
    else:
        arrays, metadata = read_tensors(path)
        if _PROMPT in metadata:
            text = metadata[_PROMPT]
            if not (text.isascii() and text.isdigit()):
                raise TraceError(f'{path}: {_PROMPT} in its metadata is "{text[:40]}", not a whole number')
            prompt = int(text)
    by_layer = {}
    for name, array in arrays.items():
        if not (match := _LAYER.fullmatch(name)):
            raise TraceError(f'{path} has "{name[:40]}", where each array is called "layer.N" (docs/traces.md)')
        by_layer[int(match[1])] = array
    if not by_layer:
        raise TraceError(f'{path} has no array "layer.N": save one for each MoE layer (docs/traces.md)')
    return by_layer, prompt


def _shape(path: Path, by_layer: Mapping[int, NDArray[Any]]) -> tuple[int, int]:
    first = min(by_layer)
    wanted = by_layer[first].shape
    for layer, array in sorted(by_layer.items()):
        name, shape = f'{path}: "layer.{layer}"', list(array.shape)
        if array.dtype.kind != "f":
            raise TraceError(f"{name} holds {array.dtype}, not logits")
        if array.ndim != 2:
            raise TraceError(f"{name} has the shape {shape}, not [tokens, experts]: save one sequence a file")
        if array.shape != wanted:
            raise TraceError(f'{name} has the shape {shape}, and "layer.{first}" {list(wanted)}')
    if not wanted[0]:
        raise TraceError(f"{path} has no token")
    return int(wanted[0]), int(wanted[1])


def _logits(values: NDArray[Any], name: str, start: int, top_k: int) -> NDArray[np.float64]:
    """`values` as logits, also where they are probabilities, which some versions of transformers return instead."""
    logits = values.astype(np.float64)
    wrong = np.isnan(logits) | (logits == np.inf)
    if wrong.any():
        token, expert = np.unravel_index(wrong.argmax(), wrong.shape)
        raise TraceError(f"{name}: token {start + token}, expert {expert}: a logit of {logits[token, expert]}")
    if (logits >= 0).all() and (np.abs(logits.sum(1) - 1) < _SUM_TO_ONE).all():
        logits = np.log(logits, out=np.full(logits.shape, -np.inf), where=logits > 0)
    few = (logits > -np.inf).sum(1) < top_k
    if few.any():
        raise TraceError(f"{name}: token {start + few.argmax()} may have fewer than {top_k} experts")
    return logits


def _chosen(logits: NDArray[np.float64], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The experts of the largest logits, ties by id, and the softmax over these."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(logits, order, axis=1)
    shares = np.exp(best - best[:, :1])
    return order, (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def _half(logits: NDArray[np.float64], name: str) -> NDArray[np.float16]:
    largest = float(np.abs(logits[np.isfinite(logits)]).max())
    if largest > float(np.finfo(np.float16).max):
        raise TraceError(f"{name}: a logit of size {largest:g} is more than scores hold: leave --scores out")
    return logits.astype(np.float16)
