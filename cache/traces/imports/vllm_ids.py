"""Expert ids as vLLM returns them with `enable_return_routed_experts`.

`CompletionOutput.routed_experts` is [tokens, layers, K]: of prompt and reply together, where the last token that was
sampled is missing, since it was never an input. vLLM 0.21 has the reply's there, and the prompt's in
`RequestOutput.prompt_routed_experts`. Up to 0.20 all layers are there, with zeros for those without experts. The server
answers with nested lists, or with a .npy file in base64.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.imports.arrays import read_npy, read_npz, table_of_ids, whole_number
from cache.traces.imports.logged import ImportOptions, Logged

NAME = "vllm"
SUFFIXES = (".npy", ".npz", ".jsonl")
METADATA: dict[str, str] = {}

_REPLY, _PROMPT, _LENGTH = "routed_experts", "prompt_routed_experts", "prompt_tokens"


def sequences(files: Sequence[Path], options: ImportOptions) -> Iterator[Logged]:
    """A sequence a file, a line or a choice of a line. Raises TraceError and OSError."""
    options.refuse(NAME, "top_k", "scores")
    if options.num_experts is None:
        raise TraceError("expert ids do not say how many experts there are: give --num-experts")
    layers = options.layers
    for path in files:
        for name, entry in _entries(path):
            experts, prompt = _experts(name, entry, options.prompt_tokens)
            if layers is None:
                layers = _routed_layers(name, experts)
            elif options.layers is None:
                _check_dropped(name, experts, layers)
            if max(layers) >= experts.shape[1]:
                raise TraceError(f"{name} has {experts.shape[1]} layers, and no layer {max(layers)}")
            yield Logged(name, options.num_experts, layers, experts[:, list(layers)], prompt)


def _entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the file has of each sequence, and what to call it."""
    if path.suffix == ".npy":
        yield str(path), {_REPLY: read_npy(path, str(path))}
    elif path.suffix == ".npz":
        arrays = read_npz(path)
        if unknown := set(arrays) - {_REPLY, _PROMPT, _LENGTH}:
            raise TraceError(f'{path} has "{min(unknown)[:40]}", where {_REPLY}, {_PROMPT} and {_LENGTH} are expected')
        yield str(path), arrays
    else:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from _line(f"{path}, line {number}", line)


def _line(name: str, line: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """An entry, or the response of vLLM's server, which has one for each choice."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{name} is not JSON") from error
    if not isinstance(entry, dict):
        raise TraceError(f"{name} is not a JSON object")
    choices = entry.get("choices")
    if choices is None:
        yield name, entry
        return
    usage = entry.get("usage")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise TraceError(f'{name}: its "choices" are not a list of objects')
    shared = {_PROMPT: entry.get(_PROMPT), _LENGTH: usage.get(_LENGTH) if isinstance(usage, dict) else None}
    for index, choice in enumerate(choices):
        yield f"{name}, choice {index}", {**shared, _REPLY: choice.get(_REPLY)}


def _experts(name: str, entry: Mapping[str, Any], stated: int | None) -> tuple[NDArray[np.int64], int | None]:
    """All ids of a sequence [tokens, layers, K], and the prompt's length where anybody says it."""
    if entry.get(_REPLY) is None:
        raise TraceError(f'{name} has no "{_REPLY}": start vLLM with enable_return_routed_experts')
    experts = _decoded(entry[_REPLY], f"{name}: {_REPLY}")
    prompt = None if entry.get(_LENGTH) is None else whole_number(entry[_LENGTH], f"{name}: {_LENGTH}")
    if prompt is not None and stated is not None:
        raise TraceError(f"{name} says itself that its prompt has {prompt} tokens: leave --prompt-tokens out")
    if entry.get(_PROMPT) is not None:
        before = _decoded(entry[_PROMPT], f"{name}: {_PROMPT}")
        if before.shape[1:] != experts.shape[1:]:
            raise TraceError(
                f"{name}: the prompt's ids have the shape {list(before.shape)}, others {list(experts.shape)}"
            )
        if prompt not in (None, len(before)):
            raise TraceError(f"{name}: ids of {len(before)} tokens, for a prompt of {prompt}")
        experts, prompt = np.concatenate([before, experts]), len(before)
    if (experts == -1).any():
        token = int((experts == -1).any(axis=(1, 2)).argmax())
        raise TraceError(
            f"{name}: token {token} has the id -1: vLLM took it from its prefix cache, and does not know its experts: "
            "record prompts that have no beginning in common"
        )
    return experts, stated if prompt is None else prompt


def _decoded(value: Any, name: str) -> NDArray[np.int64]:
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise TraceError(f"{name} is a text, and not base64") from error
        value = read_npy(io.BytesIO(data), name)
    return table_of_ids(value, 3, name)


def _routed_layers(name: str, experts: NDArray[np.int64]) -> tuple[int, ...]:
    """The layers that route. One expert cannot be chosen twice, so two or more zeros for every token are none."""
    if experts.shape[2] < 2 or not experts.size:
        return tuple(range(experts.shape[1]))
    routed = experts.any(axis=(0, 2))
    if not routed.any():
        raise TraceError(f"{name} is nothing but zeros: vLLM recorded no experts")
    return tuple(np.flatnonzero(routed).tolist())


def _check_dropped(name: str, experts: NDArray[np.int64], layers: tuple[int, ...]) -> None:
    routed: NDArray[np.bool_] = np.asarray(experts.any(axis=(0, 2)))
    dropped = [layer for layer in np.flatnonzero(routed).tolist() if layer not in layers]
    if dropped:
        raise TraceError(f"{name}: layer {dropped[0]} has experts here, and none in the first sequence")
