"""Converting a model by name: from a folder or the hub to a folder of records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offload.checkpoint import hub
from offload.checkpoint.mapping import read_checkpoint
from offload.costs.precision import parse_precisions
from offload.device.choose import device_kind
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


def convert_model(
    model: str | Path,
    experts: str,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    progress: bool = False,
) -> Converted:
    """Store the experts of `model` at the precisions that `experts` names, in `output` or offload's cache folder.

    Arguments as in `OffloadedModel.from_pretrained`; "auto" is the model's own precision. For a CPU, `device` "cpu" or
    "emulated", records lie as it computes with them, where that differs. What is there already is left
    as it is. Raises OffloadError as `from_pretrained` does, and as `convert` does. Side effects: downloads, files.
    """
    names = parse_precisions(experts)
    source = hub.fetch(model, revision=revision, local_files_only=local_files_only, progress=progress)
    mapped = read_checkpoint(
        source.name, source.folder, source.index, dtype, trust_remote_code=trust_remote_code
    ).experts
    origin = Origin.of(source.name, source.revision, source.index, mapped)
    folder = origin.folder() if output is None else Path(output)
    names = [own_precision(mapped) if name == "auto" else name for name in names]
    device_type = "cuda" if device_kind(device).startswith("cuda") else "cpu"
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
