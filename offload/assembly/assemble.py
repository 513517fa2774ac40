"""From a model's name to a running model: plan, download, dense weights, experts, transfers, and the hooks on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache.errors import TraceError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.assembly.experts import load_lowest, make_cache, make_manager, open_store
from offload.assembly.one_generation import with_cache
from offload.assembly.passes import Passes
from offload.assembly.placing import fill_caches, keep_uses, order_of
from offload.assembly.refusals import guard
from offload.assembly.steering import Steering, check_scheduler, may_miss
from offload.assembly.threads import own_rows, set_threads
from offload.assembly.turns import Turns
from offload.checkpoint.hub.files import describe, fetch
from offload.checkpoint.layout import ExpertMap
from offload.decide.fallbacks.cache_prior import CachePrior
from offload.decide.presets import compose
from offload.decide.rules import Rules, too_deep
from offload.device.arena import Slots
from offload.device.base import Device
from offload.engine.fused.experts import make_fused
from offload.engine.hook import IMPLEMENTATION
from offload.engine.runtime import ExpertRuntime
from offload.engine.transfer import TransferEngine
from offload.layers.loading import load_dense
from offload.layers.prior import RouterPrior
from offload.layers.router import RouterScores
from offload.layers.uses import find_uses
from offload.options import LoadOptions
from offload.plan.prepare import Prepared, prepare
from offload.plan.tuned import find_tuned
from offload.store.precisions import PrecisionStore
from offload.system import memory
from offload.system.cores import too_many_threads
from offload.system.progress import progress_bar
from offload.system.sizes import format_bytes


@dataclass
class Assembly:
    """The parts of a running model. `module` is None once they are closed; what was counted stays."""

    prepared: Prepared
    module: Any
    store: PrecisionStore
    runtime: ExpertRuntime
    steering: Steering
    passes: Passes
    turns: Turns
    resources: ExitStack

    @property
    def experts(self) -> ExpertMap:
        """Which bytes are which expert."""
        return self.prepared.experts

    @property
    def device(self) -> Device:
        """What computes."""
        return self.prepared.device

    def close(self) -> None:
        """Stop the threads and give all memory back. Closing twice is fine."""
        self.resources.close()
        self.module = None


def assemble(model: str | Path, options: LoadOptions, *, progress: bool = False) -> Assembly:
    """Plan, download what is missing, and load `model`. Raises OffloadError; warns of options without effect."""
    chosen = compose(options, partial(find_tuned, model, options))
    chosen.check_profile(options.profile)
    profile = None if options.profile is None else Trace.open(options.profile)
    rules = Rules.of(chosen, profile, options.prefill)
    source = describe(model, revision=options.revision, local_files_only=options.local_files_only)
    prepared = prepare(source, options, chosen)
    resources = ExitStack()
    resources.callback(prepared.device.close)
    try:
        unused = _unused(options, rules, prepared)
        rules = _settled(rules, prepared, from_preset=options.scheduler is None)
        unused += _nothing_ahead(options, rules, prepared)
        for note in (*prepared.plan.notes, *_more_than_there_is(options, prepared.plan.layers), *unused):
            warnings.warn(note, stacklevel=4)  # what called `from_pretrained`
        if not source.local:
            local = options.local_files_only
            source = fetch(model, revision=options.revision, local_files_only=local, progress=progress)
            prepared = prepared.on_disk(source)
        threads = set_threads(prepared, options.threads, resources)
        return _load(prepared, rules, threads, resources, progress)
    except BaseException:
        resources.close()
        raise


def _more_than_there_is(options: LoadOptions, layers: int) -> Iterator[str]:
    """What is asked for beyond what the machine and the model have, and what is taken instead."""
    for said in (too_many_threads(options.threads), too_deep(options.prefetch_depth, layers)):
        if said is not None:
            yield said


def _unused(options: LoadOptions, rules: Rules, prepared: Prepared) -> list[str]:
    """What to say of that which was asked for and has no effect here."""
    said = []
    if options.profile is not None and not rules.learners:
        parts = "policy, quota, predictor and placement"
        said.append(f"--profile {options.profile} does nothing: of the {parts} that run, none learns from a trace")
    if options.scheduler is None and rules.splits and not prepared.device.is_accelerator:
        said.append(
            f"--preset {options.preset} runs without its scheduler {rules.scheduler}: the CPU computes everything "
            "here, and no layer is divided"
        )
    return said


def _nothing_ahead(options: LoadOptions, rules: Rules, prepared: Prepared) -> Iterator[str]:
    """What to say of how to fetch ahead, where the predictor "auto" is none."""
    if not (rules.optional and rules.predictor == "none"):
        return
    why = "the fallback is lossy" if prepared.fallback.lossy else "all experts fit"
    said = {"--prefetcher": options.prefetcher, "--prefetch-depth": options.prefetch_depth}
    for flag, value in said.items():
        if value is not None:
            yield f"{flag} {value} does nothing: nothing is fetched ahead, since {why}, unless a --predictor is named"


def _settled(rules: Rules, prepared: Prepared, *, from_preset: bool) -> Rules:
    """The rules as this model and this machine have them; the parts that they name are made once, to see that they can
    be. Raises PolicyError and TraceError."""
    layers, experts = prepared.plan.layers, prepared.experts.num_experts
    rules = rules.settled(lossy=prepared.fallback.lossy, ahead=may_miss(prepared))
    rules.make_policy(layers, experts, prepared.plan.slots(Tier.CPU))
    rules.check_causal()
    rules.make_predictor(layers, experts)
    rules.check_placement(layers, experts)
    quota = rules.make_quota(layers, experts)
    if quota is not None:
        quota.slots(prepared.plan.slots(prepared.plan.computing_tier))
    if from_preset and not prepared.device.is_accelerator:
        rules = replace(rules, scheduler="gpu-only")  # a preset's, which has nothing to divide here
    check_scheduler(rules, prepared)
    return rules


def _load(prepared: Prepared, rules: Rules, threads: int, resources: ExitStack, progress: bool) -> Assembly:
    """Everything into memory, within the plan; what must be undone goes to `resources` as soon as it is there."""
    memory.return_large_blocks()
    for file in prepared.experts.files.values():
        file.sample()  # from here on, a change of permissions or links is told from one of weights
    store = open_store(prepared, progress)
    module = _load_dense(prepared, resources, progress)
    with_cache(module)
    runtime, probed = _load_engine(prepared, store, rules, module, resources)
    steering = Steering(prepared, module, store, runtime, threads, probed, resources)
    if isinstance(prepared.fallback, CachePrior):
        resources.callback(RouterPrior(module, prepared.experts, prepared.fallback, runtime.manager).detach)
    steering.share_by(rules)
    steering.prefetch_by(rules)
    steering.split_by(steering.rules)
    if prepared.fallback.keeps_low:
        load_lowest(store, prepared.experts, runtime.manager, runtime.engine, progress)
        runtime.refill = partial(load_lowest, store, prepared.experts, runtime.manager, runtime.engine, progress=False)
    order = order_of(
        rules, prepared.plan.layers, prepared.experts.num_experts, partial(find_uses, module, prepared.experts)
    )
    fill_caches(runtime, order, progress=progress)
    resources.callback(keep_uses, runtime, module, prepared.experts)
    _give_scores(prepared, module, runtime, rules.policy, resources)
    turns = Turns()
    runtime.own_rows = own_rows(prepared)
    passes = Passes(module, runtime, prepared, steering, turns, own_rows=runtime.own_rows)
    resources.callback(passes.detach)
    return Assembly(prepared, module, store, runtime, steering, passes, turns, resources)


def _load_dense(prepared: Prepared, resources: ExitStack, progress: bool) -> Any:
    """The model with all its weights but the experts'."""
    experts, embedding = prepared.experts, prepared.embedding
    on_disk = None if embedding is None else embedding.name
    nbytes = sum(info.nbytes for name, info in experts.dense.items() if name != on_disk)
    title = f"loading {format_bytes(nbytes)} of dense weights"
    with prepared.checkpoint.file.blamed(), progress_bar(title, nbytes, unit="bytes", show=progress) as bar:
        module = load_dense(
            prepared.source.folder,
            prepared.checkpoint.config,
            experts,
            prepared.checkpoint.dtype,
            prepared.device.torch_device,
            IMPLEMENTATION,
            on_read=bar.advance,
            linears=prepared.linears,
            embedding=embedding,
            exact=prepared.products.exact,
        )
    if embedding is not None:
        place = embedding.find(module)
        resources.callback(place.close)
        info = experts.dense[embedding.name]
        place.open(info, experts.files.get(info.file))
    guard(module)
    return module


