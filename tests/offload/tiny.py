"""Tiny checkpoints, and what the tests of the runtime's core share around them."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from families import families
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from transformers.utils import logging

from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.mapping import map_experts
from offload.checkpoint.shards import ShardIndex
from offload.checkpoint.skeleton import build_skeleton
from offload.model import OffloadedModel
from offload.store.base import Precision

INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def one_thread() -> Iterator[None]:
    """A fixture's body: one thread computes, since the sums of several may differ; transformers says nothing."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


SLOT = 3 * 64 * 32 * 4
"""Bytes of one expert of a float32 qwen3_moe."""
FEW = 5 * SLOT + SLOT // 2
"""Room for five of them."""


def offload_threads() -> list[str]:
    """The threads of this project that run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("offload-")]


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **config: Any) -> Path:
    """Write a tiny model of family `name` to `folder`."""
    families()[name].save(folder, dtype, shard_size, **config)
    return folder


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in `folder` as transformers loads it, with grouped_mm experts."""
    return families()[AutoConfig.from_pretrained(folder).model_type].resident(folder, dtype)


def expert_map(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertMap:
    """Which bytes of the checkpoint in `folder` are which expert."""
    return map_experts(build_skeleton(AutoConfig.from_pretrained(folder), dtype), ShardIndex.from_folder(folder))


def open_model(folder: Path, **kwargs: Any) -> OffloadedModel:
    """The checkpoint in `folder`, offloaded to the CPU or as `kwargs` say; one thread computes."""
    defaults: dict[str, Any] = {"cpu_mem": "8G", "device": "cpu", "context": 256, "threads": 1, "exact": True}
    if kwargs.get("device") == "emulated":
        defaults |= {"gpu_mem": "1G", "link": "500MB/s"}
    return OffloadedModel.from_pretrained(folder, **(defaults | kwargs))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the single shard in `folder` after `edit` changed its tensors, by name."""
    shard = folder / "model.safetensors"
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, columns] without special ones."""
    return torch.randint(3, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same bit for bit: unlike `==`, of NaNs and zeros too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.contiguous().view(INTEGER[a.itemsize]), b.contiguous().view(INTEGER[b.itemsize])
    return torch.equal(a, b)


def aligned(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] on a boundary of 64 bytes, filled with 0xAA."""
    block = torch.full((nbytes + 64,), 0xAA, dtype=torch.uint8)
    start = -block.data_ptr() % 64
    return block[start : start + nbytes]


class FakeStore:
    """A store whose experts are easily told apart: every byte of expert (l, e) is `mark`. It is its own only slice, and
    its own reader.

    Experts are read in `parts_of_each`. A read takes as long as `delay_s(key)` says, and the first part of an expert
    in `broken` fails.
    """

    def __init__(self, parts: int = 1) -> None:
        self.parts_of_each = parts
        self.delay_s: Callable[[ExpertKey], float] = lambda key: 0.0
        self.broken: dict[ExpertKey, BaseException] = {}
        self.reads: list[ExpertKey] = []
        self.closed = 0
        self.slices = [self]
        self.precisions = [Precision("marked", (0,))]
        self.slot_bytes = [256]

    def layout(self, layer: int) -> int:
        """All layers look alike."""
        return 0

    def weights(self, layer: int, precision: int, slots: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The slot itself."""
        return {"slot": slots[0]}

    @staticmethod
    def mark(key: ExpertKey) -> int:
        """What fills the expert's slot."""
        return (key.layer * 16 + key.expert) % 251 + 1

    def open(self) -> FakeStore:
        """A reader for one thread."""
        return self

    def record_bytes(self, key: ExpertKey) -> int:
        """Bytes of an expert."""
        return self.slot_bytes[0]

    def parts(self, key: ExpertKey, readers: int) -> int:
        """In how many parts an expert is read."""
        return min(self.parts_of_each, readers)

    def read(self, key: ExpertKey, slot: torch.Tensor, part: int = 0, parts: int = 1) -> int:
        """Fill a part of `slot`: half of it, a pause, the other half."""
        self.reads.append(key)
        mine = slot.chunk(parts)[part]
        half = len(mine) // 2
        mine[:half] = self.mark(key)
        if key in self.broken and part == 0:
            raise self.broken[key]
        time.sleep(self.delay_s(key))
        mine[half:] = self.mark(key)
        return len(mine)

    def close(self) -> None:
        """Counted."""
        self.closed += 1


class PeakBytes(TorchDispatchMode):
    """While active, counts the bytes of storages that operations create; `peak` is the most alive at once."""

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A storage that was there before the operation is no new memory, whoever made it.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                weakref.finalize(storage, self._seen.discard, storage._cdata)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._seen:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        nbytes, identity = storage.nbytes(), storage._cdata
        self._seen.add(identity)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, identity, nbytes)

    def _forget(self, identity: int, nbytes: int) -> None:
        self._seen.discard(identity)
        self.now -= nbytes


def takes_direct_reads(folder: Path) -> bool:
    """Whether the file system of `folder` has O_DIRECT."""
    file = folder / "direct"
    file.write_bytes(bytes(4096))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        return False
    return True
