"""A live model under a TraceRouter goes where the trace says, exactly as a resident one does, and is then as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from traces import SMALL, recorded

from cache.errors import TraceError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.model import OffloadedModel
from offload.traces.router import TraceRouter
from scripts.bench import make_checkpoint

LAYERS, EXPERTS, TOP_K = 3, 8, 3  # of the tiny families
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    yield from tiny.one_thread()


def random_trace(lengths: Sequence[int], layers: int = LAYERS, experts: int = EXPERTS, top_k: int = TOP_K) -> Trace:
    """Seeded sequences of the given lengths, where an expert tends to come again."""
    rng = np.random.default_rng(0)
    tokens = sum(lengths)
    favour = rng.gumbel(size=(layers, experts)) * 2
    scores = favour + rng.gumbel(size=(tokens, layers, experts))
    ids = np.argsort(-scores, axis=-1)[..., :top_k]
    weights = np.sort(rng.dirichlet(np.full(top_k, 4.0), (tokens, layers)))[..., ::-1]
    return Trace.from_arrays(ids, weights, np.cumsum([0, *lengths]), num_experts=experts)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, threads: None) -> Path:
    """A tiny checkpoint of three MoE layers of eight experts, top-3."""
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[OffloadedModel]:
    with tiny.open_model(folder) as model:
        yield model


def decode(model: Any, trace: Trace, lengths: Sequence[int], **options: Any) -> torch.Tensor:
    """Logits of one fixed random sequence a length, a token a step, all under one router: [tokens, vocabulary]."""
    logits = []
    with torch.no_grad(), TraceRouter(model, trace, **options):
        for number, length in enumerate(lengths):
            past = None
            for token in tiny.ids(1, length, seed=number)[0]:
                output = model(input_ids=token.view(1, 1), past_key_values=past, use_cache=True)
                past = output.past_key_values
                logits.append(output.logits[0, -1])
    return torch.stack(logits)


def lru_hits(trace: Trace, slots: int) -> int:
    """Hits of one pool for all layers that forgets the least recently used; an event's own experts stay."""
    resident: list[tuple[int, int]] = []  # oldest first
    hits = 0
    for token in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            needed = [(layer, int(expert)) for expert in trace.experts[token, layer][::-1]]
            hits += len(set(needed) & set(resident))
            resident = [key for key in resident if key not in needed] + needed
            resident = resident[-slots:]
    return hits


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_offloaded_is_resident_bit_for_bit_and_hits_are_the_traces(folder: Path, device: str) -> None:
    lengths, slots = (9, 6, 12), 7
    trace = random_trace(lengths)
    slot_bytes = tiny.expert_map(folder).slot_bytes
    expected = decode(tiny.resident(folder), trace, lengths)
    with tiny.open_model(
        folder, device=device, policy="lru", prefill="on-demand", expert_cache=slots * slot_bytes
    ) as model:
        logits = decode(model, trace, lengths)
        counts = model.stats.tiers[Tier.GPU if device == "emulated" else Tier.CPU].counts
        own = decode(model, random_trace((27,)), (27,))
    assert tiny.same_bits(logits, expected)
    assert counts.accesses == sum(lengths) * LAYERS * TOP_K
    assert counts.hits == lru_hits(trace, slots)
    assert not tiny.same_bits(own, expected)  # another trace says something else


def test_what_is_recorded_under_a_router_is_its_trace(model: OffloadedModel, tmp_path: Path) -> None:
    lengths = (7, 5)
    trace = random_trace(lengths)
    with model.record_trace(tmp_path / "again.safetensors"), TraceRouter(model, trace):
        for length in lengths:
            model.generate(tiny.ids(1, 1), min_new_tokens=length, max_new_tokens=length, do_sample=False)
    again = Trace.open(tmp_path / "again.safetensors")
    assert np.array_equal(again.experts, trace.experts)
    assert np.array_equal(again.weights, trace.weights)
    assert np.array_equal(again.sequence_offsets, trace.sequence_offsets)


def test_a_prompt_in_chunks_goes_where_the_whole_one_goes(model: OffloadedModel) -> None:
    trace, said = random_trace((30, 30)), []
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    for chunk in (None, 7):
        with TraceRouter(model, trace):
            output = model.generate(tiny.ids(2, 20), do_sample=False, prefill_chunk_size=chunk, **asked)
        said.append(torch.stack(output.logits))
    torch.testing.assert_close(*said, rtol=0, atol=1e-4)


