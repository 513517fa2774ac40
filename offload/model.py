"""OffloadedModel: a transformers model whose experts live on disk and in bounded caches."""

from __future__ import annotations

import logging
import os
import time
import warnings
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cache.errors import ContextError, DeviceError, PolicyError, TraceError
from cache.traces.trace import Trace
from cache.traces.writer import check_free, remove_partial
from cache.types import Phase, Tier
from offload import assembly
from offload.checkpoint import hub
from offload.checkpoint.layout import ExpertMap
from offload.decide.fallbacks.cache_prior import CachePrior
from offload.decide.mixed import MixedManager
from offload.decide.prefetch import Prefetcher
from offload.decide.presets import compose
from offload.decide.rules import Rules, nothing_to_divide
from offload.decide.split import SplitCosts
from offload.device.arena import Slots
from offload.device.base import Device
from offload.engine.fused.experts import make_fused
from offload.engine.hook import IMPLEMENTATION
from offload.engine.host import HostWorker
from offload.engine.probe import probe_split
from offload.engine.runtime import ExpertRuntime
from offload.engine.transfer import TransferEngine
from offload.formats.cpu import threads as own_threads
from offload.layers.calibration import find_calibration
from offload.layers.loading import load_dense, load_tokenizer
from offload.layers.lookahead import GateLookahead
from offload.layers.prior import RouterPrior
from offload.layers.router import RouterScores
from offload.own_products import all_are_ours
from offload.plan.budgets import Plan
from offload.plan.prepare import Prepared, prepare
from offload.plan.tuned import find_tuned
from offload.plan.work import SMALL_EXPERT_BYTES, computing_threads
from offload.stats import Speed, Stats, TierReport
from offload.system import interrupts, memory
from offload.system.progress import progress_bar
from offload.system.sizes import format_bytes
from offload.traces.recorder import TraceRecorder, recording

_log = logging.getLogger("offload.model")

_LONG_CONTEXT = 2048
"""Tokens from which on attention gains more by several threads of torch's than our own kernels lose by them."""


