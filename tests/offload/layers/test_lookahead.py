"""The next gates say ahead what they say when asked by hand, of every kind of router; and asking changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from families import OTHER_DESIGN, families
from numpy.typing import NDArray

from cache.errors import TraceError, UnsupportedFamilyError
from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from offload.layers.lookahead import GateLookahead
from offload.layers.router import router_beside
from offload.model import OffloadedModel

KINDS = {
    "qwen3_moe": "a product with a weight",
    "gpt_oss": "and a bias",
    "phimoe": "weights whose order is not that of the scores",
    "deepseek_v3": "groups, and a correction bias",
    "afmoe": "a tensor of its block beside the input",
    "lfm2_moe": "one that may be missing",
    "deepseek_v4": "the first layers pick experts from a table",
    "gemma4_text": "probabilities, of an input that it normalises",
    "muse_spark": "and images beside",
    "mistral_large4": "a weight in another precision than the input",
}
OTHERS = families().keys() - KINDS.keys() - OTHER_DESIGN.keys() - {"zaya"}
PLAIN = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
pytestmark = pytest.mark.usefixtures("threads")

Said = dict[int, NDArray[Any]]


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, threads: None) -> Iterator[OffloadedModel]:
    with tiny.open_model(tiny.save(tmp_path_factory.mktemp("model"), "qwen3_moe")) as model:
        yield model


def routers(model: OffloadedModel) -> list[Any]:
    return [router_beside(model.module, layer)[1] for layer in model.parts.experts.layers]


def look(model: OffloadedModel, ids: torch.Tensor, depth: int = 2, **kwargs: Any) -> tuple[Said, list[Any], Any]:
    """What one pass hands over, what every router was given, and the logits."""
    said: Said = {}
    given: list[Any] = []
    hooks = [router.register_forward_pre_hook(lambda _, args: given.append(args)) for router in routers(model)]
    gates = GateLookahead(model.module, model.parts.experts, depth, said.__setitem__, **kwargs)
    try:
        logits = model(ids).logits
    finally:
        gates.detach()
        for hook in hooks:
            hook.remove()
    return said, given, logits


def by_hand(router: Any, hidden: torch.Tensor, others: tuple[Any, ...], num_experts: int) -> tuple[Any, Any]:
    """The chosen experts by descending weight, [tokens, K], and the scores of all, [tokens, E]."""
    with torch.no_grad():
        scores, weights, chosen = router.forward(hidden, *others)[:3]
    order = np.argsort(-weights.float().numpy(), axis=-1, kind="stable")
    return np.take_along_axis(chosen.numpy(), order, -1), scores.float().numpy()[:, :num_experts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*KINDS, *(pytest.param(name, marks=pytest.mark.full) for name in sorted(OTHERS))])
def test_what_is_said_is_what_the_routers_say(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    try:
        opened = tiny.open_model(tiny.save(tmp_path, family, dtype))
    except UnsupportedFamilyError as error:
        pytest.skip(str(error))
    with opened as model:
        plain = model(tiny.ids(2, 9)).logits
        state = torch.get_rng_state()
        said, given, logits = look(model, tiny.ids(2, 9))
        assert tiny.same_bits(logits, plain) and torch.equal(torch.get_rng_state(), state)
        layers, num_experts = len(model.parts.experts.layers), model.parts.experts.num_experts
        assert list(said) == list(range(layers - 1))
        for layer, predicted in said.items():
            assert predicted.shape[:2] == (18, min(2, layers - 1 - layer)) and predicted.dtype == np.uint8
            for d in range(predicted.shape[1]):
                ahead = layer + 1 + d
                chosen, scores = by_hand(routers(model)[ahead], given[layer][0], given[ahead][1:], num_experts)
                top_k = chosen.shape[-1]
                assert predicted.shape[2] == min(2 * top_k, num_experts)
                assert np.array_equal(predicted[:, d, :top_k], chosen)
                rest = np.array(scores)
                np.put_along_axis(rest, chosen, -np.inf, -1)
                best = -np.sort(-rest)[:, : predicted.shape[2] - top_k]
                named = predicted[:, d, top_k:].astype(np.int64)
                assert np.array_equal(np.take_along_axis(rest, named, -1), best)


def test_a_state_handed_from_router_to_router(tmp_path: Path) -> None:
    """The next one's is not known yet: the present one is as near as one gets."""
    with tiny.open_model(tiny.save(tmp_path, "zaya")) as model:
        plain = model(tiny.ids(2, 9)).logits
        said, _, logits = look(model, tiny.ids(2, 9))
        assert tiny.same_bits(logits, plain)
        assert [predicted.shape for predicted in said.values()] == [(18, 2, 2), (18, 1, 2)]


