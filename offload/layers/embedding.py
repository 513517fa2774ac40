"""Token embeddings that stay on disk: a row is read when its token comes.

A vocabulary's rows are hundreds of megabytes, of which a pass needs as many as it has tokens. Read through the page
cache, they take no memory of any budget.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from cache.errors import TransferError
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.parameter import TORCH_DTYPES
from offload.checkpoint.shards import TensorInfo
from offload.layers.source import class_code
from offload.system.seen import SeenFile

_TEXT = re.compile(r'"[^"\n]*"')  # such as names of tied weights


class DiskEmbedding(nn.Module):
    """In place of `embedding`: the same rows, read from the checkpoint. `open` comes before the first real token.

    `weight` has the shape and dtype, which some models ask for, and no numbers.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.weight = torch.empty(embedding.weight.shape, dtype=embedding.weight.dtype, device="meta")
        self._stored = self.weight.dtype
        self._row_bytes = 0
        self._file: io.FileIO | None = None
        self._info: TensorInfo | None = None
        self._seen: SeenFile | None = None

    def open(self, info: TensorInfo, seen: SeenFile | None = None) -> None:
        """Read from there; the file must still be what was `seen`. Raises TransferError."""
        try:
            self._file, self._info, self._seen = io.FileIO(info.file), info, seen
        except OSError as error:
            raise _failed(info, error) from error
        self._check()
        if hasattr(os, "posix_fadvise"):  # or the system reads on behind every row
            os.posix_fadvise(self._file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_RANDOM)
        self._stored = TORCH_DTYPES[info.dtype]
        self._row_bytes = self.embedding_dim * self._stored.itemsize
        # transformers takes the first parameter's dtype for the model's, and this was it.
        nothing = torch.empty(0, dtype=self.weight.dtype, device="cpu")
        self.register_parameter("nothing", nn.Parameter(nothing, requires_grad=False))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., embedding_dim].

        Raises IndexError for an id outside the vocabulary, TransferError when a row cannot be read, or was changed, and
        what torch does for anything but ids.
        """
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            return functional.embedding(ids, torch.empty(1, 1))
        shape = (*ids.shape, self.embedding_dim)
        if ids.is_meta:
            return self.weight.new_empty(shape)
        different, places = (ids.reshape(-1), None) if ids.numel() == 1 else ids.unique(return_inverse=True)
        rows = torch.empty(len(different), self._row_bytes, dtype=torch.uint8, device="cpu")
        for token, row in zip(different.tolist(), rows.numpy(), strict=True):
            self._read(token, row.data)
        self._check()
        values = rows.view(self._stored).to(self.weight.dtype)
        return (values if places is None else values[places]).view(shape)

    def _read(self, token: int, row: memoryview) -> None:
        if not 0 <= token < self.num_embeddings:
            raise IndexError(f"token {token} is outside the vocabulary of {self.num_embeddings}")
        if self._file is None or self._info is None:
            raise RuntimeError("the embeddings' file is not open")
        start, done = self._info.offset + token * self._row_bytes, 0
        while done < self._row_bytes:
            try:
                count = os.preadv(self._file.fileno(), [row[done:]], start + done)
            except OSError as error:
                raise _failed(self._info, error) from error
            if not count:
                raise TransferError(
                    f"{self._info.file} ends within the embedding of token {token}: it was changed while the model was "
                    "running; copy or download it again"
                )
            done += count

    def _check(self) -> None:
        """Whether what was read is what the plan saw."""
        if self._file is None or self._info is None or self._seen is None:
            return
        try:
            self._seen.check(self._file.fileno())
        except OSError as error:
            raise _failed(self._info, error) from error

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, on disk"


@dataclass(frozen=True)
class EmbeddingOnDisk:
    """Which embedding of a model stays on disk: its path, and the tensor's `name` there."""

    path: str
    name: str

    @classmethod
    def of(cls, model: PreTrainedModel, experts: ExpertMap, dtype: torch.dtype) -> EmbeddingOnDisk | None:
        """The token embeddings of `model` (a skeleton), where the numbers on disk are what the model computes with.

        None where the weight is shared, as by a tied output head, or where something but looking rows up is done with
        it, and on systems without positioned reads.
        """
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError:  # they have a name that transformers does not know
            return None
        path = next((path for path, module in model.named_modules() if module is embedding), "")
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        name = experts.dense_names.get(f"{path}.weight")
        packed = {part.name for each in experts.packed.values() for part in each.parts}
        if (
            type(embedding) is not nn.Embedding
            or embedding.max_norm is not None
            or embedding.weight.dtype != dtype
            or owners[id(embedding.weight)] > 1
            or name is None
            or name in packed
            or not _is_only_looked_up(model, path)
            or not hasattr(os, "preadv")
        ):
            return None
        info = experts.dense.get(name)
        stored = None if info is None else TORCH_DTYPES.get(info.dtype)
        if info is None or stored is None or not stored.is_floating_point or info.shape != embedding.weight.shape:
            return None
        return cls(path, name)

    def replace(self, model: nn.Module) -> None:
        """Put an embedding without a file in the place of the plain one."""
        parent, _, name = self.path.rpartition(".")
        embedding = model.get_submodule(self.path)
        assert isinstance(embedding, nn.Embedding)
        setattr(model.get_submodule(parent), name, DiskEmbedding(embedding))

    def find(self, model: nn.Module) -> DiskEmbedding:
        """The embedding that `replace` put there."""
        found = model.get_submodule(self.path)
        assert isinstance(found, DiskEmbedding)
        return found


def _failed(info: TensorInfo, error: OSError) -> TransferError:
    return TransferError(f"reading {info.file} failed: {error.strerror or error}: is the disk still there?")


def _is_only_looked_up(model: nn.Module, path: str) -> bool:
    """Whether no module that the embedding is in reads anything of its weight but the dtype."""
    *owners, name = path.split(".")
    used = re.compile(rf"(\.{re.escape(name)}|get_input_embeddings\(\))\.weight\b(?!\.dtype\b)")
    for depth in range(len(owners) + 1):
        cls: Any = type(model.get_submodule(".".join(owners[:depth])))
        code = class_code(cls)
        if code is None or used.search(_TEXT.sub("", code)):
            return False
    return True
