"""The mixture's text: read out of packages, split, and cut into windows."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from tiny_mixture import tokenizer

from scripts.mixture import sources, text
from scripts.mixture.readers import plain_text
from scripts.mixture.sources import SOURCES, Source
from scripts.mixture.tokens import Batches, windows

LINES = "".join(f"line {number} of a long text\n" for number in range(60_000))


def test_what_is_held_out_is_not_trained_on() -> None:
    train, held = text.split(LINES)
    assert sorted(train + held, key=LINES.index) == text.blocks(LINES)
    assert "".join(text.blocks(LINES)) == LINES
    lines = [set("".join(part).splitlines()) for part in (train, held)]
    assert not lines[0] & lines[1]
    assert len(lines[0] | lines[1]) == 60_000
    assert sum(map(len, held)) / len(LINES) == pytest.approx(1 / text.HELD_OUT_EVERY, rel=0.2)


def test_a_package_of_pypi_is_read_whole_or_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "lines-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("lines/a.txt", LINES)
        archive.writestr("lines/code.py", "no text")
    whole = Source("lines", "prose", "lines==1.0", ("*.txt",), "CC0")
    package = sources.fetch(whole, tmp_path)
    assert sources.version(whole, package) == "1.0"
    assert text.source_text(whole, package).count("\nline") == 59_999
    part = Source("part", "prose", "lines==1.0", ("*.txt",), "CC0", megabytes=0.4)
    found = text.source_text(part, package)
    assert 300_000 < len(found) <= 420_000
    assert found.splitlines()[-1].startswith("line 5")  # from all over it
    monkeypatch.setattr(text, "SOURCES", (whole, part))
    (tmp_path / "packages").mkdir()
    package.rename(tmp_path / "packages" / package.name)
    made = text.prepare(tmp_path)
    assert [each.name for each in made] == ["lines", "part"]
    assert made[0].version == "1.0"
    assert "\n".join(text.read(tmp_path, "lines", "held"))[:5] == "line "
    assert made == text.prepare(tmp_path)


def test_a_package_of_debian_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dpkg-deb --fsys-tarfile` writes a tar archive; here another program does."""
    program = "import sys, tarfile; tarfile.open(fileobj=sys.stdout.buffer, mode='w|').add(sys.argv[1], './usr')"
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "usr" / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "usr" / "c.png").write_bytes(b"picture")
    popen = subprocess.Popen
    unpack = [sys.executable, "-c", program, str(tmp_path / "usr")]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(unpack, **options))
    source = Source("texts", "prose", "texts", ("*.txt.gz",), "CC0")
    found = [plain_text(name, content) for name, content in sources.members(source, tmp_path / "texts_1.deb")]
    assert found == ["first", "second"]


def test_what_cannot_be_fetched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: gone)
    with pytest.raises(SystemExit, match="dict-gcide cannot be had: E: Unable"):
        sources.fetch(next(each for each in SOURCES if each.name == "gcide"), tmp_path)


def test_formats_are_read_as_their_names_say() -> None:
    page = b"<html><head><title>T</title></head><body><p>One &amp; two</p><script>x</script>\n\n\n<p>three</p></body>"
    assert plain_text("a/page.html", page) == "One & two\n\nthree"
    assert plain_text("a/page.txt", page).startswith("<html>")
    assert plain_text("a/old.txt", "é".encode("latin-1")) == "é"
    verses = b"<verse n='1'/>In the <w x='1'>beginning</w> <verse n='2'/>And"
    assert (
        plain_text("ot.bzz", zlib.compress(verses) + bytes(70) + zlib.compress(b"end")) == "In the beginning \nAnd\nend"
    )


def test_strings_of_r_are_read() -> None:
    strings = ["It is a truth", "", "universally acknowledged"]
    data = b"X\n" + struct.pack(">iii", 3, 0x40200, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(strings))
    data += b"".join(struct.pack(">ii", 0x40009, len(each)) + each.encode() for each in strings)
    stored = struct.pack(">i", len(data)) + zlib.compress(data)
    assert plain_text("x/Rdata.rdb", stored * 2) == "\n\n".join(["\n".join(strings)] * 2)


def test_every_pass_has_every_window_once_in_another_order() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, 10, 4, seed=3)
    passes = []
    for number in range(2):
        rows = [batches.step(number * batches.steps_a_pass + step) for step in range(batches.steps_a_pass)]
        starts = [int(row[0]) for batch in rows for row in batch]
        assert len(set(starts)) == len(starts) == 96
        assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + 11)) for batch in rows for row in batch)
        passes.append(starts)
    assert passes[0] != passes[1]
    assert Batches(tokens, 10, 4, seed=3).step(30).tolist() == batches.step(30).tolist()
    assert windows(tokens, 10)[:, 0].tolist() == list(range(0, 990, 10))
    with pytest.raises(SystemExit, match="less than one step"):
        Batches(tokens[:30], 10, 4, seed=3)


def test_the_tokenizer_gives_back_what_it_took(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer(tmp_path)))
    said = "one big word, ünseen\n\tand  code()"
    assert known.decode(known.encode(said).ids) == said
