"""What one forward pass has to read and compute, as a model's configuration and headers say it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SMALL_EXPERT_BYTES = 2**20
"""A second thread gains nothing on products this small, and waiting for it costs much: see docs/LOG.md."""


@dataclass(frozen=True)
class Work:
    """A model's passes, in what costs time: bytes of weights that are read, and experts that a token goes to.

    `precision` is what experts are computed at, None where a fallback chooses among several; `dense_precision` what
    the other weights are. `record_bytes` is an expert on disk, which a reader `packs`
    where it does not lie there as it is computed with. `dense_layer_bytes` are the weights beside the experts
    of one MoE layer, `dense_pass_bytes` those of the output head.
    """

    experts_per_layer: int
    top_k: int
    precision: str | None
    dense_precision: str
    record_bytes: int
    dense_layer_bytes: int
    dense_pass_bytes: int
    packs: bool = False


def computing_threads(device: str, slot_bytes: int) -> int | None:
    """How many CPU threads compute if nobody says: one on the emulated accelerator, which is one core, and where
    experts are small; else None, torch's choice."""
    return 1 if device == "emulated" or slot_bytes < SMALL_EXPERT_BYTES else None


def dense_bytes_read(model: Any, experts: Iterable[str]) -> tuple[int, int]:
    """(bytes of weights beside the experts that an average MoE layer reads, bytes of the output head) of `model`.

    `experts` are the paths of its experts modules. What lies outside the layers, such as a vision tower, is not read
    for a text.
    """
    paths = list(experts)
    stacks = {_stack(path) for path in paths}
    inside = tuple(f"{path}." for path in paths)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    layers = sum(
        tensor.numel() * tensor.itemsize
        for name, tensor in tensors
        if name.startswith(tuple(stacks)) and not name.startswith(inside)
    )
    head = model.get_output_embeddings()
    head_tensors = [] if head is None else [*head.parameters(), *head.buffers()]
    return layers // len(paths), sum(tensor.numel() * tensor.itemsize for tensor in head_tensors)


@contextmanager
def seen_top_k(model: Any, experts: Iterable[str]) -> Iterator[list[int]]:
    """The list it gives has, after a forward pass in the block, how many experts of a layer a token goes to.

    Where no pass gets so far, the configuration is asked; the list stays empty if it does not say.
    """
    seen: list[int] = []

    def note(module: Any, args: tuple[Any, ...]) -> None:
        seen[:] = [int(args[1].shape[-1])]

    handle = model.get_submodule(next(iter(experts))).register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
    said = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if not seen and isinstance(said, int):
        seen.append(said)


def _stack(path: str) -> str:
    """The list of layers that the module `path` is in: "model.layers." of "model.layers.3.mlp.experts"."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return "".join(f"{part}." for part in parts[:number])
