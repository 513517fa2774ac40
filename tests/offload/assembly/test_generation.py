"""OffloadedModel behaves like the model it holds, inside its limits, and counts what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from cache.errors import CheckpointError, ContextError
from cache.types import Tier
from offload.model import OffloadedModel

# As transformers.


def test_forward_is_the_resident_models(model: OffloadedModel, resident: Any) -> None:
    ids, mask = tiny.ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = resident(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for output in (
        model(input_ids=ids, attention_mask=mask, output_hidden_states=True),
        model.forward(ids, attention_mask=mask, output_hidden_states=True),
    ):
        assert tiny.same_bits(output.logits, expected.logits) and not output.logits.requires_grad
        assert all(tiny.same_bits(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))
    embeds = resident.get_input_embeddings()(ids).detach()
    assert tiny.same_bits(model(inputs_embeds=embeds, attention_mask=mask).logits, expected.logits)


def test_what_it_is(model: OffloadedModel, checkpoint: Path) -> None:
    assert model.config.model_type == "qwen3_moe" and model.dtype is torch.float32
    assert model.device == torch.device("cpu") and model.context == 100 and model.plan.chunk == 64
    assert model.generation_config.eos_token_id == 2
    assert model.tokenizer is None


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    (tmp_path / "tokenizer.json").write_text('{"version":')
    with (
        tiny.open_model(tmp_path) as model,
        pytest.raises(CheckpointError, match="its tokenizer cannot be loaded") as e,
    ):
        _ = model.tokenizer
    assert "\n" not in str(e.value)


def test_a_prompt_longer_than_a_pass_is_read_in_chunks(model: OffloadedModel, resident: Any) -> None:
    arguments = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    for ids, chunk in ((tiny.ids(1, 85), 64), (tiny.ids(2, 40), 32)):
        expected = resident.generate(ids, prefill_chunk_size=chunk, **arguments)
        assert torch.equal(model.generate(ids, **arguments), expected)
        assert torch.equal(model.generate(input_ids=ids, **arguments), expected)
    # Whoever asks for shorter passes gets them.
    expected = resident.generate(tiny.ids(1, 85), prefill_chunk_size=16, **arguments)
    model.reset_stats()
    assert torch.equal(model.generate(tiny.ids(1, 85), prefill_chunk_size=16, **arguments), expected)
    stats = model.stats.as_dict()
    assert (stats["prefill_tokens"], stats["decode_tokens"]) == (85, 9)
    # Who asks for longer ones than there is room for does not.
    expected = resident.generate(tiny.ids(1, 85), prefill_chunk_size=64, **arguments)
    assert torch.equal(model.generate(tiny.ids(1, 85), prefill_chunk_size=70, **arguments), expected)


@pytest.mark.parametrize(
    "copies", [{"num_beams": 2, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_copies_of_a_prompt_count_when_it_is_cut(model: OffloadedModel, resident: Any, copies: dict[str, Any]) -> None:
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, **copies}  # 2 * 40 tokens are more than a pass has
    torch.manual_seed(0)
    expected = resident.generate(tiny.ids(1, 40), prefill_chunk_size=32, **arguments)
    torch.manual_seed(0)
    assert torch.equal(model.generate(tiny.ids(1, 40), **arguments), expected)


def test_the_callers_generation_config_is_not_changed(model: OffloadedModel) -> None:
    config = model.generation_config
    before = config.to_dict()
    model.generate(tiny.ids(1, 80), max_new_tokens=3, do_sample=False, generation_config=config)
    model.generate(tiny.ids(1, 80), max_new_tokens=3)
    assert config.to_dict() == before


# Limits.


def test_more_tokens_than_the_context_are_refused_before_they_start(model: OffloadedModel) -> None:
    for ids, arguments in (
        (tiny.ids(1, 90), {"max_new_tokens": 11}),
        (tiny.ids(2, 40), {"max_new_tokens": 11}),
        (tiny.ids(1, 20), {"max_length": 101}),
        (tiny.ids(1, 20), {"max_new_tokens": 14, "num_beams": 3}),
        (tiny.ids(1, 20), {"max_new_tokens": 14, "num_return_sequences": 3, "do_sample": True}),
        (tiny.ids(1, 101), {}),
    ):
        with pytest.raises(ContextError, match="there is room for 100") as refusal:
            model.generate(ids, **arguments)
        assert "\n" not in str(refusal.value)
    stats = model.stats.as_dict()
    assert stats["misses"] == stats["prefill_tokens"] == 0
    assert model.generate(tiny.ids(1, 90), max_new_tokens=10, min_new_tokens=10).shape == (1, 100)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_a_reply_of_default_length_is_refused_before_it_starts(model: OffloadedModel, resident: Any) -> None:
    """Without any limit, transformers makes replies of 20 tokens."""
    assert resident.generate(tiny.ids(1, 60), eos_token_id=-1).shape[1] == 80
    with pytest.raises(ContextError, match="there is room for 100"):
        model.generate(tiny.ids(1, 81), eos_token_id=-1)
    assert model.stats.as_dict()["prefill_tokens"] == 0
    assert model.generate(tiny.ids(1, 60), eos_token_id=-1).shape[1] == 80


def test_more_tokens_than_a_pass_are_refused(model: OffloadedModel) -> None:
    """Also as the very first thing, without a warning and without a trace."""
    for shape in ((1, 65), (2, 33)):
        with pytest.raises(ContextError, match="does not fit the workspace, which has room for 64"):
            model(tiny.ids(*shape))
    with pytest.raises(ContextError, match="need 102 tokens of KV cache"):
        model(tiny.ids(6, 17))
    stats = model.stats.as_dict()
    assert stats["prefill_tokens"] == stats["decode_tokens"] == stats["misses"] == 0


def test_a_cache_that_is_full_is_refused(model: OffloadedModel) -> None:
    output = model(tiny.ids(1, 60), use_cache=True)
    output = model(tiny.ids(1, 40), past_key_values=output.past_key_values, use_cache=True)
    with pytest.raises(ContextError, match="1 sequences of 101 tokens"):
        model(tiny.ids(1, 1), past_key_values=output.past_key_values, use_cache=True)
    assert model.stats.as_dict()["prefill_tokens"] == 100 and model.stats.as_dict()["decode_tokens"] == 0


def test_a_budget_without_effect_is_said(checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="--gpu-mem has no effect"), tiny.open_model(checkpoint, gpu_mem="1G") as model:
        assert model.stats.gpu_mem_bytes is None


# Counting.


def accesses(resident: Any, ids: torch.Tensor, **arguments: Any) -> int:
    """How many different experts the layers of every pass use, all together, with everything resident."""
    counted: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: counted.append(len(args[1].unique())))
        for module in resident.modules()
        if isinstance(module, Qwen3MoeExperts)
    ]
    resident.generate(ids, **arguments)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def test_what_is_counted(model: OffloadedModel, resident: Any) -> None:
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ids = tiny.ids(2, 9)
    expected = accesses(resident, ids, **arguments)
    model.use_prefill("on-demand")
    model.use_predictor("none")
    model.generate(ids, **arguments)
    stats = model.stats.as_dict()
    assert json.loads(json.dumps(stats)) == stats
    assert stats["hits"] + stats["misses"] == expected and stats["late_hits"] == 0
    assert stats["hit_rate"] == stats["hits"] / expected and 0 < stats["bypasses"] < stats["misses"]
    assert (stats["prefill_tokens"], stats["decode_tokens"]) == (18, 22)
    assert stats["prefill_tokens_per_s"] > 0 and stats["decode_tokens_per_s"] > 0 and stats["stall_s"] > 0

    accelerated = model.plan.computing_tier is Tier.GPU
    fast = stats["tiers"]["gpu" if accelerated else "cpu"]
    assert {name: fast[name] for name in ("hits", "misses", "bypasses")} == {
        name: stats[name] for name in ("hits", "misses", "bypasses")
    }
    assert fast["capacity_bytes"] == fast["peak_bytes"] == 5 * tiny.SLOT
    assert fast["bytes_in"] == stats["misses"] * tiny.SLOT
    assert fast["evictions"] == stats["misses"] - stats["bypasses"] - 5
    if accelerated:
        assert stats["bytes_over_link"] == fast["bytes_in"]
        ram = stats["tiers"]["cpu"]
        assert ram["hits"] + ram["misses"] == stats["misses"] and ram["misses"] <= 24 and ram["evictions"] == 0
        from_disk = ram["misses"]
        assert stats["gpu_mem_bytes"] == 2**30 and 0 < stats["peak_gpu_bytes"] <= 2**30
    else:
        from_disk = stats["misses"]
        assert stats["bytes_over_link"] == 0 and stats["gpu_mem_bytes"] is stats["peak_gpu_bytes"] is None
    # Direct reads come in whole blocks, and may bring what lies between two pieces of an expert.
    assert from_disk * tiny.SLOT <= stats["bytes_from_disk"] <= from_disk * 4 * tiny.SLOT
    assert stats["cpu_mem_bytes"] == 8 * 2**30
    assert 2**25 < stats["peak_rss_bytes"] < 2**36


def test_reset_stats_counts_from_zero_and_keeps_the_cache(model: OffloadedModel) -> None:
    model.generate(tiny.ids(1, 5), max_new_tokens=5)
    kept = model.stats
    model.reset_stats()
    stats = model.stats.as_dict()
    for name in ("hits", "misses", "bypasses", "bytes_from_disk", "bytes_over_link", "stall_s", "prefill_tokens"):
        assert stats[name] == 0, name
    assert stats["hit_rate"] == stats["decode_tokens_per_s"] == 0.0
    assert stats["peak_rss_bytes"] > 0
    tier = stats["tiers"][model.plan.computing_tier.value]
    assert tier["peak_bytes"] == tier["capacity_bytes"] == 5 * tiny.SLOT
    assert kept.as_dict()["misses"] > 0  # a snapshot stays what it was
    model.generate(tiny.ids(1, 5), max_new_tokens=5)
    assert model.stats.as_dict()["prefill_tokens"] == 5


def test_with_room_for_all_each_expert_is_read_once(checkpoint: Path, resident: Any) -> None:
    arguments = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with tiny.open_model(checkpoint) as model:
        assert torch.equal(
            model.generate(tiny.ids(1, 30), **arguments), resident.generate(tiny.ids(1, 30), **arguments)
        )
        assert model.stats.as_dict()["misses"] <= 24 and model.stats.as_dict()["bypasses"] == 0
        model.reset_stats()
        model.generate(tiny.ids(1, 30), **arguments)
        stats = model.stats.as_dict()
        assert stats["hit_rate"] == 1.0 and stats["bytes_from_disk"] == 0 and stats["stall_s"] == 0.0
