"""Rules that choose bits by the routing, in a replay: at which precisions experts are used there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_trace import SIZE, make_trace

from cache.traces.trace import DECODE, PREFILL
from cache.types import Tier
from offload.costs.model import CostModel
from offload.decide.manager import Manager
from offload.decide.presets import PRESETS
from offload.decide.slices import Slices
from offload.simulation.clock import run_timed
from offload.simulation.systems import build_manager
from tests.cache.machines import MB, machine

EXPERTS = 4 * 8
SEVERAL = {"experts": "int4,int2", "fallback": "fate(share=.5)"}


def replayed(preset: str, slots: int, prompt: int = 0, **parts: str) -> Manager:
    """After a trace of 3 sequences whose first tokens are a prompt, with so many experts' bytes of room."""
    trace = make_trace()
    within = np.arange(len(trace.experts)) % 40
    trace = replace(
        trace,
        step=np.where(within < prompt, 0, within - max(prompt - 1, 0)).astype(np.int32),
        phase=np.where(within < prompt, PREFILL, DECODE).astype(np.uint8),
    )
    chosen = replace(PRESETS[preset], **parts)
    slices = Slices.of(chosen.experts, SIZE)
    room = {Tier.CPU: slots * sum(slices.sizes)}
    manager = build_manager(trace, chosen, room, slices)
    cost = CostModel(machine(), expert_bytes=SIZE, tier=Tier.CPU, dense_layer_bytes=5 * MB)
    run_timed(trace, manager, cost, cold=False)
    manager.check_integrity()
    return manager


@pytest.mark.parametrize(("planes", "shares"), [(0.5, (0.25, 0.5, 0.25)), (0.9, (0.81, 0.18, 0.01))])
def test_with_room_for_all_the_mean_of_bits_is_the_one_asked_for(planes: float, shares: tuple[float, ...]) -> None:
    """Only what is missing gets fewer than were asked for, here each slice once."""
    uses = np.array(replayed("d2moe", 2 * EXPERTS, fallback=f"d2moe(planes={planes}, patience=1e9)").serving.uses)
    assert uses.sum() == 3 * 40 * 4 * 2
    assert uses / uses.sum() == pytest.approx(np.array(shares), abs=0.05)


def test_what_would_not_be_in_time_has_fewer_bits() -> None:
    patient, prompt = (
        replayed("d2moe", 8, fallback=f"d2moe(planes=1, patience={patience})") for patience in ("1e9", "0")
    )
    assert sum(patient.serving.uses[1:]) <= 4  # at first nobody knows how long computing takes
    assert sum(prompt.serving.uses[1:]) > 100 and prompt.bytes_from_disk < patient.bytes_from_disk


def test_fate_degrades_prompts_and_no_reply() -> None:
    assert replayed("fate", 8, **SEVERAL).serving.uses[1] == 0
    best, low = replayed("fate", 8, prompt=20, **SEVERAL).serving.uses
    of_prompts = best + low - 3 * 20 * 4 * 2  # by 12 events of up to 8 experts, half of each, rounded down
    assert 12 < of_prompts <= 12 * 8
    assert (of_prompts - 12) / 2 <= low <= of_prompts / 2
