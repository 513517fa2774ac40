"""Fallbacks that judge single tokens, in running models: against plain torch without the same pairs, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from live_model import drive
from logs import same, twin

from cache.traces.trace import Trace
from cache.types import Phase, RoutingEvent
from offload.costs.model import CostModel
from offload.decide.log import Decision
from offload.decide.plan import LayerPlan
from offload.model import OffloadedModel
from offload.simulation.clock import run_timed
from tests.cache.machines import machine

Weights = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""Experts and weights [T, K] of a pass, and whether it goes on with replies -> the weights that a rule leaves."""

ADAPMOE = "adapmoe(threshold=.06, skip=True)"
PLAIN = "adapmoe(threshold=.06, skip=True, renormalise=False)"
SPEC = "moe-spec(budget=3)"
PROMPTS = "moe-spec(budget=3, all_passes=True, renormalise=True)"
HOBBIT = "hobbit(t1=.7, t2=.7, skip=True)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of eight experts, of which a token goes to four, in float32."""
    return tiny.save(
        tmp_path_factory.mktemp("gates") / "model",
        "mixtral",
        num_hidden_layers=3,
        num_local_experts=8,
        num_experts_per_tok=4,
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))


def rest(weights: torch.Tensor) -> torch.Tensor:
    """Of each weight [T, K], the share that it and the weaker ones of its token have."""
    not_stronger = weights[:, None, :] <= weights[:, :, None]
    return (weights[:, None, :] * not_stronger).sum(-1) / weights.sum(-1, keepdim=True)


def rescaled(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    left = weights * kept
    return left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)


def adapmoe(renormalise: bool) -> Weights:
    def left(experts: torch.Tensor, weights: torch.Tensor, continues: bool) -> torch.Tensor:
        kept = (rest(weights) ** 2 > 0.06) | (weights == weights.amax(-1, keepdim=True))
        return rescaled(weights, kept) if renormalise else weights * kept

    return left


def moe_spec(all_passes: bool) -> Weights:
    def left(experts: torch.Tensor, weights: torch.Tensor, continues: bool) -> torch.Tensor:
        if len(experts) == 1 or not (continues or all_passes):
            return weights
        totals = torch.zeros(8).scatter_add_(0, experts.flatten(), weights.flatten())
        kept = torch.isin(experts, totals.topk(3).indices)
        if not all_passes:
            return weights * kept
        left = weights * kept
        return left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-30)

    return left


def hobbit(experts: torch.Tensor, weights: torch.Tensor, continues: bool) -> torch.Tensor:
    """Where nothing is resident: an expert is left out if every token that goes to it has more than .7 before it."""
    before = 1 - rest(weights)
    needed = [bool((before[experts == expert] <= 0.7 + 1e-6).any()) for expert in range(8)]
    return weights * torch.tensor(needed)[experts]


RULES: list[tuple[str, str, Weights]] = [
    (ADAPMOE, "auto", adapmoe(True)),
    (PLAIN, "auto", adapmoe(False)),
    (SPEC, "auto", moe_spec(False)),
    (PROMPTS, "auto", moe_spec(True)),
    (HOBBIT, "auto,int8", hobbit),
]


@contextmanager
def left_to(model: Any, left: Weights) -> Iterator[None]:
    """While it runs, the experts of the plain `model` have the weights that a rule leaves."""

    def before(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, experts, weights = args
        return hidden, experts, left(experts, weights, continues[0])

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        past = kwargs.get("past_key_values")
        continues[0] = given.shape[1] == 1 and past is not None and past.get_seq_length() > 0

    continues = [False]
    hooks = [model.model.register_forward_pre_hook(note, with_kwargs=True)]
    hooks += [m.register_forward_pre_hook(before) for name, m in model.named_modules() if name.endswith(".experts")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any) -> list[torch.Tensor]:
    """Of a prompt and a reply, one sequence and a batch."""
    found = []
    for rows in (1, 3):
        said = model.generate(
            tiny.ids(rows, 7), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        found.append(torch.stack(said.logits))
    return found


def open_with(folder: Path, slots: float, **options: Any) -> OffloadedModel:
    """With room for so many experts at every precision."""
    with tiny.open_model(folder, **options) as model:
        nbytes = int(slots * sum(pool.slot_bytes for pool in model.plan.pools))
    return tiny.open_model(folder, expert_cache=max(nbytes, 1), **options)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(("fallback", "experts", "left"), RULES, ids=[spec for spec, *_ in RULES])
def test_what_runs_is_plain_torch_without_the_same_pairs(
    checkpoint: Path, device: str, fallback: str, experts: str, left: Weights
) -> None:
    plain = tiny.resident(checkpoint)
    with torch.no_grad():
        intact = logits(plain)
        with left_to(plain, left):
            expected = logits(plain)
    slots = 0 if fallback == HOBBIT else 6
    with open_with(checkpoint, slots, device=device, experts=experts, fallback=fallback) as model:
        found = logits(model)
        stats = model.stats
        model.parts.runtime.manager.check_integrity()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, intact, strict=True)), (
        "nothing was dropped"
    )
    assert sum(stats.precision_uses.values()) == stats.tiers[stats.computing].counts.accesses
    if fallback == HOBBIT:
        assert stats.precision_uses["skipped"] > 0 and stats.dropped_share == 0
    else:
        assert 0 < stats.dropped_share < 1 and "skipped" not in stats.precision_uses


