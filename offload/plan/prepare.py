"""From what the user typed to a plan: configuration, skeleton, expert map, footprint, budgets. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cache.errors import BudgetError, CheckpointError
from cache.outputs import check_parent
from offload.checkpoint.adapters import adapter_beside
from offload.checkpoint.hub.files import Source, describe
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.mapping import Checkpoint, read_checkpoint
from offload.costs.precision import parse_precisions
from offload.decide.fallbacks.base import Fallback
from offload.decide.preset import Preset
from offload.decide.presets import compose, make_fallback_of
from offload.device.base import Device
from offload.device.choose import make_device
from offload.device.emulated import EmulatedDevice
from offload.formats import Format
from offload.formats.cpu.which import cpu
from offload.layers.embedding import EmbeddingOnDisk
from offload.layers.linear import DenseLinears, parse_activations, parse_dense
from offload.layers.products import Products, is_exact
from offload.options import PlanOptions
from offload.plan.budgets import DEFAULT_SHARE, Budgets, Plan, choose_context, place
from offload.plan.demand import max_context, needs_of
from offload.plan.needs import Needs
from offload.plan.tuned import find_tuned
from offload.store.index import Origin, StoreIndex
from offload.store.precisions import PrecisionStore
from offload.store.readers import READERS
from offload.system import memory
from offload.system.sizes import parse_bytes


@dataclass(frozen=True)
class Prepared:
    """Everything known about a model before a weight is read."""

    source: Source
    checkpoint: Checkpoint
    device: Device
    plan: Plan
    trust_remote_code: bool
    products: Products
    precisions: tuple[str, ...]
    fallback: Fallback
    store_folder: Path | None
    linears: DenseLinears | None
    embedding: EmbeddingOnDisk | None

    @property
    def experts(self) -> ExpertMap:
        """Which bytes are which expert."""
        return self.checkpoint.experts

    def on_disk(self, source: Source) -> Prepared:
        """The same, once the weights are on this disk."""
        return replace(self, source=source, checkpoint=self.checkpoint.on_disk(source.index))

    @property
    def simple(self) -> bool:
        """Whether every expert is served at one precision, and by itself."""
        return len(self.precisions) == 1 and not self.fallback.lossy

    @property
    def origin(self) -> Origin:
        """What converted experts are told by; the weights must be on this disk."""
        return Origin.of(self.source.name, self.source.revision, self.source.index, self.experts)

    def converted(self) -> tuple[Path, StoreIndex | None]:
        """The folder of converted experts, and its index if there is one. Raises StoreError."""
        folder = self.store_folder or self.origin.folder()
        return folder, StoreIndex.read(folder)


def make_plan(model: str | Path, options: PlanOptions | None = None) -> Plan:
    """What would go where, from the model's configuration and its shards' headers alone. Nothing is loaded.

    Raises what `OffloadedModel.from_pretrained` raises before it loads.
    """
    return plan_and_parts(model, options or PlanOptions())[0]


def plan_and_parts(model: str | Path, options: PlanOptions) -> tuple[Plan, Preset]:
    """As `make_plan`, and the parts that run under the plan."""
    chosen = compose(options, partial(find_tuned, model, options))
    source = describe(model, revision=options.revision, local_files_only=options.local_files_only)
    prepared = prepare(source, options, chosen)
    prepared.device.close()
    return prepared.plan, chosen


def prepare(source: Source, options: PlanOptions, chosen: Preset) -> Prepared:
    """Plan `source` within the budgets of `options`, with the precisions, fallback and scheduler that are `chosen`.

    The device is open afterwards. Raises every error that bad input can cause before loading.
    """
    sizes = _sizes(options)
    checkpoint = read_checkpoint(
        source.name, source.folder, source.index, options.dtype, trust_remote_code=options.trust_remote_code
    )
    names = parse_precisions(chosen.experts)
    if options.expert_store is not None:
        check_parent(options.expert_store)
    products = Products(is_exact(options.exact), parse_activations(options.activations))
    dense = parse_dense(options.dense)
    if dense is not None and products.int8_inputs:
        dense = dense.with_int8_inputs()
    fallback = make_fallback_of(chosen, names, len(checkpoint.experts.layers), checkpoint.experts.num_experts)
    context = choose_context(options.context, max_context(checkpoint))
    device = make_device(options.device, options.link)
    try:
        _check_attention(checkpoint, device)
        with checkpoint.file.blamed():
            linears, embedding = _stand_ins(checkpoint, device, dense)
        index = None
        if source.local and names != ["auto"]:
            origin = Origin.of(source.name, source.revision, source.index, checkpoint.experts)
            index = StoreIndex.read(Path(options.expert_store) if options.expert_store else origin.folder())
        store = PrecisionStore(checkpoint.experts, names, device.torch_device.type, index=index)
        with checkpoint.file.blamed():
            needs = needs_of(
                source.name, checkpoint, context, store, fallback, linears, embedding, divides=chosen.divides
            )
        budgets, notes = _budgets(device, sizes)
        plan = _placed(needs, budgets, device, checkpoint)
    except BaseException:
        device.close()
        raise
    plan = replace(
        plan,
        notes=checkpoint.experts.notes
        + adapter_beside(source.folder)
        + notes
        + _without_effect(options, linears, names),
        download_bytes=source.download_bytes,
        cpu=cpu(exact=products.exact),
        link_bytes_per_s=device.link_bytes_per_s if isinstance(device, EmulatedDevice) else None,
    )
    return Prepared(
        source=source,
        checkpoint=checkpoint,
        device=device,
        plan=plan,
        trust_remote_code=options.trust_remote_code,
        products=products,
        precisions=tuple(names),
        fallback=fallback,
        store_folder=None if options.expert_store is None else Path(options.expert_store),
        linears=linears,
        embedding=embedding,
    )


def _check_attention(checkpoint: Checkpoint, device: Device) -> None:
    """Raises CheckpointError for an implementation of attention that only a GPU computes rightly."""
    asked = checkpoint.config._attn_implementation
    if asked == "flex_attention" and device.torch_device.type == "cpu":
        raise CheckpointError(
            f'{checkpoint.file.name}: its config.json cannot be used: _attn_implementation is "{asked}", which is made '
            'for GPUs: write "sdpa" there, or take it out'
        )


def _sizes(options: PlanOptions) -> dict[str, int | None]:
    stated = {"--gpu-mem": options.gpu_mem, "--cpu-mem": options.cpu_mem, "--expert-cache": options.expert_cache}
    return {flag: None if size is None else parse_bytes(size, flag) for flag, size in stated.items()}


def _stand_ins(
    checkpoint: Checkpoint, device: Device, dense: Format | None
) -> tuple[DenseLinears | None, EmbeddingOnDisk | None]:
    """The linear layers that are quantised, and the embedding that stays on disk; the skeleton has them from now on."""
    linears = embedding = None
    if dense is not None:
        linears = DenseLinears.of(
            checkpoint.skeleton, checkpoint.experts, checkpoint.dtype, dense, device.torch_device.type
        )
        linears.replace(checkpoint.skeleton)
    if not device.is_accelerator:
        embedding = EmbeddingOnDisk.of(checkpoint.skeleton, checkpoint.experts, checkpoint.dtype)
    if embedding is not None:
        embedding.replace(checkpoint.skeleton)
    return linears, embedding


def _placed(needs: Needs, budgets: Budgets, device: Device, checkpoint: Checkpoint) -> Plan:
    """The plan with as many readers as are worth it, or with few where there is no memory for more."""
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    try:
        return place(needs, budgets, device=device.name, dtype=dtype)
    except BudgetError:
        if needs.places <= READERS:
            raise
        # More readers are faster, and have more buffers.
        fewer = replace(needs, readers=needs.readers // needs.places * READERS, places=READERS)
        return place(fewer, budgets, device=device.name, dtype=dtype)


def _without_effect(options: PlanOptions, linears: DenseLinears | None, names: list[str]) -> tuple[str, ...]:
    """What was asked for and changes nothing."""
    notes: tuple[str, ...] = ()
    if linears is not None and not linears.names:
        notes += (f"--dense {options.dense} has no effect: no linear layer of this model would be smaller",)
    if options.activations == "int8" and "nf4" not in (*names, options.dense):
        notes += ("--activations int8 has no effect: no matrix is NF4, unless --experts or --dense says so",)
    if options.expert_store is not None and names == ["auto"]:
        notes += ("--expert-store has no effect: experts come from the checkpoint, unless --experts says otherwise",)
    return notes


def _budgets(device: Device, sizes: dict[str, int | None]) -> tuple[Budgets, tuple[str, ...]]:
    cpu, gpu = sizes["--cpu-mem"], sizes["--gpu-mem"]
    notes: tuple[str, ...] = ()
    if cpu is None:
        cpu = memory.resident_bytes() + int(DEFAULT_SHARE * memory.available_bytes())
        if device.name == "emulated":
            cpu -= min(cpu // 2, gpu or int(DEFAULT_SHARE * (device.memory_bytes() or 0)))
    if device.is_accelerator and gpu is None:
        gpu = int(DEFAULT_SHARE * (device.memory_bytes() or 0))
    elif not device.is_accelerator and gpu is not None:
        notes = ("--gpu-mem has no effect: there is no accelerator here, so the CPU computes",)
        gpu = None
    return Budgets(cpu, gpu, sizes["--expert-cache"]), notes