def seen(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The experts of every event from now on, in ascending id."""
    events: list[tuple[int, ...]] = []
    step = model.parts.runtime.manager.step

    def spy(event: Any) -> Any:
        events.append(tuple(sorted(event.experts)))
        return step(event)

    monkeypatch.setattr(model.parts.runtime.manager, "step", spy)
    return events


def union(trace: Trace, tokens: Sequence[int], layer: int) -> tuple[int, ...]:
    return tuple(sorted({int(expert) for token in tokens for expert in trace.experts[token, layer]}))


def test_a_batch_follows_a_sequence_each_and_a_prompt_its_tokens(
    model: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, events = random_trace((6, 6, 6)), seen(model, monkeypatch)
    with TraceRouter(model, trace, first_sequence=1):
        output = model(input_ids=tiny.ids(2, 4), use_cache=True)
        model(input_ids=tiny.ids(2, 1), past_key_values=output.past_key_values, use_cache=True)
        model(input_ids=tiny.ids(1, 2))
    passes = [(6, 7, 8, 9, 12, 13, 14, 15), (10, 16), (0, 1)]  # sequences 1 and 2, then 0
    assert events == [union(trace, tokens, layer) for tokens in passes for layer in range(LAYERS)]


def test_a_sequence_that_ends(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, events = random_trace((2, 3)), seen(model, monkeypatch)
    with TraceRouter(model, trace):
        model(input_ids=tiny.ids(1, 7))
    assert events == [union(trace, (0, 1, 2, 3, 4, 0, 1), layer) for layer in range(LAYERS)]
    with (
        TraceRouter(model, trace, at_end="error"),
        pytest.raises(TraceError, match="sequence 0 of the trace ends after 2 tokens"),
    ):
        model(input_ids=tiny.ids(1, 3))
    model(input_ids=tiny.ids(1, 3))  # the model goes on


def test_some_layers_of_a_larger_trace(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, events = random_trace((4,), layers=6), seen(model, monkeypatch)
    with pytest.raises(TraceError, match=r"6 MoE layers, the model 3: choose 3 .* range\(3\)"):
        TraceRouter(model, trace)
    with TraceRouter(model, trace, layers=(5, 0, 2)):
        model(input_ids=tiny.ids(1, 1))
    assert events == [union(trace, (0,), layer) for layer in (5, 0, 2)]


def test_what_does_not_fit_is_refused(model: OffloadedModel) -> None:
    trace = random_trace((4,))
    for options in ({"layers": (0, 1)}, {"layers": (0, 1, 3)}, {"first_sequence": 1}, {"first_sequence": -1}):
        with pytest.raises(TraceError):
            TraceRouter(model, trace, **options)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="has 16 experts a layer, the model 8"):
        TraceRouter(model, random_trace((4,), experts=16))
    with TraceRouter(model, random_trace((4,), top_k=2)), pytest.raises(TraceError, match="2 experts each"):
        model(input_ids=tiny.ids(1, 1))
    with TraceRouter(model, trace):
        output = model(input_ids=tiny.ids(2, 1), use_cache=True)
        output.past_key_values.reorder_cache(torch.tensor([0]))
        with pytest.raises(TraceError, match="1 sequences go on where 2 began"):
            model(input_ids=tiny.ids(1, 1), past_key_values=output.past_key_values)


def test_afterwards_the_model_is_as_before(model: OffloadedModel) -> None:
    inner, ids = model.module, tiny.ids(1, 5)

    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) for module in inner.modules()]

    before, own = hooks(), model(input_ids=ids).logits
    with pytest.raises(KeyError), TraceRouter(model, random_trace((5,))):
        assert hooks() != before
        assert not tiny.same_bits(model(input_ids=ids).logits, own)
        raise KeyError
    assert hooks() == before
    assert tiny.same_bits(model(input_ids=ids).logits, own)


def test_meanwhile_the_model_s_own_gates_are_not_asked(folder: Path) -> None:
    slot_bytes = tiny.expert_map(folder).slot_bytes
    with tiny.open_model(folder, expert_cache=5 * slot_bytes, prefetch_depth=1) as model:
        gates = model.rules
        assert gates.predictor == "cross-layer-gate"
        with TraceRouter(model, random_trace((5,))):
            assert model.rules.predictor == "none"
        assert model.rules == gates
        with TraceRouter(model, random_trace((5,))):
            model.use_predictor("frequency")
        assert model.rules.predictor == "frequency"
        with TraceRouter(model, random_trace((5,))):
            assert model.rules.predictor == "frequency"  # it was named
        model.use_predictor("auto")
        with TraceRouter(model, random_trace((5,))):
            model.close()


@pytest.mark.full
def test_a_true_shape_checkpoint_under_the_recorded_trace(tmp_path: Path) -> None:
    """One layer of gpt-oss-20b, true but for the vocabulary."""
    trace = recorded(SMALL)
    out = tmp_path / "gpt-oss-1l"
    assert make_checkpoint.main(["--like", "gpt-oss-20b", "--layers", "1", "--vocab", "256", "--out", str(out)]) == 0
    slots, tokens = 12, 8
    slot_bytes = tiny.expert_map(out, torch.bfloat16).slot_bytes
    with tiny.open_model(out, policy="lru", expert_cache=slots * slot_bytes) as model:
        decode(model, trace, (tokens,), layers=range(1))
        counts = model.stats.tiers[Tier.CPU].counts
    start = trace.select([0])
    few = Trace.from_arrays(
        start.experts[:tokens, :1], start.weights[:tokens, :1], [0, tokens], num_experts=trace.num_experts
    )
    assert counts.accesses == tokens * trace.top_k
    assert counts.hits == lru_hits(few, slots)
