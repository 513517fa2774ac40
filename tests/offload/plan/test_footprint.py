"""What a model needs besides its experts, weighed on the meta device, is what a real run takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import families

from offload.checkpoint.skeleton import build_skeleton
from offload.plan.footprint import CHUNKS, Footprint, dense_bytes, weigh

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

ATTENTION = {
    "qwen3_moe": "grouped queries",
    "mixtral": "grouped queries",
    "deepseek_v3": "compressed (MLA)",
    "gpt_oss": "full and sliding windows",
    "nemotron_h": "Mamba states and one attention layer",
    "qwen3_next": "linear attention states",
}


def skeleton(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return build_skeleton(families()[name].config(**config), dtype)


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor in a transformers cache, each storage once."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("context", [16, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_of_plain_attention(context: int, dtype: torch.dtype) -> None:
    config = families()["qwen3_moe"].config()
    head_dim = config.hidden_size // config.num_attention_heads
    expected = 2 * 3 * config.num_key_value_heads * head_dim * context * dtype.itemsize
    assert weigh(build_skeleton(config, dtype), context).kv_bytes == expected


@pytest.mark.parametrize("name", ATTENTION)
def test_kv_cache_of_a_real_run(name: str, tmp_path: Path) -> None:
    planned = weigh(skeleton(name), 90)
    longest = max(planned.workspace_bytes)  # a sliding window's memory is that of the last pass
    model = tiny.resident(tiny.save(tmp_path, name))
    with torch.no_grad():
        cache = model(tiny.ids(1, 90 - longest), use_cache=True).past_key_values
        cache = model(tiny.ids(1, longest), past_key_values=cache, use_cache=True).past_key_values
    assert planned.kv_bytes == cache_bytes(cache)


@pytest.mark.parametrize("name", ATTENTION)
def test_dense_bytes_are_all_but_the_experts(name: str) -> None:
    model = families()[name].build()
    experts = {
        id(parameter)
        for module in model.modules()
        if hasattr(module, "has_gate")
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2 and len(parameter) == 8
    }
    rest = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in experts}
    assert dense_bytes(skeleton(name)) == sum(tensor.nbytes for tensor in rest.values())


def test_tied_weights_count_once() -> None:
    tied, untied = (dense_bytes(skeleton("qwen3_moe", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied - tied == 256 * 64 * 4


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_workspace_covers_what_a_real_pass_allocates(name: str, shape: str, tmp_path: Path) -> None:
    """The peak of our own runtime's pass at the end of the context, with experts wider than the model, or narrower."""
    width = "intermediate_size" if name == "gpt_oss" else "moe_intermediate_size"
    sizes = {"hidden_size": 64, width: 256} if shape == "wide" else {"hidden_size": 256, width: 32}
    tiny.save(tmp_path, name, **sizes)
    context = 400
    with tiny.open_model(tmp_path, context=context) as model:
        chunk = model.plan.chunk
        planned = weigh(skeleton(name, **sizes), context)
        assert chunk == max(planned.workspace_bytes) < context
        inner = model.module
        with torch.no_grad():
            cache = None
            for start in range(0, context - chunk, 64):
                tokens = min(64, context - chunk - start)
                cache = inner(tiny.ids(1, tokens), past_key_values=cache, logits_to_keep=1).past_key_values
            before = cache_bytes(cache)
            with tiny.PeakBytes((*inner.parameters(), *inner.buffers())) as memory:
                cache = inner(tiny.ids(1, chunk), past_key_values=cache, logits_to_keep=1).past_key_values
        # What the pass allocates includes the larger cache; the smaller one was there before.
        peak = memory.peak + before - planned.kv_bytes
    assert cache_bytes(cache) == planned.kv_bytes
    assert planned.workspace_bytes[chunk] >= peak
    assert planned.workspace_bytes[chunk] <= 4 * peak  # and is no wild guess


def test_workspace_grows_with_the_tokens_of_a_pass() -> None:
    footprint = weigh(skeleton("qwen3_moe"), 2000)
    assert list(footprint.workspace_bytes) == [c for c in CHUNKS if c < 2000]
    sizes = list(footprint.workspace_bytes.values())
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    for chunk in (1024, 64):
        measured = weigh(skeleton("qwen3_moe"), 2000).workspace_bytes[chunk]
        assert footprint.workspace_bytes[chunk] == measured


def test_a_tiny_context_is_one_pass() -> None:
    assert list(weigh(skeleton("qwen3_moe"), 5).workspace_bytes) == [5]


@pytest.mark.parametrize("name", ATTENTION)
def test_where_the_meta_pass_fails_the_estimate_is_above(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton(name)
    measured = weigh(model, 300)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no data")

    monkeypatch.setattr("offload.plan.footprint._pass", fail)
    estimated: Footprint = weigh(model, 300)
    assert (estimated.context, estimated.dense_bytes) == (300, measured.dense_bytes)
    assert estimated.kv_bytes >= measured.kv_bytes > 0
    assert estimated.workspace_bytes.keys() == measured.workspace_bytes.keys()
    for chunk, nbytes in measured.workspace_bytes.items():
        assert estimated.workspace_bytes[chunk] >= nbytes
