"""OffloadedModel behaves like the model it holds, inside its limits, counts what it did, and leaves nothing behind."""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from cache.errors import BudgetError, CheckpointError, ContextError, NotMoEError, PolicyError
from cache.policies.lru import LRU
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.device.arena import HostRegion
from offload.model import OffloadedModel

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

SLOT = 3 * 64 * 32 * 4  # bytes of one expert
FEW = 5 * SLOT + SLOT // 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> Any:
    return tiny.resident(checkpoint)


@pytest.fixture(params=["cpu", "emulated"])
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[OffloadedModel]:
    """Five experts fit; 100 tokens of context, 64 a pass."""
    with tiny.open_model(checkpoint, expert_cache=FEW, context=100, device=request.param) as model:
        yield model


def offload_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("offload-")]


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
    with pytest.raises(ContextError, match="room for 64"):
        model.generate(tiny.ids(1, 80), max_new_tokens=2, prefill_chunk_size=70)
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
    assert fast["capacity_bytes"] == fast["peak_bytes"] == 5 * SLOT
    assert fast["bytes_in"] == stats["misses"] * SLOT
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
    assert from_disk * SLOT <= stats["bytes_from_disk"] <= from_disk * 4 * SLOT
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
    assert tier["peak_bytes"] == tier["capacity_bytes"] == 5 * SLOT
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


# Policies.