def _load_engine(
    prepared: Prepared, store: PrecisionStore, rules: Rules, module: Any, resources: ExitStack
) -> tuple[ExpertRuntime, list[list[list[torch.Tensor]]]]:
    """Slots, caches, decision loop and transfers, attached to `module`.

    With them some slots to try a scheduler's costs on, the device's and the host's, by slice, those that are free
    first; none where there is nothing to divide.
    """
    device, plan, experts = prepared.device, prepared.plan, prepared.experts
    tiers = [Tier.GPU, Tier.CPU] if device.is_accelerator else [Tier.CPU]
    sizes = [pool.slot_bytes for pool in plan.pools]
    blocks = {
        tier: [
            (device.allocate if tier is device.tier else device.host_slots)(plan.slots(tier, i), nbytes)
            for i, nbytes in enumerate(sizes)
        ]
        for tier in tiers
    }
    slots = {tier: [Slots(each) for each in of_slices] for tier, of_slices in blocks.items()}
    host_staging = [device.host_slots(plan.places, nbytes) for nbytes in sizes]
    device_staging = [device.allocate(plan.places, nbytes) for nbytes in sizes] if device.is_accelerator else []
    shape = plan.layers, experts.num_experts
    stacks = [
        [make_cache(tier, nbytes, rules.make_policy(*shape, plan.slots(tier, i))) for tier in tiers]
        for i, nbytes in enumerate(sizes)
    ]
    probed: list[list[list[torch.Tensor]]] = []
    if device.is_accelerator:
        for staging, tier in ((device_staging, Tier.GPU), (host_staging, Tier.CPU)):
            probed.append([free + held for free, held in zip(staging, blocks[tier], strict=True)])
    resources.callback(probed.clear)
    engine = TransferEngine(store, device, slots, host_staging, device_staging, plan.readers)
    resources.callback(engine.close)
    manager = make_manager(prepared, store, stacks, module)
    runtime = ExpertRuntime(experts, store, manager, engine, products=prepared.products)
    if prepared.simple:
        runtime.fused = make_fused(runtime, device, store)
    runtime.attach(module)
    resources.callback(runtime.close)
    resources.callback(runtime.detach, module)
    return runtime, probed


def _give_scores(prepared: Prepared, module: Any, runtime: ExpertRuntime, policy: str, resources: ExitStack) -> None:
    """Let a policy that goes by the router's scores of all experts see them, where the family shows them."""
    if not any(cache.policy.uses_scores for cache in runtime.manager.stacks.caches):
        return
    try:
        scores = RouterScores(module, prepared.experts, runtime.receive_scores)
    except TraceError as error:
        warnings.warn(f"--policy {policy} goes by the chosen experts' weights alone: {error}", stacklevel=2)
    else:
        resources.callback(scores.detach)
