"""From what the user typed to a plan: configuration, skeleton, expert map, footprint, budgets. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cache.errors import BudgetError, PolicyError
from offload.checkpoint.hub import Source
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.mapping import Checkpoint, read_checkpoint
from offload.checkpoint.skeleton import expert_parameters
from offload.costs.precision import NESTED, parse_precisions, title
from offload.decide.fallbacks.base import Fallback, make_fallback
from offload.decide.slices import slice_shares
from offload.device.base import Device
from offload.device.choose import make_device
from offload.device.emulated import EmulatedDevice
from offload.formats import Format
from offload.layers.embedding import EmbeddingOnDisk
from offload.layers.linear import DenseLinears, parse_dense
from offload.plan.budgets import DEFAULT_SHARE, Budgets, Needs, Plan, SliceNeeds, choose_context, place
from offload.plan.footprint import weigh
from offload.plan.work import Work, dense_bytes_read, seen_top_k
from offload.store.index import Origin, StoreIndex
from offload.store.plain import precision_of
from offload.store.precisions import PrecisionStore
from offload.store.readers import READERS, readers_here
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


def prepare(
    source: Source,
    *,
    gpu_mem: str | int | None = None,
    cpu_mem: str | int | None = None,
    expert_cache: str | int | None = None,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    link: str | float | None = None,
    experts: str = "auto",
    fallback: str = "none",
    divides: bool = False,
    expert_store: str | Path | None = None,
    dense: str = "auto",
    trust_remote_code: bool = False,
) -> Prepared:
    """Plan `source` under the given budgets; it `divides` layers if the CPU may compute experts beside an accelerator.

    Raises every error that bad input can cause before loading."""
    sizes = {
        "--gpu-mem": None if gpu_mem is None else parse_bytes(gpu_mem, "--gpu-mem"),
        "--cpu-mem": None if cpu_mem is None else parse_bytes(cpu_mem, "--cpu-mem"),
        "--expert-cache": None if expert_cache is None else parse_bytes(expert_cache, "--expert-cache"),
    }
    checkpoint = read_checkpoint(source.name, source.folder, source.index, dtype, trust_remote_code=trust_remote_code)
    config, expert_map = checkpoint.config, checkpoint.experts
    names = parse_precisions(experts)
    dense_form = parse_dense(dense)
    chooser = _fallback(fallback, experts, names, expert_map)
    max_context = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokens = choose_context(context, max_context)
    place_on = make_device(device, link)
    try:
        linears = None
        if dense_form is not None:
            linears = DenseLinears.of(
                checkpoint.skeleton, expert_map, checkpoint.dtype, dense_form, place_on.torch_device.type
            )
            linears.replace(checkpoint.skeleton)
        embedding = None
        if not place_on.is_accelerator:
            embedding = EmbeddingOnDisk.of(checkpoint.skeleton, expert_map, checkpoint.dtype)
        if embedding is not None:
            embedding.replace(checkpoint.skeleton)
        with seen_top_k(checkpoint.skeleton, [layer.path for layer in expert_map.layers]) as top_k:
            weight = weigh(checkpoint.skeleton, tokens)
        index = None
        if source.local and names != ["auto"]:
            origin = Origin.of(source.name, source.revision, source.index, expert_map)
            index = StoreIndex.read(Path(expert_store) if expert_store is not None else origin.folder())
        store = PrecisionStore(expert_map, names, place_on.torch_device.type, index=index)
        shared = store.readers_per_place
        readers = max(readers_here(store.expert_bytes // expert_map.total_experts), shared * READERS)
        needs = Needs(
            model=source.name,
            context=tokens,
            max_context=max_context,
            dense_bytes=weight.dense_bytes,
            kv_bytes=weight.kv_bytes,
            workspace_bytes={n: nbytes + store.scratch_bytes for n, nbytes in weight.workspace_bytes.items()},
            layers=len(expert_map.layers),
            experts=expert_map.total_experts,
            slices=_slices(store, chooser),
            expert_bytes=store.expert_bytes,
            reader_bytes=store.reader_bytes,
            readers=readers,
            places=readers // shared,
            process_bytes=memory.resident_bytes(),
            beside_bytes=_beside_bytes(checkpoint, top_k[0]) if divides and top_k else 0,
            dense_note=_dense_note(linears, embedding),
            work=_work(checkpoint, store, dense_form, top_k[0]) if top_k else None,
        )
        budgets, notes = _budgets(place_on, sizes)
        if linears is not None and not linears.names:
            notes += (f"--dense {dense} has no effect: no linear layer of this model would be smaller",)
        if expert_store is not None and names == ["auto"]:
            notes += (
                "--expert-store has no effect: experts come from the checkpoint, unless --experts says otherwise",
            )
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        try:
            plan = place(needs, budgets, device=place_on.name, dtype=dtype)
        except BudgetError:
            if needs.places <= READERS:
                raise
            # More readers are faster, and have more buffers.
            fewer = replace(needs, readers=shared * READERS, places=READERS)
            plan = place(fewer, budgets, device=place_on.name, dtype=dtype)
    except BaseException:
        place_on.close()
        raise
    plan = replace(
        plan,
        notes=notes,
        download_bytes=source.download_bytes,
        link_bytes_per_s=place_on.link_bytes_per_s if isinstance(place_on, EmulatedDevice) else None,
    )
    return Prepared(
        source,
        checkpoint,
        place_on,
        plan,
        trust_remote_code,
        tuple(names),
        chooser,
        None if expert_store is None else Path(expert_store),
        linears,
        embedding,
    )


def _fallback(spec: str, experts: str, names: list[str], expert_map: ExpertMap) -> Fallback:
    chooser = make_fallback(spec, len(expert_map.layers), expert_map.num_experts, len(names))
    if chooser.needs_lower and len(names) == 1:
        better = "auto" if names[0] in ("nf4", *NESTED.values()) else experts
        raise PolicyError(
            f"--fallback {chooser.name} needs a lower precision to fall back to: name it in --experts, "
            f'such as "{better},nf4" or "int8>int4"'
        )
    if not chooser.needs_lower and len(names) > 1:
        but = "" if chooser.name == "none" else f", and {chooser.name} does not"
        raise PolicyError(f'--experts "{experts}" names {len(names)} precisions: a --fallback chooses among them{but}')
    return chooser


def _beside_bytes(checkpoint: Checkpoint, top_k: int) -> int:
    """Of a token: its row for every expert it goes to, what they give, and one expert's activations in between."""
    module = checkpoint.skeleton.get_submodule(checkpoint.experts.layers[0].path)
    sides = [side for parameter in expert_parameters(module).values() for side in parameter.shape[1:]]
    hidden = checkpoint.config.get_text_config().hidden_size
    return int((2 * top_k * hidden + 3 * max(sides)) * checkpoint.dtype.itemsize)


