"""Whole compositions side by side under a simulated clock: what presets would have done with a recorded trace.

The managers are those that run live, several precisions and fallbacks included; every slice travels at its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cache import policy as policies
from cache.errors import OffloadError, PolicyError, ProfileError
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import ExpertKey, Tier
from offload.costs.model import CostModel
from offload.decide.fallbacks.base import Sensitivity
from offload.decide.loads import SplitCosts
from offload.decide.manager import Manager
from offload.decide.placements.base import make_placement, uses_of
from offload.decide.preset import DEFAULT, Preset
from offload.decide.presets import PRESETS, find_preset, in_each, make_fallback_of
from offload.decide.rules import Rules
from offload.decide.slices import Slices, divide, slice_shares
from offload.decide.stacks import Stacks
from offload.simulation.clock import run_timed
from offload.simulation.preset_rows import PresetRow, preset_row
from offload.simulation.rows import Setting, slots_of
from predictors.base import find_predictor

_FORMATS = {"float32": "fp32", "float64": "fp64", "float16": "bf16", "bfloat16": "bf16"}


def chosen_presets(
    names: Sequence[str], given: Mapping[str, Any], has_profile: bool, skipped: Callable[[str], object]
) -> list[Preset]:
    """The presets meant by a list that may say "all": every one, and what runs without one; with the parts that are
    `given` in each.

    Where there is no profile, those of "all" that need one are left out, which `skipped` is told. Raises PolicyError
    for a name that does not exist, for another that needs a profile, and for a depth or a prefetcher that no preset has
    a predictor for.
    """
    found: dict[str, Preset] = {}
    for name in names:
        for preset in (DEFAULT, *PRESETS.values()) if name == "all" else (find_preset(name),):
            own = in_each(preset, **given)
            if has_profile or not own.learns:
                found[own.name] = own
            elif name == "all":
                skipped(f"{own.name} is left out: it learns from a recorded trace; name one with --profile")
            else:
                raise PolicyError(f"preset {name} learns from a recorded trace: name one with --profile")
    for flag, value in (("--prefetch-depth", given.get("prefetch_depth")), ("--prefetcher", given.get("prefetcher"))):
        if value is not None and all(preset.predictor == "none" for preset in found.values()):
            raise PolicyError(f"{flag} {value} does nothing without a --predictor: none of these presets has one")
    return list(found.values())


def replay_preset(trace: Trace, preset: Preset, capacities: Sequence[str], setting: Setting) -> list[PresetRow]:
    """The rows of one preset, one for each capacity, not ranked yet. Raises OffloadError.

    Of `setting`, what a preset says itself (pool, quota, predictor and depth) does not count.
    """
    expert_bytes = setting.expert_bytes or trace.expert_bytes
    if setting.machine is None or expert_bytes is None:
        raise OffloadError(
            "presets are compared in seconds: that takes a machine and an expert's size: "
            "run `offload profile` or give --machine, and give --expert-bytes where the trace does not say it"
        )
    own = own_format(trace)
    slices = Slices.of(preset.experts, expert_bytes, own)
    device = Tier.GPU if setting.device == "gpu" else Tier.CPU
    if device is Tier.CPU:
        preset = replace(preset, scheduler="gpu-only")  # nothing to divide a layer between
    cost = _cost(setting, device, own, own, expert_bytes)
    compute = [_cost(setting, device, name, own, expert_bytes) for name in slices.names]
    profile = None if setting.profile is None else Trace.open(setting.profile)
    placed = placed_by(preset, trace, profile)
    rows = []
    for capacity in capacities:
        room = {device: slots_of(trace, capacity, expert_bytes) * expert_bytes}
        if device is not Tier.CPU:
            room[Tier.CPU] = slots_of(trace, setting.host_capacity, expert_bytes, flag="--host-capacity") * expert_bytes
        manager = build_manager(trace, preset, room, slices, profile, cost, setting.prefill, compute)
        timeline = run_timed(
            trace, manager, cost, cold=not setting.warm, warm_up=setting.warm_up, compute=compute, placed=placed
        )
        rows.append(
            preset_row(trace, preset, capacity, room[device], expert_bytes, setting, manager, timeline, slices, own)
        )
    return rows


def build_manager(
    trace: Trace,
    preset: Preset,
    room: Mapping[Tier, int],
    slices: Slices,
    profile: Trace | None = None,
    cost: CostModel | None = None,
    prefill: str = "auto",
    compute: Sequence[CostModel] = (),
) -> Manager:
    """The decision loop of `preset` for the model of `trace`, with so many bytes for experts on each tier, the one that
    computes first. What asks for the future (`belady`, `oracle`) is given `trace`.

    A scheduler goes by `cost`, and `compute` at each precision, and needs an accelerator: without either of them there
    is nothing to divide. Raises PolicyError, TraceError for a profile of another model, ProfileError for what was not
    measured.
    """
    layers, experts = trace.num_layers, trace.num_experts
    if profile is not None:
        profile.check_model(layers, experts)
    rules = Rules.of(preset, profile, prefill)
    fallback = make_fallback_of(preset, slices.names, layers, experts)
    rules = rules.settled(lossy=fallback.lossy, ahead=trace.predicted is not None)
    shares = slice_shares(slices.precisions, slices.sizes, fallback.low_share)
    slots = {tier: divide(nbytes, layers * experts, slices.sizes, shares) for tier, nbytes in room.items()}
    stacks = []
    for i, nbytes in enumerate(slices.sizes):
        caches = []
        for tier, counts in slots.items():
            policy = policies.make_policy(preset.policy, rules.lanes(layers, experts, counts[i]), profile)
            caches.append(ExpertCache(tier, [nbytes * n for n in policy.lanes.slots.tolist()], policy))
        stacks.append(caches)
    split = rules.make_split(SplitCosts.modelled(cost, compute)) if cost is not None and Tier.GPU in room else None
    fallback.learn(Sensitivity(importance=importance(profile or trace)))
    ahead = rules if find_predictor(rules.predictor).causal else replace(rules, profile=trace)
    return Manager(
        Stacks(stacks, slices.sizes, slices.precisions),
        fallback=fallback,
        prefetcher=ahead.make_prefetcher(layers, experts),
        prefill=rules.make_prefill(layers, experts),
        split=split,
        quota=rules.make_quota(layers, experts),
    )


def placed_by(preset: Preset, trace: Trace, profile: Trace | None) -> list[ExpertKey]:
    """The experts that a preset has in memory at the start, the most important first. Nothing but a `profile` says what
    the model of `trace` used before."""
    placement = make_placement(preset.placement, trace.num_layers, trace.num_experts)
    return placement.order(uses_of(placement, profile))


def importance(trace: Trace) -> dict[ExpertKey, float]:
    """How much each expert matters, as far as a trace can tell: all the router weight that went to it.

    Live, `offload calibrate` measures it.
    """
    layers, experts = trace.num_layers, trace.num_experts
    cells = np.arange(layers)[:, None] * experts + trace.experts
    total = np.bincount(cells.ravel(), trace.weights.astype(np.float64).ravel(), layers * experts)
    return {ExpertKey(*divmod(cell, experts)): float(weight) for cell, weight in enumerate(total)}


def own_format(trace: Trace) -> str:
    """What the recorded experts were stored as; bf16 if nobody said."""
    return trace.metadata.get("precision") or _FORMATS.get(trace.metadata.get("dtype", ""), "bf16")


def _cost(setting: Setting, tier: Tier, format: str, own: str, expert_bytes: int) -> CostModel:
    """What computing at `format` costs; what was not measured is taken to cost as much as at the model's own."""
    machine = setting.machine
    if machine is None:
        raise ProfileError("no machine: run `offload profile`")
    measured = {curve.format for curve in machine.compute[tier].experts} if tier in machine.compute else {own}
    known = format if format in measured else own if own in measured else setting.format
    dense = {curve.format for curve in machine.compute[tier].dense} if tier in machine.compute else {own}
    return CostModel(
        machine,
        expert_bytes=Slices.of(known, expert_bytes, own).sizes[0],
        format=known,
        tier=tier,
        dense_layer_bytes=setting.dense_layer_bytes,
        dense_pass_bytes=setting.dense_pass_bytes,
        dense_format=own if own in dense else setting.format,
        threads=setting.threads,
    )
