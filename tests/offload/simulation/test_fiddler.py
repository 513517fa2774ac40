"""Fiddler: the experts that a profile used most are there from the start, and nothing ever takes their places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.traces.profiles import use_counts
from cache.traces.trace import Trace
from offload.decide.presets import PRESETS
from offload.decide.rules import Rules
from offload.simulation.rows import Setting
from offload.simulation.systems import replay_preset
from tests.cache.machines import MB, machine

LAYERS, EXPERTS, PROMPT, REPLY = 4, 32, 64, 30


def trace_of(seed: int) -> Trace:
    """Two sequences, each a prompt in one pass that uses nearly all experts, and a reply; some experts are popular."""
    rng = np.random.default_rng(seed)
    length = PROMPT + REPLY
    scores = -0.7 * np.log(np.arange(1, EXPERTS + 1)) + rng.gumbel(size=(2 * length, LAYERS, EXPERTS))
    experts = np.argsort(-scores, axis=-1)[..., :4]
    return Trace.from_arrays(
        experts,
        np.full(experts.shape, 0.25),
        [0, length, 2 * length],
        num_experts=EXPERTS,
        step=np.tile(np.maximum(np.arange(length) - PROMPT + 1, 0), 2),
        phase=np.tile((np.arange(length) >= PROMPT).astype(np.uint8), 2),
    )


def test_its_hits_are_the_uses_of_what_the_profile_used_most(tmp_path: Path) -> None:
    trace, profile = trace_of(1), trace_of(2)
    profile.write(tmp_path / "profile.safetensors")
    setting = Setting(
        timed=True,
        machine=machine(),
        profile=str(tmp_path / "profile.safetensors"),
        expert_bytes=10 * MB,
        device="gpu",
        host_capacity="100%",
    )
    (row,) = replay_preset(trace, PRESETS["fiddler"], ["25%"], setting)
    most = np.argsort(-use_counts(profile).ravel(), kind="stable")[: LAYERS * EXPERTS // 4]
    uses = use_counts(trace).ravel()
    assert row.hit_rate == pytest.approx(uses[most].sum() / uses.sum())
    assert row.late_hit_rate == 0
    for other in (replace(PRESETS["fiddler"], placement="empty"), replace(PRESETS["fiddler"], policy="lru")):
        (changed,) = replay_preset(trace, other, ["25%"], setting)
        assert changed.hit_rate != pytest.approx(row.hit_rate, rel=0.01)


def test_prompts_take_no_places_that_would_not_come_back() -> None:
    def prefill(policy: str, scheduler: str) -> str:
        return Rules(policy=policy, scheduler=scheduler).settled().prefill

    assert prefill("static", "cpu-only") == prefill("dali", "dali") == "on-demand"
    assert prefill("static", "gpu-only") == prefill("lru", "cpu-only") == "streamed"
    assert Rules(policy="static", scheduler="cpu-only", prefill="streamed").settled().prefill == "streamed"
