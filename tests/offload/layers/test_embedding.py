"""Embeddings that stay on disk: the same rows, no memory, and errors that say what happened."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from cache.errors import TransferError
from offload.checkpoint.shards import TensorInfo
from offload.layers.embedding import DiskEmbedding, EmbeddingOnDisk
from offload.system.seen import SeenFile

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no positioned reads")

ROWS, WIDTH = 50, 24
_opened: list[DiskEmbedding] = []


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def on_disk(tmp_path: Path, dtype: torch.dtype) -> tuple[nn.Embedding, DiskEmbedding, Path]:
    """An embedding, and the same in a file behind 13 other bytes."""
    plain = nn.Embedding(ROWS, WIDTH, dtype=dtype)
    file = tmp_path / "weights"
    data = plain.weight.detach().view(torch.uint8).numpy().tobytes()
    file.write_bytes(b"x" * 13 + data)
    lazy = DiskEmbedding(plain)
    _opened.append(lazy)
    code = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    lazy.open(TensorInfo(str(file), "weight", code, (ROWS, WIDTH), 13, len(data)))
    return plain, lazy, file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [[[3]], [[0, 49, 3, 3, 0]], [[1, 2], [2, 1]], 7])
def test_rows_are_the_same(tmp_path: Path, ids: Any, dtype: torch.dtype) -> None:
    plain, lazy, _ = on_disk(tmp_path, dtype)
    assert tiny.same_bits(plain(torch.tensor(ids)).detach(), lazy(torch.tensor(ids)))
    lazy.close()


def test_no_ids_give_no_rows(tmp_path: Path) -> None:
    _, lazy, _ = on_disk(tmp_path, torch.float32)
    assert lazy(torch.empty(1, 0, dtype=torch.long)).shape == (1, 0, WIDTH)


@pytest.mark.parametrize("token", [-1, ROWS])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    _, lazy, _ = on_disk(tmp_path, torch.float32)
    with pytest.raises(IndexError, match="outside the vocabulary of 50"):
        lazy(torch.tensor([[token]]))


def test_a_file_that_ends_early_and_a_failing_disk_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lazy, file = on_disk(tmp_path, torch.float32)
    with file.open("r+b") as stream:
        stream.truncate(13 + 40 * WIDTH * 4)
    lazy(torch.tensor([[39]]))
    with pytest.raises(TransferError, match="ends within the embedding of token 40"):
        lazy(torch.tensor([[3, 40]]))

    def fail(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TransferError, match="Input/output error: is the disk still there"):
        lazy(torch.tensor([[3]]))


@pytest.mark.parametrize("way", ["overwritten", "replaced"])
def test_a_file_that_changes_gives_no_rows(tmp_path: Path, way: str) -> None:
    """Overwritten while it is open, or replaced before it is opened."""
    plain, lazy, file = on_disk(tmp_path, torch.float32)
    info, other = lazy._info, bytes(file.stat().st_size)
    assert info is not None
    seen = SeenFile(file)
    lazy.close()
    if way == "replaced":
        (tmp_path / "new").write_bytes(other)
        (tmp_path / "new").replace(file)
        with pytest.raises(TransferError, match="was changed while the model was running"):
            lazy.open(info, seen)
        return
    lazy.open(info, seen)
    assert tiny.same_bits(plain(torch.tensor([4])).detach(), lazy(torch.tensor([4])))
    os.utime(file, ns=(1, 1))
    with pytest.raises(TransferError, match=f"{file} was changed while the model was running"):
        lazy(torch.tensor([4]))


def cached_pages(file: Path) -> int:
    """How many of the file's pages the system keeps in memory."""
    pages = np.memmap(file, np.uint8, "r")
    states = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
    address = ctypes.c_void_p(pages.ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(pages)), states) == 0
    return sum(state & 1 for state in states)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_the_system_reads_no_further_than_the_row(tmp_path: Path) -> None:
    """A row is a page here. Neighbours, as a prompt may have them, look like the beginning of a whole file's read."""
    plain = nn.Embedding(1000, mmap.PAGESIZE // 4)
    file = tmp_path / "weights"
    data = plain.weight.detach().view(torch.uint8).numpy().tobytes()
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(file):
        pytest.skip("this file system's files are always in memory")
    lazy = DiskEmbedding(plain)
    lazy.open(TensorInfo(str(file), "weight", "F32", tuple(plain.weight.shape), 0, len(data)))
    _opened.append(lazy)
    ids = torch.tensor([0, 1, 2, 500, 501, 502])
    assert tiny.same_bits(plain(ids).detach(), lazy(ids))
    assert len(ids) <= cached_pages(file) <= 2 * len(ids)


def choose(folder: Path, name: str, **config: Any) -> EmbeddingOnDisk | None:
    tiny.save(folder, name, **config)
    experts = tiny.expert_map(folder)
    return EmbeddingOnDisk.of(experts.layers[0].model, experts, torch.float32)


def test_a_plain_embedding_stays_on_disk(tmp_path: Path) -> None:
    assert choose(tmp_path, "qwen3_moe") == EmbeddingOnDisk("model.embed_tokens", "model.embed_tokens.weight")


def test_rows_of_another_dtype_are_converted(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    ids = tiny.ids(2, 9)
    expected = tiny.resident(tmp_path, torch.bfloat16)(ids).logits
    with tiny.open_model(tmp_path, dtype="bfloat16") as model:
        assert isinstance(model.module.get_input_embeddings(), DiskEmbedding)
        assert tiny.same_bits(model(ids).logits, expected)


def test_a_read_that_gives_less_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lazy, _ = on_disk(tmp_path, torch.float32)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, rows, at: whole(file, [rows[0][:7]], at))
    assert tiny.same_bits(plain(torch.tensor([4, 9])).detach(), lazy(torch.tensor([4, 9])))


def test_the_model_keeps_its_dtype(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16)
    with tiny.open_model(tmp_path) as model:
        assert model.dtype == model.module.dtype == torch.bfloat16
        assert next(model.module.parameters()).numel() == 0


def test_one_whose_weight_an_outer_class_reads_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.layers import embedding as disk_embedding

    monkeypatch.setattr(disk_embedding, "class_code", lambda cls: "x = self.model.embed_tokens.weight[0]")
    assert choose(tmp_path, "qwen3_moe") is None


def test_one_that_the_output_head_shares_does_not(tmp_path: Path) -> None:
    assert choose(tmp_path, "qwen3_moe", tie_word_embeddings=True) is None


def test_a_model_computes_the_same_with_less_memory_and_closes_the_file(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    resident = tiny.resident(tmp_path)
    ids = tiny.ids(2, 9)
    with tiny.open_model(tmp_path) as model, torch.no_grad():
        lazy = model.module.get_input_embeddings()
        assert isinstance(lazy, DiskEmbedding)
        assert tiny.same_bits(model(ids).logits, resident(ids).logits)
        held = sum(tensor.nbytes for tensor in (*model.module.parameters(), *model.module.buffers()))
        ((_, _, nbytes, note),) = (row for row in model.plan.rows() if row[0] == "dense weights")
        assert nbytes == held and "token embeddings" in note
    with pytest.raises(RuntimeError, match="not open"):
        lazy(ids)


def test_an_accelerator_has_them_in_its_memory(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    with tiny.open_model(tmp_path, device="emulated") as model:
        assert isinstance(model.module.get_input_embeddings(), nn.Embedding)
