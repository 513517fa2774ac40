"""The traces of "Patterns behind Chaos", before "Orders in Chaos" (arXiv:2510.05497), Hugging Face's dataset
core12345/MoE_expert_selection_trace: one JSON file a request, in folders MODEL/BENCHMARK/SUBJECT.

A file is a list of forward passes; the first reads the prompt, the others decode. A pass is an object that has for each
layer of the model, by its index as a text, the experts of each token [tokens, K], or null for a layer without experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.imports.arrays import table_of_ids
from cache.traces.imports.logged import ImportOptions, Logged

NAME = "orders-in-chaos"
SUFFIXES = (".json",)
METADATA: dict[str, str] = {}


def sequences(files: Sequence[Path], options: ImportOptions) -> Iterator[Logged]:
    """A sequence a file. Raises TraceError and OSError."""
    options.refuse(NAME, "top_k", "prompt_tokens", "layers", "scores")
    if options.num_experts is None:
        raise TraceError("expert ids do not say how many experts there are: give --num-experts")
    for path in files:
        yield _sequence(path, options.num_experts)


def _sequence(path: Path, num_experts: int) -> Logged:
    passes = [_pass(f"{path}, pass {number}", values) for number, values in enumerate(_read(path))]
    layers = sorted(passes[0])
    for number, by_layer in enumerate(passes):
        if sorted(by_layer) != layers:
            odd = min(set(layers) ^ set(by_layer))
            raise TraceError(f"{path}, pass {number}: layer {odd} has experts in some passes, and none in others")
        if number and len(by_layer[layers[0]]) != 1:
            raise TraceError(f"{path}, pass {number}: {len(by_layer[layers[0]])} tokens, where one is decoded")
    widths = {ids.shape[1] for by_layer in passes for ids in by_layer.values()}
    if len(widths) > 1:
        raise TraceError(f"{path}: tokens go to {min(widths)} experts, and to {max(widths)}")
    experts = np.concatenate([np.stack([by_layer[layer] for layer in layers], axis=1) for by_layer in passes])
    return Logged(str(path), num_experts, tuple(layers), experts, len(passes[0][layers[0]]))


def _read(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise TraceError(f"{path} is not JSON") from error
    if not isinstance(values, list) or not values:
        raise TraceError(f"{path} is not a list of forward passes")
    return values


def _pass(name: str, values: Any) -> dict[int, NDArray[np.int64]]:
    """The ids [tokens, K] of each layer that has experts."""
    if not isinstance(values, dict):
        raise TraceError(f"{name} is not an object of layers")
    found: dict[int, NDArray[np.int64]] = {}
    for key, ids in values.items():
        if not (key.isascii() and key.isdigit() and len(key) < 7 and str(int(key)) == key):
            raise TraceError(f'{name}: "{key[:40]}" is no layer')
        if ids is not None:
            found[int(key)] = table_of_ids(ids, 2, f"{name}, layer {key}")
    if not found:
        raise TraceError(f"{name}: no layer has experts")
    lengths = {len(ids): layer for layer, ids in found.items()}
    if len(lengths) > 1:
        (one, here), (other, there), *_ = lengths.items()
        raise TraceError(f"{name}: {one} tokens in layer {here}, and {other} in layer {there}")
    return found
