"""Byte ranges of files reach their places exactly, however reads are cut, and a bad disk is an error, not a weight."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.errors import TransferError
from cache.types import ExpertKey
from offload.checkpoint.parameter import Piece
from offload.store.files import BLOCK, GAP_BYTES, PART_BYTES, FileReader, cut
from offload.store.plain import CheckpointSlice

SIZE = 3 * 10**5 + 1  # bytes; the last block of the file is a short one

needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this platform has no preadv")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "shard"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, file: Path) -> bool:
    if request.param and not tiny.takes_direct_reads(file.parent):
        pytest.skip("this file system has no direct reads")
    return bool(request.param)


def check(reader: FileReader, pieces: list[Piece], length: int) -> int:
    """Reads `pieces`; every byte is the file's and the others are untouched. Returns the bytes read."""
    got = np.full(length, 0xAA, np.uint8)
    expected = got.copy()
    count = reader.read(pieces, got)
    for piece in pieces:
        content = Path(piece.file).read_bytes()[piece.offset : piece.offset + piece.nbytes]
        expected[piece.at : piece.at + piece.nbytes] = np.frombuffer(content, np.uint8)
    assert (got == expected).all()
    return count


LAYOUTS: dict[str, list[tuple[int, int, int]]] = {
    "from an unaligned offset": [(1001, 777, 13)],
    "whole blocks": [(BLOCK, 2 * BLOCK, 0)],
    "across a block's end": [(BLOCK - 1, 2, 5)],
    "larger than the bounce buffer": [(123, 100_000, 3)],
    "the whole file": [(0, SIZE, 0)],
    "the last byte": [(SIZE - 1, 1, 0)],
    "the short last block": [(SIZE - 500, 500, 9)],
    "neighbours in another order": [(5000, 100, 200), (5100, 50, 0), (5150, 70, 300)],
    "a small gap": [(100, 50, 0), (9000, 50, 50)],
    "a large gap": [(100, 50, 50), (101 + 50 + GAP_BYTES, 50, 0)],
    "nothing": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounce", [BLOCK, 3 * BLOCK, 2**24])
def test_pieces_reach_their_places(file: Path, direct: bool, layout: str, bounce: int) -> None:
    reader = FileReader(direct, bounce)
    pieces = [Piece(str(file), *piece) for piece in LAYOUTS[layout]]
    assert check(reader, pieces, SIZE) >= sum(piece.nbytes for piece in pieces)
    reader.close()


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(offset, bytes, place) of pieces that overlap neither in the file nor where they go, in any order."""
    near = st.integers(0, 6 * BLOCK)
    cuts = sorted(draw(st.lists(st.one_of(near, st.integers(0, SIZE)), min_size=2, max_size=14, unique=True)))
    spans = [(a, b - a) for a, b in pairwise(cuts) if draw(st.booleans())]
    spans = draw(st.permutations(spans))
    at, pieces = 0, []
    for offset, nbytes in spans:
        at += draw(st.integers(0, 70))
        pieces.append((offset, nbytes, at))
        at += nbytes
    return draw(st.permutations(pieces))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(), blocks=st.integers(1, 20))
def test_any_layout_equals_plain_reads(file: Path, direct: bool, layout: list[Any], blocks: int) -> None:
    reader = FileReader(direct, blocks * BLOCK)
    check(reader, [Piece(str(file), *piece) for piece in layout], SIZE + 2000)
    reader.close()


def test_pieces_of_several_files_with_one_reader(file: Path, tmp_path: Path, direct: bool) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(range(256)) * 100)
    reader = FileReader(direct)
    for _ in range(2):  # the second time with open files
        check(
            reader, [Piece(str(other), 7, 9000, 0), Piece(str(file), 3, 10, 9000), Piece(str(other), 3, 4, 9010)], 9100
        )
    reader.close()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this platform has no direct reads")
def test_without_direct_reads_plain_ones_serve(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, refused = os.open, []

    def refuse(path: str, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    reader = FileReader(direct=True)
    assert check(reader, [Piece(str(file), 4097, 9999, 0)], 10_000) == 9999
    assert refused == [str(file)]
    reader.close()


@needs_preadv
def test_what_lies_together_is_read_in_one_go(file: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        pytest.skip("plain reads go straight into place, one for each piece")
    sizes, read = [], os.preadv

    def counting(descriptor: int, buffers: list[Any], position: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return read(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", counting)
    reader = FileReader(direct)
    check(reader, [Piece(str(file), 1000, 60_000, 0), Piece(str(file), 61_000, 60_000, 60_000)], 120_000)
    assert len(sizes) == 1
    check(reader, [Piece(str(file), 0, 1, 0), Piece(str(file), SIZE - 1, 1, 1)], 2)
    assert sizes[1:] == [BLOCK, BLOCK]  # and what lies far apart is not read through
    reader.close()


def test_missing_file(tmp_path: Path, direct: bool) -> None:
    with pytest.raises(TransferError, match="gone") as failure:
        FileReader(direct).read([Piece(str(tmp_path / "gone"), 0, 1, 0)], np.zeros(1, np.uint8))
    assert isinstance(failure.value.__cause__, FileNotFoundError)


def shorten_reads(monkeypatch: pytest.MonkeyPatch, allowed: Callable[[int], int]) -> None:
    """Every preadv of n bytes delivers at most `allowed(n)`; what lies behind those is no data."""
    read = os.preadv

    def preadv(descriptor: int, buffers: list[Any], position: int) -> int:
        (buffer,) = buffers
        count = min(read(descriptor, [buffer], position), allowed(len(buffer)))
        buffer[count:] = bytes([0x55]) * (len(buffer) - count)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr("offload.store.files.pread_into", lambda d, view, offset: preadv(d, [view], offset))


@needs_preadv
@pytest.mark.parametrize("blocks", [1, 2, 2.7])
def test_short_reads_are_continued(file: Path, direct: bool, blocks: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_reads(monkeypatch, lambda wanted: int(blocks * BLOCK))
    reader = FileReader(direct)
    check(reader, [Piece(str(file), 100, 50_000, 0), Piece(str(file), SIZE - 10_001, 10_001, 50_000)], 60_001)
    reader.close()


@needs_preadv
def test_a_disk_that_delivers_nothing(file: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_reads(monkeypatch, lambda wanted: 0)
    with pytest.raises(TransferError, match="ends at byte"):
        FileReader(direct).read([Piece(str(file), 100, 5000, 0)], np.zeros(5000, np.uint8))


@needs_preadv
def test_a_disk_that_fails(file: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, buffers: list[Any], position: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    reader, pieces = FileReader(direct), [Piece(str(file), 100, 5000, 0)]
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail)
        with pytest.raises(TransferError, match=rf"reading {file} failed: Input/output error") as failure:
            reader.read(pieces, np.zeros(5000, np.uint8))
    assert isinstance(failure.value.__cause__, OSError)
    check(reader, pieces, 5000)  # the reader itself is as good as before
    reader.close()


@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="this platform does not count open files")
def test_close_closes_every_file(file: Path, tmp_path: Path, direct: bool) -> None:
    before = psutil.Process().num_fds()
    other = tmp_path / "other"
    other.write_bytes(bytes(10))
    reader = FileReader(direct)
    for _ in range(3):
        check(reader, [Piece(str(file), 1, 2, 0), Piece(str(other), 1, 2, 2)], 4)
    assert psutil.Process().num_fds() == before + 2
    reader.close()
    assert psutil.Process().num_fds() == before
    check(reader, [Piece(str(file), 1, 2, 0)], 4)  # and a closed reader opens again what it needs
    reader.close()


@needs_preadv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as on disk", "converted"])
def test_a_reader_stays_within_the_memory_that_plans_count(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = tiny.expert_map(tiny.save(tmp_path, "granitemoehybrid"), dtype)
    store = CheckpointSlice(experts)
    largest, read = [0], os.preadv

    def measure(descriptor: int, buffers: list[Any], position: int) -> int:
        largest.append(sum(len(buffer) for buffer in buffers))
        return read(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", measure)
    slot = tiny.aligned(experts.slot_bytes)
    with tiny.PeakBytes([slot]) as memory:
        reader = store.open()
        for layer in experts.layers:
            for expert in range(layer.num_experts):
                assert reader.read(ExpertKey(layer.index, expert), slot) >= layer.record_bytes
        reader.close()
    assert max(largest) + memory.peak <= store.reader_bytes


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(), parts=st.integers(1, 5))
def test_parts_are_the_whole(file: Path, layout: list[Any], parts: int) -> None:
    """Together they bring the same bytes to the same places; none is much larger; cuts lie between blocks."""
    pieces = [Piece(str(file), *piece) for piece in layout]
    pieces_of = cut(pieces, parts)
    assert len(pieces_of) == parts
    whole = {(p.at + i): p.offset + i for p in pieces for i in (0, p.nbytes - 1)}
    got = [piece for part in pieces_of for piece in part]
    assert sum(piece.nbytes for piece in got) == sum(piece.nbytes for piece in pieces)
    assert all(piece.nbytes > 0 for piece in got)
    where = {p.at: p.offset for p in got} | {p.at + p.nbytes - 1: p.offset + p.nbytes - 1 for p in got}
    assert whole.items() <= where.items()
    share = sum(piece.nbytes for piece in pieces) / parts
    for part in pieces_of:
        assert sum(piece.nbytes for piece in part) <= share + BLOCK
    starts = {piece.offset for piece in pieces}
    assert all(piece.offset % BLOCK == 0 for piece in got if piece.offset not in starts)


def test_an_expert_read_in_parts_is_the_same(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", hidden_size=512, moe_intermediate_size=640, num_hidden_layers=1)
    experts = tiny.expert_map(tmp_path)
    store = CheckpointSlice(experts)
    key, layer = ExpertKey(0, 5), experts.layers[0]
    assert layer.record_bytes > 3 * PART_BYTES and store.parts(key, 2) == 2 and store.parts(key, 99) == 3
    whole, joined = tiny.aligned(experts.slot_bytes), tiny.aligned(experts.slot_bytes)
    readers = [store.open() for _ in range(3)]
    readers[0].read(key, whole)
    for part in (2, 0, 1):
        readers[part].read(key, joined, part, 3)
    assert torch.equal(whole, joined)
    for reader in readers:
        reader.close()
    # Small experts, and those that must be converted, are read by one.
    assert CheckpointSlice(tiny.expert_map(tmp_path, torch.bfloat16)).parts(key, 2) == 1
    tiny.save(tmp_path / "small", "qwen3_moe")
    assert CheckpointSlice(tiny.expert_map(tmp_path / "small")).parts(key, 2) == 1