class OffloadedModel:
    """A Mixture-of-Experts language model inside a memory budget; behaves like the transformers model it holds.

    Make one with `from_pretrained`; use it as a context manager, or `close` it, to give everything back. One thread
    at a time may generate.
    """

    def __init__(
        self,
        prepared: Prepared,
        rules: Rules,
        threads: int | None,
        progress: bool,
    ) -> None:
        self.plan: Plan = prepared.plan
        self._model: Any = None
        self._tokenizer: Any = None
        self._last_pass_end: float | None = None
        self._pass_start: float | None = None
        self._pass = ExitStack()  # what holds while a forward pass runs
        self._folder = prepared.source.folder
        self._trust_remote_code = prepared.trust_remote_code
        self._offload_device: Device = prepared.device
        self._simple = prepared.simple
        self._own_threads = all_are_ours(prepared)
        self._next_rules: Rules | None = None
        self._resources = ExitStack()
        try:
            self._resources.callback(prepared.device.close)
            self._set_threads(threads)
            self._load(prepared, rules, progress)
        except BaseException:
            self._resources.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        gpu_mem: str | int | None = None,
        cpu_mem: str | int | None = None,
        expert_cache: str | int | None = None,
        context: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        preset: str | None = None,
        policy: str | None = None,
        pool: str | None = None,
        policy_profile: str | Path | None = None,
        predictor: str | None = None,
        predictor_profile: str | Path | None = None,
        prefetch_depth: int | None = None,
        scheduler: str | None = None,
        prefill: str = "auto",
        link: str | float | None = None,
        experts: str | None = None,
        fallback: str | None = None,
        expert_store: str | Path | None = None,
        dense: str = "auto",
        threads: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        progress: bool = False,
    ) -> OffloadedModel:
        """Plan, download what is missing, and load `model`: a hub id or a folder with a Hugging Face checkpoint.

        Sizes are bytes or text such as "8G". `cpu_mem` bounds the peak resident memory of the whole process, `gpu_mem`
        the accelerator's; both default to most of what is free. `expert_cache` caps the expert cache of the tier that
        computes, inside its budget. `context` is how many tokens of KV cache to keep room for, all sequences together
        (default 4096, or the model's own limit). `device`: "auto", "cpu", "cuda", "cuda:N" or "emulated" (an
        accelerator made of host memory behind a link of speed `link`). `preset` names a published system
        (docs/presets.md), whose parts run where no argument says otherwise; "auto" is what `offload tune` stored for
        this model, device and budgets. `policy` names an eviction policy (default "lfru"), or `module:Class`, with
        parameters as in "lfu(reset=True)"; `policy_profile` is the recorded trace that one which learns is trained on.
        `pool` is "global" (the default) or "layer": one cache for all layers, or one each. `predictor` says which
        experts come next, `prefetch_depth` how many layers ahead they are fetched (default 2), where there is time; by
        default the next layers' gates are asked, where there is something to fetch and they can be, and it pays;
        `predictor_profile` is the trace that one which learns is trained on. `scheduler` says who computes what the
        accelerator lacks: "gpu-only" (the default) fetches it, "cpu-only" leaves it to the CPU, "auto" and others
        divide each layer between the two (docs/scheduling.md). `prefill` says how prompts are read: "streamed" keeps
        the experts that most of their tokens go to and fetches the next layer's while one computes, "kept" only keeps
        them, "on-demand" does neither, which is all that there is with a `fallback`; "auto" is the first that there is
        (docs/prefill.md). `experts` is what they are stored and computed at: "auto" (the default), the checkpoint's own
        precision, or bf16, int8, nf4, int4, int2; experts are converted on first use, once, into `expert_store`
        (default: offload's cache folder). With a `fallback`, several of them, the best first, as in "auto,nf4" or
        "int8>int4": it chooses which one serves an expert that is not there (docs/precision.md). `dense` is what all
        other linear layers are stored and computed at, routers and gates excepted: "auto", as they are, or bf16, int8,
        nf4, converted while they are loaded. All but "auto" may change what the model says. `threads` is how many
        threads compute on the CPU (default: torch's choice; one where experts are small).

        Raises OffloadError (see `cache.errors`) for everything a user can cause, before anything large is read or
        written. Warns when a budget has no effect. Side effects: torch's thread count, until `close`; and the C library
        gives large blocks of memory back as soon as they are free, from now on.
        """
        chosen = compose(
            preset,
            partial(find_tuned, model, device, gpu_mem, cpu_mem, expert_cache),
            policy=policy,
            pool=pool,
            predictor=predictor,
            prefetch_depth=prefetch_depth,
            scheduler=scheduler,
            experts=experts,
            fallback=fallback,
        )
        chosen.check_profiles(policy_profile=policy_profile, predictor_profile=predictor_profile)
        rules = Rules(
            policy=chosen.policy,
            pool=chosen.pool,
            policy_profile=None if policy_profile is None else Trace.open(policy_profile),
            predictor=chosen.predictor,
            predictor_profile=None if predictor_profile is None else Trace.open(predictor_profile),
            prefetch_depth=chosen.prefetch_depth,
            scheduler=chosen.scheduler,
            prefill=prefill,
        )
        source = hub.describe(model, revision=revision, local_files_only=local_files_only)
        prepared = prepare(
            source,
            gpu_mem=gpu_mem,
            cpu_mem=cpu_mem,
            expert_cache=expert_cache,
            context=context,
            device=device,
            dtype=dtype,
            link=link,
            experts=chosen.experts,
            fallback=chosen.fallback,
            divides=chosen.divides,
            expert_store=expert_store,
            dense=dense,
            trust_remote_code=trust_remote_code,
        )
        try:
            layers, width = prepared.plan.layers, prepared.experts.num_experts
            rules = rules.settled(simple=prepared.simple, ahead=_may_miss(prepared.plan, prepared.experts))
            rules.make_policy(layers, width, prepared.plan.slots(Tier.CPU))
            rules.make_predictor(layers, width)
            if scheduler is None and not prepared.device.is_accelerator:
                rules = replace(rules, scheduler="gpu-only")  # a preset's, which has nothing to divide here
            _check_scheduler(rules, prepared)
            for note in prepared.plan.notes:
                warnings.warn(note, stacklevel=2)
            if not source.local:
                source = hub.fetch(model, revision=revision, local_files_only=local_files_only, progress=progress)
                prepared = prepared.on_disk(source)
        except BaseException:
            prepared.device.close()
            raise
        return cls(prepared, rules, threads, progress)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self._open_model.config

    @property
    def generation_config(self) -> Any:
        """The transformers generation defaults; may be changed."""
        return self._open_model.generation_config

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self._offload_device.torch_device

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are computed in."""
        dtype: torch.dtype = self._open_model.dtype
        return dtype

    @property
    def context(self) -> int:
        """Tokens of KV cache there is room for, all sequences together."""
        return self.plan.context

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded on first use; None if it has none. Raises CheckpointError if damaged."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder, trust_remote_code=self._trust_remote_code)
        return self._tokenizer

    @property
    def rules(self) -> Rules:
        """What it decides by: as it was loaded, or as `use_predictor`, `use_prefill` and `use_scheduler` said since."""
        return self._rules

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with everything it takes.

        A prompt longer than the workspace allows is read in chunks. Raises ContextError before it starts if prompt and
        reply may need more KV cache than there is, and TransferError if an expert cannot be read.
        """
        model = self._open_model
        prompt = next((kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if name in kwargs), None)
        prompt = args[0] if prompt is None and args else prompt
        config = deepcopy(kwargs.get("generation_config") or model.generation_config)
        config.update(**{name: value for name, value in kwargs.items() if hasattr(config, name)})
        recorder = self._runtime.recorder
        if recorder is not None:
            recorder.begin_generation(prompt.shape[1] if isinstance(prompt, torch.Tensor) else 0, config, kwargs)
        if isinstance(prompt, torch.Tensor):
            sequences = prompt.shape[0] * max(config.num_beams or 1, config.num_return_sequences or 1)
            self._check_generation(sequences, prompt.shape[1], config)
            chunk = max(self.plan.chunk // sequences, 1)
            if prompt.shape[1] > chunk and config.prefill_chunk_size is None:
                kwargs["prefill_chunk_size"] = chunk
        self._last_pass_end = None
        with self._pass:
            generated = model.generate(*args, **kwargs)
        if recorder is not None:
            recorder.end_generation()
        return generated

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `forward`. Raises ContextError for more tokens than workspace or KV cache have room for."""
        self._last_pass_end = None
        with self._pass:
            return self._open_model(*args, **kwargs)

    __call__ = forward

    @property
    def stats(self) -> Stats:
        """What happened since loading, or since `reset_stats`."""
        manager, plan = self._runtime.manager, self.plan
        prefetcher = manager.prefetcher
        link = manager.stats[plan.computing_tier].bytes_in if self._offload_device.is_accelerator else 0
        return Stats(
            tiers={
                cache.tier: TierReport(
                    deepcopy(manager.stats[cache.tier]),
                    sum(stack[i].capacity_bytes for stack in manager.stacks),
                    sum(stack[i].peak_bytes for stack in manager.stacks),
                )
                for i, cache in enumerate(manager.caches)
            },
            computing=plan.computing_tier,
            bytes_from_disk=manager.bytes_from_disk,
            bytes_over_link=link,
            stall_s=self._runtime.stall_s,
            peak_rss_bytes=memory.peak_resident_bytes(),
            peak_gpu_bytes=self._peak_gpu_bytes(),
            cpu_mem_bytes=plan.cpu_mem_bytes,
            gpu_mem_bytes=plan.gpu_mem_bytes,
            speed=deepcopy(self._speed),
            precision_uses=self._precision_uses(),
            prefetch=None if prefetcher is None or not prefetcher.predicts else "on" if prefetcher.active else "off",
            prefetch_gain=None if prefetcher is None or prefetcher.switch is None else prefetcher.switch.gain,
        )

    def record_trace(
        self,
        path: str | os.PathLike[str],
        *,
        scores: bool = False,
        predicted: int = 0,
        workload: str = "unknown",
        seed: int | None = None,
        overwrite: bool = False,
    ) -> AbstractContextManager[TraceRecorder]:
        """Record which experts every token goes to, while a `with` block runs, as the trace `path` (docs/traces.md).

        Written as it goes, beside `path`, and put in place at the end; an error in the block, or a Ctrl-C, loses only
        the sequences under way, and `offload trace recover` saves those that a killed process had finished. `scores`
        adds the router's scores of all experts, `predicted` what the gates of so many next layers say of each gate's
        input. `workload` and `seed` describe the trace.

        Raises TraceError if `path` exists (unless `overwrite`), for scores or predictions that the family does not
        give, and while generating for what has no plain sequences: beams and assisted decoding.
        """
        metadata = {
            "model": self.plan.model,
            "source": f"offload {version('offload')}",
            "workload": workload,
            "dtype": self.plan.dtype,
            "expert_bytes": str(self.plan.slot_bytes),
            "precision": self._store.precisions[0].name,
            **({} if seed is None else {"seed": str(seed)}),
        }
        if overwrite:
            remove_partial(path)
        else:
            check_free(path)
        return recording(
            path, self._open_model, self._runtime, self._experts, metadata, scores=scores, predicted=predicted
        )

    def use_predictor(
        self, predictor: str, *, depth: int | None = None, profile: str | os.PathLike[str] | None = None
    ) -> None:
        """From now on, fetch ahead what `predictor` expects in the next `depth` layers; "none": all on demand.

        As `from_pretrained` takes them. What was learnt and measured for the predictor before is forgotten. Raises
        PolicyError and TraceError.
        """
        trained_on = None if profile is None else Trace.open(profile)
        rules = replace(
            self._rules, predictor=predictor, prefetch_depth=depth, predictor_profile=trained_on, optional=False
        )
        ahead = _may_miss(self.plan, self._experts)
        self._prefetch_by(rules.settled(simple=self._simple, ahead=ahead))

    def use_prefill(self, prefill: str) -> None:
        """From now on, read prompts so, as `from_pretrained` takes it. Raises PolicyError.

        What is known of the prompts before is forgotten, and what was measured for streaming them.
        """
        rules = replace(self._rules, prefill=prefill).settled(simple=self._simple)
        self._prefetch_by(rules)

    def use_scheduler(self, scheduler: str) -> None:
        """From now on, let `scheduler` say who computes what the accelerator lacks, as `from_pretrained` takes it.

        Raises PolicyError, and TransferError if the disk fails while costs are measured, the first time.
        """
        rules = replace(self._rules, scheduler=scheduler)
        self._split_by(rules)
        self._rules: Rules = rules

    def reset_stats(self) -> None:
        """Count from zero. Caches keep what they hold; the peaks of process and device memory go on."""
        self._runtime.reset_stats()
        self._speed = {phase: Speed() for phase in Phase}

    def close(self) -> None:
        """Stop the threads and give all memory back. The model cannot be used afterwards; closing twice is fine."""
        self._resources.close()
        self._model = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._model is None

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open_model(self) -> Any:
        if self._model is None:
            raise RuntimeError("this OffloadedModel is closed")
        return self._model

    def _set_threads(self, threads: int | None) -> None:
        beside = 1 if self.plan.slot_bytes < SMALL_EXPERT_BYTES else self._offload_device.threads_beside
        self._host_threads = threads or beside
        if threads is None:
            threads = computing_threads(self.plan.device, self.plan.slot_bytes)
        if threads is not None:
            if threads < 1:
                raise DeviceError(f"--threads {threads}: at least one thread computes")
            self._resources.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)

    def _load(self, prepared: Prepared, rules: Rules, progress: bool) -> None:
        memory.return_large_blocks()
        device, plan, experts = prepared.device, prepared.plan, prepared.experts
        self._experts = experts
        self._prepared = prepared
        self._split_costs: SplitCosts | None = None
        self._probed: list[list[torch.Tensor]] = []  # slots of the device and of the host, free ones first
        self._resources.callback(self._probed.clear)
        store = self._store = assembly.open_store(prepared, progress)
        on_disk = None if prepared.embedding is None else prepared.embedding.name
        dense_bytes = sum(info.nbytes for name, info in experts.dense.items() if name != on_disk)
        title = f"loading {format_bytes(dense_bytes)} of dense weights"
        with progress_bar(title, dense_bytes, unit="bytes", show=progress) as bar:
            model = load_dense(
                prepared.source.folder,
                prepared.checkpoint.config,
                experts,
                prepared.checkpoint.dtype,
                device.torch_device,
                IMPLEMENTATION,
                on_read=bar.advance,
                linears=prepared.linears,
                embedding=prepared.embedding,
            )
        if prepared.embedding is not None:
            embedding = prepared.embedding.find(model)
            self._resources.callback(embedding.close)
            embedding.open(experts.dense[prepared.embedding.name])
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
            [assembly.make_cache(tier, nbytes, rules.make_policy(*shape, plan.slots(tier, i))) for tier in tiers]
            for i, nbytes in enumerate(sizes)
        ]
        engine = TransferEngine(store, device, slots, host_staging, device_staging, plan.readers)
        self._resources.callback(engine.close)
        manager = assembly.make_manager(prepared, store, stacks, model)
        runtime = self._runtime = ExpertRuntime(experts, store, manager, engine)
        if prepared.simple:
            runtime.fused = make_fused(runtime, device, store)
        runtime.attach(model)
        self._resources.callback(runtime.close)
        self._resources.callback(runtime.detach, model)
        self._looking = ExitStack()
        self._resources.callback(self._looking.close)
        self._model = model
        if isinstance(prepared.fallback, CachePrior) and isinstance(manager, MixedManager):
            self._resources.callback(RouterPrior(model, experts, prepared.fallback, manager).detach)
        self._prefetch_by(rules)
        if device.is_accelerator:
            self._probed += [device_staging[0] + blocks[Tier.GPU][0], host_staging[0] + blocks[Tier.CPU][0]]
        self._split_by(rules)
        if prepared.fallback.keeps_low:
            assembly.load_lowest(store, experts, manager, engine, progress)
        if any(cache.policy.uses_scores for stack in stacks for cache in stack):
            self._give_scores(model, rules.policy)
        self._speed = {phase: Speed() for phase in Phase}
        for hook in (
            model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            model.register_forward_hook(self._after_pass, always_call=True),
        ):
            self._resources.callback(hook.remove)

    def _prefetch_by(self, rules: Rules) -> None:
        _ = self._open_model
        manager = self._runtime.manager
        shape = self.plan.layers, self._experts.num_experts
        prefetcher = rules.make_prefetcher(*shape, self.plan.slot_bytes)
        best = self._store.precisions[0]
        if rules.predictor != "none" and len(best.slices) > 1:
            raise PolicyError(
                f"--predictor {rules.predictor}: {best.name} lies in {len(best.slices)} slices, and only whole experts "
                'are fetched ahead: use precisions that are no parts of each other, such as "auto,nf4", or no predictor'
            )
        lookahead = None
        if prefetcher is not None and prefetcher.predictor.looks_ahead:
            try:
                lookahead = self._look_ahead(prefetcher, rules)
            except TraceError as error:
                if not rules.optional:
                    raise
                _log.info("nothing is fetched ahead: %s", error)
                rules = rules.without_predictor()
                prefetcher = rules.make_prefetcher(*shape, self.plan.slot_bytes)
        with interrupts.held_back():
            self._runtime.settle()
        self._looking.close()
        if lookahead is not None:
            self._looking.callback(lookahead.detach)
        for cache in manager.caches:
            cache.favour(())
            cache.rank(None)
        manager.prefetcher = prefetcher
        manager.prefill = rules.make_prefill(*shape)
        self._rules, self._next_rules = rules, None

    def _look_ahead(self, prefetcher: Prefetcher, rules: Rules) -> GateLookahead:
        model = self._open_model
        calibration = find_calibration(model, self._experts)
        return GateLookahead(
            model,
            self._experts,
            prefetcher.depth,
            self._runtime.receive_ahead,
            offsets=None if calibration is None else calibration.offsets,
            wanted=lambda: prefetcher.active,
            refused=self._gates_refused if rules.optional else None,
        )

    def _gates_refused(self, error: Exception) -> None:
        """In the midst of a pass: from the next one on nothing is fetched ahead."""
        _log.info("nothing is fetched ahead: %s", error)
        self._next_rules = self._rules.without_predictor()

    def _split_by(self, rules: Rules) -> None:
        runtime = self._runtime
        manager = runtime.manager
        if not rules.splits:
            manager.split = None
            return
        _ = self._open_model
        _check_scheduler(rules, self._prepared)
        with interrupts.held_back():
            runtime.settle()
            if runtime.host is None:
                runtime.host = HostWorker(self._offload_device, self._host_threads)
                self._resources.callback(runtime.host.close)
            if self._split_costs is None:
                self._split_costs = self._probe(runtime.host)
        manager.split = rules.make_split(self._split_costs)

    def _probe(self, worker: HostWorker) -> SplitCosts:
        runtime, layer = self._runtime, self._experts.layers[0]
        return probe_split(
            self._open_model.get_submodule(layer.path),
            self._open_model.config.get_text_config().hidden_size,
            self._store.slices[0],
            lambda slot: runtime.weights(layer, 0, [slot]),
            self.dtype,
            self._offload_device,
            worker,
            *self._probed,
        )

    def _give_scores(self, model: Any, policy: str) -> None:
        """Let the policy see the router's scores of all experts, where the family shows them."""
        try:
            scores = RouterScores(model, self._experts, self._runtime.receive_scores)
        except TraceError as error:
            warnings.warn(f"--policy {policy} goes by the chosen experts' weights alone: {error}", stacklevel=2)
        else:
            self._resources.callback(scores.detach)

    def _before_pass(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens: Any = next(value for value in given if value is not None)
        past = kwargs.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        sequences, new = tokens.shape[:2]
        self._pass_start = None
        self._check_pass(sequences, length, new)
        if self._next_rules is not None:
            self._prefetch_by(self._next_rules)
        runtime = self._runtime
        runtime.phase = Phase.DECODE if new == 1 and length else Phase.PREFILL
        if length == 0:
            runtime.sequence, runtime.step = runtime.sequence + 1, 0
        else:
            runtime.step += 1
        if runtime.recorder is not None:
            runtime.recorder.begin_pass(tokens, kwargs.get("attention_mask"), length, runtime.phase)
        self._pass.enter_context(interrupts.held_back())
        self._pass.enter_context(self._offload_device.computing())
        if self._own_threads and sequences * new == 1 and length < _LONG_CONTEXT:
            self._pass.enter_context(own_threads.alone())
        self._pass_tokens = sequences * new
        self._pass_start = time.perf_counter()

    def _after_pass(self, module: Any, args: Any, output: Any) -> None:
        if self._pass_start is None:  # it was refused before it began
            return
        self._pass.close()
        now = time.perf_counter()
        phase = self._runtime.phase
        start, self._pass_start = self._pass_start, None
        self._runtime.passed(now - start)
        if self._runtime.recorder is not None:
            self._runtime.recorder.end_pass(complete=output is not None)
        if phase is Phase.DECODE and self._last_pass_end is not None:
            start = self._last_pass_end
        self._speed[phase].tokens += self._pass_tokens
        self._speed[phase].seconds += now - start
        self._last_pass_end = now

    def _check_pass(self, sequences: int, length: int, new: int) -> None:
        if sequences * (length + new) > self.context:
            raise ContextError(
                f"{sequences} sequences of {length + new} tokens need {sequences * (length + new)} tokens of KV cache, "
                f"there is room for {self.context}: pass fewer, or raise --context"
            )
        if sequences * new > self.plan.chunk:
            raise ContextError(
                f"one pass of {sequences * new} tokens does not fit the workspace, "
                f"which has room for {self.plan.chunk}: pass fewer at a time, or let generate() do so, "
                "or raise the memory budget"
            )

    def _check_generation(self, sequences: int, prompt: int, config: Any) -> None:
        if config.max_new_tokens is not None:
            length = prompt + config.max_new_tokens
        else:
            length = config.max_length or prompt + 20  # what transformers makes when nobody says how many
        if sequences * length > self.context:
            raise ContextError(
                f"a prompt of {prompt} tokens and a reply make up to {length}, {sequences} at once: "
                f"{sequences * length} tokens of KV cache, and there is room for {self.context}: "
                "lower max_new_tokens, or raise --context"
            )

    def _precision_uses(self) -> dict[str, int]:
        manager = self._runtime.manager
        names = [precision.name for precision in self._store.precisions]
        if isinstance(manager, MixedManager):
            others = {"skipped": manager.skipped, "replaced": manager.replaced}
            return dict(zip(names, manager.uses, strict=True)) | {name: n for name, n in others.items() if n}
        return {names[0]: manager.stats[self.plan.computing_tier].accesses}

    def _peak_gpu_bytes(self) -> int | None:
        if not self._offload_device.is_accelerator:
            return None
        measured = self._offload_device.peak_bytes()
        if measured is not None:
            return measured
        # The emulated accelerator's memory is host memory: what was set aside for it is what it can have used.
        return sum(nbytes for _, tier, nbytes, _ in self.plan.rows() if tier == Tier.GPU.value)


def _may_miss(plan: Plan, experts: ExpertMap) -> bool:
    """Whether whole experts may have to be fetched to where they are computed."""
    return len(plan.pools) == 1 and plan.slots(plan.computing_tier) < experts.total_experts


def _check_scheduler(rules: Rules, prepared: Prepared) -> None:
    """Raises PolicyError where nothing can be divided, or not by a scheduler."""
    if not rules.splits:
        return
    if not prepared.device.is_accelerator:
        raise nothing_to_divide(rules.scheduler)
    if len(prepared.precisions) > 1 or prepared.fallback.lossy:
        raise PolicyError(
            f"--scheduler {rules.scheduler} divides experts of one precision: with several, or a fallback, it is "
            "the fallback that says what becomes of a miss: leave one of the two out"
        )
