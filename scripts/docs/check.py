"""Check that every file the documentation points at is there: relative links, and project paths in backticks.

python scripts/docs/check.py    exits with 1 and names what is missing
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_PATH = re.compile(r"`((?:offload|predictors|cache|scripts|tests|docs)/[\w./-]*\w)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The project's Markdown files."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def missing(document: Path, root: Path) -> Iterator[str]:
    """What `document` points at that is not there: links count from its folder, paths from `root`."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    yield from (link for link in _LINK.findall(text) if not (document.parent / link).exists())
    yield from (path for path in _PATH.findall(text) if not (root / path).exists())


def main(root: Path = ROOT) -> int:
    """Print each dead reference as one line; returns the exit code."""
    found = documents(root)
    dead = [f"{doc.relative_to(root)}: no such file: {name}" for doc in found for name in missing(doc, root)]
    print("\n".join(dead) or f"{len(found)} documents: every file they point at is there")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