def test_offsets_are_added_to_the_input(model: OffloadedModel) -> None:
    """Those of all layers on the way."""
    offsets = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    said, given, _ = look(model, tiny.ids(1, 9), offsets=offsets)
    for layer, ahead in ((0, 1), (0, 2), (1, 2)):
        hidden = given[layer][0] + torch.from_numpy(offsets[layer:ahead].sum(0))
        chosen, _ = by_hand(routers(model)[ahead], hidden, (), 8)
        assert np.array_equal(said[layer][:, ahead - layer - 1, : chosen.shape[1]], chosen)
    without, _, _ = look(model, tiny.ids(1, 9))
    assert not np.array_equal(said[0], without[0])


def test_events_of_the_trace_are_those_of_the_run(
    model: OffloadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of single tokens, prompts and padded batches; recording does not change what the model or a policy sees."""
    asked: list[RoutingEvent] = []
    step = model.parts.runtime.manager.step
    monkeypatch.setattr(model.parts.runtime.manager, "step", lambda event: [asked.append(event), step(event)][1])
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    batch = {"input_ids": tiny.ids(2, 9), "attention_mask": mask}
    plain = model.generate(**batch, **PLAIN)
    assert not any(event.ahead for event in asked)
    asked.clear()
    gates = GateLookahead(model.module, model.parts.experts, 4, model.parts.runtime.receive_ahead)
    with pytest.warns(UserWarning, match="gates look at most 2 ahead"):
        recording = model.record_trace(tmp_path / "t", scores=True, predicted=4)
    with recording:
        assert torch.equal(model.generate(**batch, **PLAIN), plain)
        model.generate(tiny.ids(1, 5), **PLAIN)
        model(tiny.ids(1, 4))
    gates.detach()
    trace = Trace.open(tmp_path / "t")
    assert trace.predicted is not None and trace.predicted.shape == (trace.num_tokens, 3, 2, 6)
    assert trace.predicted[:, 1, 1:].sum() == trace.predicted[:, 2].sum() == 0
    events = list(routing_events(trace))
    assert [event.ahead for event in events] == [event.ahead for event in asked]
    assert [len(event.ahead) for event in events[:3]] == [2, 1, 0]
    assert not any(router._forward_pre_hooks or router._forward_hooks for router in routers(model))
    with model.record_trace(tmp_path / "scores", scores=True):
        model.generate(**batch, **PLAIN)
        model.generate(tiny.ids(1, 5), **PLAIN)
        model(tiny.ids(1, 4))
    alone = Trace.open(tmp_path / "scores").scores  # asking ahead is not taken for routing
    assert trace.scores is not None and alone is not None and np.array_equal(trace.scores, alone)


# What is refused, by the family's name.


def test_a_router_that_wants_what_is_not_known_yet(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    router = routers(model)[1]
    ask = router.forward
    monkeypatch.setattr(router, "forward", lambda hidden_states, secret: ask(hidden_states))
    with pytest.raises(TraceError, match=r'"qwen3_moe" family cannot be asked ahead: its router also takes secret'):
        look(model, tiny.ids(1, 4))


def test_a_router_that_changes_when_asked(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    router = routers(model)[2]
    ask = router.forward

    def count(hidden_states: torch.Tensor) -> Any:
        router.calls += 1
        return ask(hidden_states)

    router.register_buffer("calls", torch.zeros(()), persistent=False)
    try:
        with monkeypatch.context() as patch, pytest.raises(TraceError, match="its router changes when it is asked"):
            patch.setattr(router, "forward", count)
            look(model, tiny.ids(1, 4))
    finally:
        del router.calls


def test_a_router_with_other_answers(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(routers(model)[1], "forward", lambda hidden_states: hidden_states)
    with (
        pytest.raises(TraceError, match="does not give scores, weights and experts"),
        model.record_trace(tmp_path / "t", predicted=1),
    ):
        model(tiny.ids(1, 4))
    assert not list(tmp_path.iterdir())
