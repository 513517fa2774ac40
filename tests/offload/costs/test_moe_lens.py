"""MoE-Lens' bound, by its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.costs.moe_lens import MoeLensBound

BOUND = MoeLensBound(
    prompt_tokens=100,
    tokens=50,
    kv_tokens=10_000,
    model_bytes=20 * 10**9,
    bytes_per_s=10e9,
    compute_tokens_per_s=1e6,
)


def test_the_formula() -> None:
    assert BOUND.pme == pytest.approx(2 * 150 / (250 * 50))  # 0.024 tokens a pass, for each token of KV cache
    assert BOUND.pass_s == 2.0
    assert BOUND.tokens_per_s == pytest.approx(0.024 * 10_000 / 2.0)
    assert BOUND.as_dict() | {"pme": 0.024, "tokens_per_s": 120.0} == pytest.approx(BOUND.as_dict())


def test_it_is_what_a_full_cache_computes_pass_by_pass() -> None:
    """Sequences that begin one after the other, so many that the cache is full: each pass has one token of every
    sequence's reply, and the prompts of those that begin."""
    p, g = BOUND.prompt_tokens, BOUND.tokens
    sequences = BOUND.kv_tokens / (p + g / 2)
    computed = sequences + sequences / g * p
    assert BOUND.tokens_per_s == pytest.approx(computed / BOUND.pass_s)


def test_the_processor_may_be_the_limit() -> None:
    assert replace(BOUND, compute_tokens_per_s=7.0).tokens_per_s == 7.0
    assert replace(BOUND, kv_tokens=20_000).tokens_per_s == 2 * BOUND.tokens_per_s