class Favourites(LRU):
    """A user's own policy: expert 0 of every layer is never worth less than another one."""

    made: ClassVar[list[Favourites]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.evicted: list[ExpertKey] = []
        self.made.append(self)

    def priorities(self, layers: slice) -> Any:
        values = super().priorities(layers).copy()
        values[:, 0] += 10**9
        return values

    def on_evict(self, key: ExpertKey) -> None:
        super().on_evict(key)
        self.evicted.append(key)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", f"{__name__}:Favourites"])
def test_every_policy_is_exact(checkpoint: Path, resident: Any, policy: str) -> None:
    arguments = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = resident.generate(tiny.ids(1, 10), **arguments)
    with tiny.open_model(checkpoint, expert_cache=FEW, policy=policy) as model:
        assert torch.equal(model.generate(tiny.ids(1, 10), **arguments), expected)
        assert model.stats.as_dict()["tiers"]["cpu"]["evictions"] > 0
        if "Favourites" in policy:
            assert Favourites.made[-1].evicted  # it is the policy that was asked
            assert model.parts.runtime.manager.computing.policy is Favourites.made[-1]


class Diary(LRU):
    """Notes every event."""

    events: ClassVar[list[RoutingEvent]] = []

    def on_event(self, event: RoutingEvent) -> None:
        super().on_event(event)
        self.events.append(event)


def test_what_a_policy_is_told(checkpoint: Path, resident: Any) -> None:
    """Every layer of every pass in order, one number for each sequence of passes, one for each pass in it."""
    seen: list[list[tuple[int, int]]] = []

    def note(module: Any, args: Any) -> None:
        ids, counts = args[1].unique(return_counts=True)
        seen.append(list(zip(ids.tolist(), counts.tolist(), strict=True)))

    hooks = [m.register_forward_pre_hook(note) for m in resident.modules() if isinstance(m, Qwen3MoeExperts)]
    Diary.events.clear()
    with tiny.open_model(checkpoint, policy=f"{__name__}:Diary") as model:
        for prompt in (tiny.ids(2, 6), tiny.ids(1, 3)):
            for each in (model, resident):
                each.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for hook in hooks:
        hook.remove()
    used = [sorted(zip(event.experts, event.tokens, strict=True)) for event in Diary.events]
    assert used == seen
    assert [e.layer for e in Diary.events] == [0, 1, 2] * 6
    passes = [(e.sequence, e.step, e.phase) for e in Diary.events][::3]
    first, second = passes[0][0], passes[3][0]
    assert first != second
    assert passes == [
        (sequence, step, Phase.DECODE if step else Phase.PREFILL) for sequence in (first, second) for step in range(3)
    ]
    for event in Diary.events:
        assert list(event.weights) == sorted(event.weights)
        assert all(0 < weight < tokens for weight, tokens in zip(event.weights, event.tokens, strict=True))


@pytest.mark.parametrize("policy", ["best", "no_such_module:Policy", f"{__name__}:SLOT", ""])
def test_no_such_policy(checkpoint: Path, policy: str) -> None:
    before = offload_threads()
    with pytest.raises(PolicyError):
        tiny.open_model(checkpoint, policy=policy)
    assert offload_threads() == before


class Faulty(LRU):
    """Answers the third question wrongly: in the middle of an event, when some room is already reserved."""

    questions = 0

    def priorities(self, layers: slice) -> Any:
        type(self).questions += 1
        values = super().priorities(layers)
        return values[:, 1:] if self.questions == 3 else values


def test_a_policy_that_failed_once(checkpoint: Path, resident: Any) -> None:
    Faulty.questions = 0
    arguments = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with tiny.open_model(checkpoint, expert_cache=FEW, policy=f"{__name__}:Faulty") as model:
        with pytest.raises(PolicyError, match="shape"):
            model.generate(tiny.ids(1, 10), **arguments)
        expected = resident.generate(tiny.ids(1, 10), **arguments)
        assert torch.equal(model.generate(tiny.ids(1, 10), **arguments), expected)
        model.parts.runtime.manager.check_integrity()


# The end.


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_closing_restores_everything(checkpoint: Path, device: str) -> None:
    before = torch.get_num_threads(), offload_threads(), Qwen3MoeExperts.__init__
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with tiny.open_model(checkpoint, device=device, threads=3, expert_cache=FEW) as model:
        assert torch.get_num_threads() == 3 and len(offload_threads()) > len(before[1])
        assert Qwen3MoeExperts.__init__ is before[2]
        inner = model.module
        experts = [module for module in inner.modules() if isinstance(module, Qwen3MoeExperts)]
        assert all("_offload_layer" in vars(module) for module in experts)
        model.generate(tiny.ids(1, 5), max_new_tokens=5)
    assert (torch.get_num_threads(), offload_threads(), Qwen3MoeExperts.__init__) == before
    assert affinity is None or os.sched_getaffinity(0) == affinity
    assert not any("_offload_layer" in vars(module) for module in experts)
    assert not inner._forward_hooks and not inner._forward_pre_hooks
    model.close()


def test_a_closed_model_says_so(checkpoint: Path) -> None:
    with tiny.open_model(checkpoint) as model:
        model.generate(tiny.ids(1, 5), max_new_tokens=5)
    for use in (
        lambda: model.generate(tiny.ids(1, 5), max_new_tokens=5),
        lambda: model(tiny.ids(1, 5)),
        lambda: model.config,
        lambda: model.generation_config,
        lambda: model.use_predictor("none"),
        lambda: model.use_prefill("kept"),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert model.stats.as_dict()["prefill_tokens"] == 5  # what it did can still be asked


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_closing_gives_the_experts_memory_back(checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[weakref.ref[mmap.mmap]] = []
    build = HostRegion.__init__

    def watched(self: HostRegion, nbytes: int) -> None:
        build(self, nbytes)
        maps.append(weakref.ref(self._map))

    monkeypatch.setattr(HostRegion, "__init__", watched)
    model = tiny.open_model(checkpoint, device=device, expert_cache=FEW)
    model.generate(tiny.ids(1, 5), max_new_tokens=5)
    gc.collect()
    assert len([ref for ref in maps if ref() is not None]) >= 2
    model.close()
    gc.collect()
    assert [ref for ref in maps if ref() is not None] == []
    assert model.stats is not None


def test_a_load_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    tiny.edit_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    before = torch.get_num_threads(), offload_threads(), Qwen3MoeExperts.__init__
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        tiny.open_model(tmp_path, device="emulated", threads=3)
    assert (torch.get_num_threads(), offload_threads(), Qwen3MoeExperts.__init__) == before


def test_errors_before_loading(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="too small"):
        tiny.open_model(checkpoint, cpu_mem="200M")
    with pytest.raises(BudgetError, match="--gpu-mem"):
        tiny.open_model(checkpoint, device="emulated", gpu_mem="100K")
    tiny.save(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(NotMoEError):
        tiny.open_model(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_interrupt_midway(checkpoint: Path, resident: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside an expert: the cores are given back, nothing stays pinned, and the next reply is right."""
    import offload.engine.hook

    compute, calls = offload.engine.hook._linear_each, iter(range(10**9))
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None

    def interrupted(*args: Any) -> torch.Tensor:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(offload.engine.hook, "_linear_each", interrupted)
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = resident.generate(tiny.ids(1, 10), **arguments)
    try:
        with tiny.open_model(checkpoint, device=device, expert_cache=FEW) as model:
            with pytest.raises(KeyboardInterrupt):
                model.generate(tiny.ids(1, 10), **arguments)
            model.parts.runtime.manager.check_integrity()
            assert affinity is None or os.sched_getaffinity(0) == affinity
            assert torch.equal(model.generate(tiny.ids(1, 10), **arguments), expected)
    finally:
        if affinity is not None:
            os.sched_setaffinity(0, affinity)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ctrl_c_just_when_a_transfer_has_landed(
    checkpoint: Path, resident: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised there, the interrupt would lose the transfer, and whoever receives the rest would wait for it for ever."""
    with tiny.open_model(checkpoint, expert_cache=FEW, device=device) as model:
        landed = model.parts.runtime.engine._landed
        presses = 1

        class Pressed:
            put = landed.put
            get_nowait = landed.get_nowait

            def get(self) -> Any:
                nonlocal presses
                transfer = landed.get()
                if presses:
                    presses -= 1
                    signal.raise_signal(signal.SIGINT)
                return transfer

        monkeypatch.setattr(model.parts.runtime.engine, "_landed", Pressed())
        with pytest.raises(KeyboardInterrupt):
            model.generate(tiny.ids(1, 8), max_new_tokens=4, do_sample=False)
        model.parts.runtime.manager.check_integrity()
        arguments = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        ids = tiny.ids(1, 8)
        assert torch.equal(model.generate(ids, **arguments), resident.generate(ids, **arguments))
    assert not offload_threads()
