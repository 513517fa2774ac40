"""Converting a model by name: from a folder or the hub to a folder of records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.outputs import check_parent
from offload.checkpoint.hub.files import fetch
from offload.checkpoint.mapping import read_checkpoint
from offload.costs.precision import parse_precisions
from offload.device.choose import device_kind
from offload.options import PlanOptions
from offload.plan.budgets import DEFAULT_SHARE
from offload.store.convert import convert
from offload.store.index import Origin
from offload.store.plain import own_precision
from offload.store.precisions import records_of
from offload.store.record import store_bytes
from offload.system import memory
from offload.system.progress import progress_bar


@dataclass(frozen=True)
class Converted:
    """What a conversion gave: bytes of each format's records, beside what the checkpoint's experts take."""

    folder: Path
    nbytes: dict[str, int]
    checkpoint_bytes: int


def convert_model(model: str | Path, options: PlanOptions, *, progress: bool = False) -> Converted:
    """Store the experts of `model` at the precisions that `options.experts` names; "auto" is the model's own.

    They go to `options.expert_store`, or offload's cache folder; what is there already is left as it is. For a CPU,
    device "cpu" or "emulated", records lie as it computes with them, where that differs. Raises OffloadError as
    `OffloadedModel.from_pretrained` does, and as `convert` does. Side effects: downloads, files.
    """
    names = parse_precisions(options.experts or "auto")
    if options.expert_store is not None:
        check_parent(options.expert_store)
    local = options.local_files_only
    source = fetch(model, revision=options.revision, local_files_only=local, progress=progress)
    mapped = read_checkpoint(
        source.name, source.folder, source.index, options.dtype, trust_remote_code=options.trust_remote_code
    ).experts
    origin = Origin.of(source.name, source.revision, source.index, mapped)
    folder = origin.folder() if options.expert_store is None else Path(options.expert_store)
    names = [own_precision(mapped) if name == "auto" else name for name in names]
    device_type = "cuda" if device_kind(options.device).startswith("cuda") else "cpu"
    records = list(dict.fromkeys(records_of(mapped, names, None, device_type).values()))
    with progress_bar("converting experts", unit="bytes", show=progress) as bar:
        convert(
            folder,
            origin,
            mapped,
            records,
            memory_bytes=int(DEFAULT_SHARE * memory.available_bytes()),
            bar=bar,
        )
    return Converted(folder, {name: store_bytes(mapped, [name]) for name in records}, mapped.expert_bytes)
