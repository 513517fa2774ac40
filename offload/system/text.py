"""Text as Unicode has it."""

from __future__ import annotations


def without_surrogates(text: str) -> str:
    """`text` with pairs of surrogates joined, and lone ones replaced: no tokenizer and no file takes those."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
