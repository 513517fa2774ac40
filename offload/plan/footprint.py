"""How many bytes a model needs besides its experts: found by running it on the meta device, not by formulas per family.

A forward pass on meta tensors allocates nothing but does everything else: so its key-value cache and its activations
can be weighed for any architecture, any context, before the weights are downloaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.checkpoint.skeleton import expert_parameters, find_experts

CHUNKS = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)
"""Tokens of one forward pass that a plan chooses from, for prompts."""
PROBE = 128
"""Tokens enough to see what one token adds."""


@dataclass(frozen=True)
class Footprint:
    """Bytes a model needs in the memory of the device that computes, its experts aside.

    `kv_bytes` is the key-value cache (or recurrent state) at `context` tokens; `workspace_bytes` maps the tokens of one
    forward pass at the end of that context to the most its activations take, logits of the last token included.
    """

    context: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: dict[int, int]


def weigh(model: Any, context: int) -> Footprint:
    """The footprint of `model` (a skeleton on the meta device) at `context` tokens.

    Where a family's forward pass cannot run on the meta device, falls back to an upper estimate from its configuration.
    Raises what a pass raises that would with data, too.
    """
    dense = dense_bytes(model)
    chunks = [chunk for chunk in CHUNKS if chunk < context] or [context]
    try:
        return _weigh(model, dense, context, chunks)
    except Exception:  # whatever a model's own code does with a tensor that has no data
        _check_pass(model)
        return _estimate(model, dense, context, chunks)


@torch.no_grad()
def _check_pass(model: Any) -> None:
    """Raises what a short pass raises for another reason than that tensors have no data."""
    try:
        with _FusedAttention():
            _pass(model, None, PROBE // 2)
    except Exception as error:
        by_transformers = type(model).__module__.startswith("transformers.")
        if by_transformers and not isinstance(error, NotImplementedError) and "meta" not in str(error):
            raise


def _weigh(model: Any, dense: int, context: int, chunks: list[int]) -> Footprint:
    loops = context > 2 * PROBE and _loops_over_tokens(model)
    low, high = chunks[-1], PROBE // 2 if loops else chunks[0]

    def measure(tokens: int) -> tuple[int, int]:
        if not loops:
            return _weigh_pass(model, context, tokens)
        # A pass over the context would take as long as its tokens. Two short ones show what a token adds; caches grow
        # by as much for every token, or stop growing, so the line through them is never too low.
        near, far = (_weigh_pass(model, length, tokens) for length in (PROBE, 2 * PROBE))
        kv_bytes, workspace = (_line(PROBE, a, 2 * PROBE, b, context) for a, b in zip(near, far, strict=True))
        return kv_bytes, workspace

    kv_bytes, most = measure(high)
    least = measure(low)[1] if low < high else most
    # Activations grow by the same bytes for every token of a pass.
    workspace = {chunk: max(_line(low, least, high, most, chunk), least) for chunk in chunks}
    return Footprint(context, dense, kv_bytes, workspace)


def _line(x0: int, y0: int, x1: int, y1: int, x: int) -> int:
    """The value at `x` of the line through two points; of the first one where they coincide."""
    return y0 + (y1 - y0) * (x - x0) // max(x1 - x0, 1)


@torch.no_grad()
def _loops_over_tokens(model: Any) -> bool:
    """Whether a longer prompt means more operations, not only larger ones, as in recurrent layers without kernels."""
    counts: list[int] = []
    for tokens in (PROBE // 2, PROBE):
        with _PeakBytes(()) as counter, _FusedAttention():
            _pass(model, None, tokens)
        counts.append(counter.operations)
    return counts[1] > 1.2 * counts[0]


def dense_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that belong to no expert; tied ones count once."""
    experts = {
        id(parameter) for module in find_experts(model).values() for parameter in expert_parameters(module).values()
    }
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in experts}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


@torch.no_grad()
def _weigh_pass(model: Any, context: int, tokens: int) -> tuple[int, int]:
    """(bytes of the cache at `context` tokens, bytes of activations while its last `tokens` are processed)."""
    cache = None  # the model makes its own kind
    with _PeakBytes((*model.parameters(), *model.buffers())) as memory, _FusedAttention():
        if context > tokens:
            cache = _pass(model, cache, context - tokens).past_key_values
        memory.start()
        output = _pass(model, cache, tokens)
        peak = memory.peak_bytes
        kv_bytes = sum(_distinct_bytes(output.past_key_values))
        del output
    return kv_bytes, max(peak - kv_bytes, 0)


def _pass(model: Any, cache: Any, tokens: int) -> Any:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


class _PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, while anything holds them."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.operations: int = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}  # a view of one creates nothing
        self._live: dict[int, int] = {}

    def start(self) -> None:
        """Measure the peak from here on."""
        self.peak_bytes = sum(self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity not in self._live and identity not in self._weights:
            self._live[identity] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, identity, None)
            self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))


class _FusedAttention(TorchFunctionMode):
    """Attention as the CPU's and the GPU's fused kernels hold it: the output, and no matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


def _distinct_bytes(holder: Any) -> Iterator[int]:
    """Bytes of every storage reachable from a cache object's attributes, each once."""
    seen: set[int] = set()
    stack = [holder]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage.nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif type(item).__module__.startswith("transformers") and hasattr(item, "__dict__"):
            stack.extend(vars(item).values())


def _estimate(model: Any, dense: int, context: int, chunks: list[int]) -> Footprint:
    """An upper estimate: every layer a full multi-head attention layer, every attention matrix held in float32."""
    config = model.config.get_text_config()
    fields = config.to_dict()
    itemsize = next(model.parameters()).itemsize
    hidden: int = fields["hidden_size"]
    heads: int = fields.get("num_attention_heads") or 1
    head_dim: int = max(fields.get("head_dim") or 0, hidden // heads)
    top_k: int = fields.get("num_experts_per_tok") or 8
    widest = max((max(p.shape[-2:]) for p in model.parameters() if p.dim() >= 2), default=hidden)
    kv_bytes = 2 * config.num_hidden_layers * context * max(heads * head_dim, hidden) * itemsize
    row = (top_k * (3 * hidden + 3 * widest) + 16 * hidden) * itemsize + 3 * heads * context * 4
    logits = 4 * fields["vocab_size"] * 4
    return Footprint(context, dense, kv_bytes, {chunk: chunk * row + logits for chunk in chunks})