def _dense_note(linears: DenseLinears | None, embedding: EmbeddingOnDisk | None) -> str:
    note = "all that is no expert" if embedding is None else "all but experts and token embeddings"
    return note if linears is None else f"{note}, {len(linears.names)} linear layers at {linears.form.title}"


def _work(checkpoint: Checkpoint, store: PrecisionStore, dense: Format | None, top_k: int) -> Work:
    experts = checkpoint.experts
    layer_bytes, head_bytes = dense_bytes_read(checkpoint.skeleton, [layer.path for layer in experts.layers])
    return Work(
        experts_per_layer=experts.num_experts,
        top_k=top_k,
        precision=title(store.precisions[0].name) if len(store.precisions) == 1 else None,
        dense_precision=precision_of(checkpoint.dtype) if dense is None else dense.title,
        record_bytes=store.expert_bytes // experts.total_experts,
        dense_layer_bytes=layer_bytes,
        dense_pass_bytes=head_bytes,
        packs=store.packs,
    )


def _slices(store: PrecisionStore, fallback: Fallback) -> tuple[SliceNeeds, ...]:
    """What each slice gets of the memory for experts."""
    precisions = [precision.slices for precision in store.precisions]
    shares = slice_shares(precisions, store.slot_bytes, fallback.low_share)
    return tuple(
        SliceNeeds(each.name, each.slot_bytes, share, whole=fallback.keeps_low and i in precisions[-1])
        for i, (each, share) in enumerate(zip(store.slices, shares, strict=True))
    )


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