@pytest.mark.parametrize(("fallback", "experts"), [(spec, experts) for spec, experts, _ in RULES] + [
    ("hobbit(t1=.4, t2=.7, skip=True)", "auto,int8"), ("adapmoe(threshold=.2)", "auto,int8")
])  # fmt: skip
def test_a_replay_drops_and_lowers_the_same(checkpoint: Path, tmp_path: Path, fallback: str, experts: str) -> None:
    """A trace has what routers chose, before a rule: replayed by the same rule it gives the same events and plans."""
    path = tmp_path / "live.safetensors"
    options: dict[str, Any] = {"experts": experts, "fallback": fallback, "prefill": "on-demand", "predictor": "none"}
    with open_with(checkpoint, 9, **options) as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        with model.record_trace(path):
            drive(model)
        again: list[Decision] = []

        def each(event: RoutingEvent, plan: LayerPlan) -> None:
            again.append(Decision.of(plan))

        replayed = twin(manager, model.rules, fallback)
        nbytes = model.plan.slot_bytes
        trace = Trace.open(path)
        cost = CostModel(machine(), expert_bytes=nbytes, tier=manager.computing.tier, dense_layer_bytes=0)
        timeline = run_timed(trace, replayed, cost, cold=False, each=each)
    assert len(log) == len(again) > 90
    for live, other in zip(log, again, strict=True):
        mine, theirs = (each.event._replace(sequence=0, step=0, scores=None, opening=None) for each in (live, other))
        assert mine == theirs
        other.event = live.event
        assert same(live, other)
    serving, other_serving = manager.serving, replayed.serving
    assert (serving.uses, serving.skipped) == (other_serving.uses, other_serving.skipped)
    assert (serving.dropped, serving.routed) == (other_serving.dropped, other_serving.routed)
    assert timeline.phases[Phase.PREFILL].tokens + timeline.phases[Phase.DECODE].tokens == trace.num_tokens
    several = [decision.event for decision in log if max(decision.event.tokens) > 1]
    assert several and all(bool(event.before) == ("hobbit" in fallback or "adapmoe" in fallback) for event in several)


def test_moe_spec_acts_where_guesses_are_verified(checkpoint: Path) -> None:
    """One sequence: its prompt and its single tokens are whole, what verifies several guesses is not."""
    ids, assistant = tiny.ids(1, 9), tiny.resident(checkpoint)
    with open_with(checkpoint, 12, fallback=SPEC) as model:
        model.generate(ids, max_new_tokens=12, do_sample=False)
        assert model.stats.dropped_share == 0
        log: list[Decision] = []
        model.parts.runtime.manager.log = log
        model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert model.stats.dropped_share > 0
    dropped = [decision.event for decision in log if decision.event.dropped]
    assert all(len(event.experts) <= 3 for event in dropped) and all(event.step > 0 for event in dropped)
    assert any(len(decision.event.experts) > 3 for decision in log if decision.event.step == 0)


@pytest.mark.parametrize("experts", ["auto", "nf4"])
def test_kernels_that_compute_experts_whole_drop_them_too(tmp_path: Path, experts: str) -> None:
    """bfloat16, not exact, one token and many: against the same kernels with the weights that the rule leaves."""
    folder = tiny.save(
        tmp_path / "model", "mixtral", torch.bfloat16, hidden_size=64, intermediate_size=64, num_experts_per_tok=4
    )
    generator = torch.Generator().manual_seed(0)
    with (
        tiny.open_model(folder, experts=experts, exact=False) as whole,
        tiny.open_model(folder, experts=experts, fallback=PLAIN, exact=False) as gated,
        torch.no_grad(),
    ):
        paths = [layer.path for layer in gated.parts.experts.layers]
        for tokens in (1, 3, 21):
            hidden = torch.randn(tokens, 64, generator=generator).bfloat16()
            scores = torch.randn(tokens, whole.config.num_local_experts, generator=generator)
            weights, chosen = scores.softmax(-1).topk(4)
            weights = weights.bfloat16()
            mine = gated.module.get_submodule(paths[0])(hidden, chosen, weights)
            left = adapmoe(False)(chosen, weights.float(), True).bfloat16()
            theirs = whole.module.get_submodule(paths[0])(hidden, chosen, left)
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.01)
        assert 0 < gated.stats.dropped_share < 1
        gated.parts.runtime.manager.log = log = []
        gated.generate(tiny.ids(1, 5), max_new_tokens=8, do_sample=False)
    assert any(decision.event.dropped for decision in log if decision.event.phase is Phase.DECODE)
