"""Policies in a running model: exact, told of every event, and of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from cache.errors import PolicyError
from cache.policies.lru import LRU
from cache.types import ExpertKey, Phase, RoutingEvent


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
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW, policy=policy) as model:
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


@pytest.mark.parametrize("policy", ["best", "no_such_module:Policy", f"{__name__}:tiny", ""])
def test_no_such_policy(checkpoint: Path, policy: str) -> None:
    before = tiny.offload_threads()
    with pytest.raises(PolicyError):
        tiny.open_model(checkpoint, policy=policy)
    assert tiny.offload_threads() == before


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
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW, policy=f"{__name__}:Faulty") as model:
        with pytest.raises(PolicyError, match="shape"):
            model.generate(tiny.ids(1, 10), **arguments)
        expected = resident.generate(tiny.ids(1, 10), **arguments)
        assert torch.equal(model.generate(tiny.ids(1, 10), **arguments), expected)
        model.parts.runtime.manager.check_integrity()
