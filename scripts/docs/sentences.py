"""Check that the documentation is written in short sentences: README.md and docs/*.md, but neither the generated
docs/cli.md nor docs/LOG.md. Code, tables and headings do not count.

python scripts/docs/sentences.py    exits with 1 and prints each sentence that is too long
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MAX_WORDS = 25
_EXEMPT = ("cli.md", "LOG.md")

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = re.compile(r"\s*(```|~~~)")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
_NO_PROSE = re.compile(r"\s*(?:\||#{1,6}\s)")  # tables and headings
_CODE = re.compile(r"(`+).+?\1")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|cf|vs|al)\.", re.IGNORECASE)
_END = re.compile(r"(?<=\S)[.!?][\"')*_]*(?=\s|$)")
_WORD = re.compile(r"\S*\w\S*")


class Sentence(NamedTuple):
    """One sentence, and the line on which its paragraph begins, counted from 1."""

    line: int
    text: str

    @property
    def words(self) -> int:
        """How many words it has: what stands between spaces and has a letter or a digit."""
        return len(_WORD.findall(self.text))


def paragraphs(markdown: str) -> Iterator[Sentence]:
    """The paragraphs and list items of `markdown` as plain text."""
    # Comments keep their line breaks, so that lines are counted right.
    lines = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), markdown).splitlines()
    words: list[str] = []  # of the paragraph that is being read, which began on line `first`
    first, fence, in_list = 0, "", False
    for number, line in enumerate([*lines, ""], 1):
        mark = _FENCE.match(line)
        code = bool(fence or mark) or (not words and not in_list and line.startswith("    "))
        if mark:
            fence = "" if fence == mark[1] else fence or mark[1]
        item = None if code else _ITEM.match(line)
        breaks = code or item or not line.strip() or _NO_PROSE.match(line)
        if breaks and words:
            yield Sentence(first, _plain(" ".join(words)))
            words = []
        if _NO_PROSE.match(line):
            in_list = False
        if item:
            in_list = True
            line = line[item.end() :]
        elif breaks:
            continue
        elif not words and not line.startswith(" "):
            in_list = False
        first = first if words else number
        words.append(line.strip().removeprefix(">").strip())


def sentences(markdown: str) -> Iterator[Sentence]:
    """The sentences of `markdown`. A paragraph without a full stop is one sentence."""
    for line, text in paragraphs(markdown):
        guarded = _ABBREVIATION.sub(r"\1", text)
        start = 0
        for end in [*(match.end() for match in _END.finditer(guarded)), len(guarded)]:
            if guarded[start:end].strip():
                yield Sentence(line, guarded[start:end].strip())
            start = end


def too_long(document: Path) -> list[Sentence]:
    """The sentences of `document` that have more than `MAX_WORDS` words."""
    return [found for found in sentences(document.read_text(encoding="utf-8")) if found.words > MAX_WORDS]


def documents(root: Path) -> list[Path]:
    """The files that are checked."""
    return [root / "README.md", *sorted(path for path in (root / "docs").glob("*.md") if path.name not in _EXEMPT)]


def main(root: Path = ROOT) -> int:
    """Print each sentence that is too long as one line; returns the exit code."""
    found = [path for path in documents(root) if path.exists()]
    long = [(path.relative_to(root), sentence) for path in found for sentence in too_long(path)]
    for path, sentence in long:
        print(f"{path}:{sentence.line}: {sentence.words} words, more than {MAX_WORDS}: {sentence.text}")
    if not long:
        print(f"{len(found)} documents: no sentence has more than {MAX_WORDS} words")
    return 1 if long else 0


def _plain(text: str) -> str:
    """Without Markdown: a code span counts as one word, a link as its text."""
    text = _LINK.sub(r"\1", _CODE.sub("code", text))
    return text.replace("**", "")


if __name__ == "__main__":
    sys.exit(main())
