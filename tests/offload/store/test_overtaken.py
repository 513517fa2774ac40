"""Files that change between reads or during one: what is torn or cut is not passed on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import TransferError
from offload.checkpoint.parameter import Piece
from offload.store.files import BLOCK, FileReader
from offload.store.index import Origin
from offload.system.seen import SeenFile

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no positioned reads")

LAYOUTS = {"in place": [(0, 3 * BLOCK)], "apart": [(100, 5000)], "several reads": [(0, 100), (200_000, 100)]}


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_during_a_read(tmp_path: Path, direct: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(300_000))
    os.utime(file, ns=(10**18, 10**18))
    seen = SeenFile(file)
    seen.sample()
    reader, read = FileReader(direct, seen={str(file): seen}), os.preadv
    pieces = [Piece(str(file), *place, 0) for place in LAYOUTS[layout]]
    reader.read(pieces, np.zeros(5 * BLOCK, np.uint8))

    def overtaken(descriptor: int, buffers: list[Any], position: int) -> int:
        count = read(descriptor, buffers, position)
        with file.open("r+b") as stream:
            stream.write(bytes(10))
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", overtaken)
        with pytest.raises(TransferError, match=f"{file} was changed while the model was running"):
            reader.read(pieces, np.zeros(5 * BLOCK, np.uint8))
    with pytest.raises(TransferError, match="was changed"):  # and not later either
        reader.read(pieces, np.zeros(5 * BLOCK, np.uint8))
    reader.close()


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_file_that_is_cut_between_reads(tmp_path: Path, direct: bool) -> None:
    file = tmp_path / "shrinking"
    file.write_bytes(bytes(100_000))
    reader = FileReader(direct, 4 * BLOCK)
    pieces = [Piece(str(file), 50_000, 30_000, 0)]
    reader.read(pieces, np.zeros(30_000, np.uint8))
    os.truncate(file, 60_000)
    with pytest.raises(TransferError, match=rf"{file} ends at byte \d+, 80000 are needed"):
        reader.read(pieces, np.zeros(30_000, np.uint8))
    os.truncate(file, 0)
    with pytest.raises(TransferError, match="ends at byte"):
        reader.read(pieces, np.zeros(30_000, np.uint8))
    reader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_checkpoint_in_a_folder_whose_name_is_not_utf8_has_a_store_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / os.fsdecode(name) for name in (b"m\xff", b"m\xfe")]
    for folder in folders:
        folder.mkdir()
    stores = {Origin(str(folder), None, "0" * 32, {}, {}).folder() for folder in folders}
    assert len(stores) == 2 and all(str(store).isprintable() for store in stores)
