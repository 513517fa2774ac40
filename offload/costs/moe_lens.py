"""MoE-Lens' bound: how fast a machine can at most decode batches, where each pass reads all weights. Torch-free.

A sequence of p prompt and g generated tokens has p + g / 2 tokens in the KV cache on average, for g passes. So a cache
of M tokens has room for 2 M / (2 p + g) sequences at once, and each of them has (p + g) / g tokens computed a pass. A
pass takes as long as reading the weights.

Source: MoE-Lens, arXiv 2504.09345.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MoeLensBound:
    """The most tokens/s, of prompts and replies together, that a batch can have whose KV cache and weights are in host
    memory. Tokens, bytes, bytes/s and tokens/s; all are positive."""

    prompt_tokens: int
    """p, of each sequence."""
    tokens: int
    """g, of each sequence: generated."""
    kv_tokens: int
    """M: of all sequences together."""
    model_bytes: int
    """All that a pass reads."""
    bytes_per_s: float
    """How fast it is read."""
    compute_tokens_per_s: float
    """What the processor computes at most, if no weights had to be read again."""

    @property
    def pme(self) -> float:
        """Tokens computed a pass for each token of KV cache: 2 (p + g) / ((2 p + g) g)."""
        p, g = self.prompt_tokens, self.tokens
        return 2 * (p + g) / ((2 * p + g) * g)

    @property
    def pass_s(self) -> float:
        """Seconds of a pass that does nothing but read weights."""
        return self.model_bytes / self.bytes_per_s

    @property
    def tokens_per_s(self) -> float:
        """The bound: reading, or computing where that takes longer."""
        return min(self.pme * self.kv_tokens / self.pass_s, self.compute_tokens_per_s)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types: what it goes by, and what it says."""
        return {**asdict(self), "pme": self.pme, "pass_s": self.pass_s, "tokens_per_s": self.tokens_per_s}
