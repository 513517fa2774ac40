"""What predictors share: ranks, and how many tokens an event has."""

from __future__ import annotations

import numpy as np
import pytest
from workload import event

from cache.types import Phase
from predictors.ranking import Tokens, of_any_token, ranked, tokens_ahead


def test_the_likeliest_come_first_ties_by_id_and_impossible_ones_not_at_all() -> None:
    found = ranked(2, 3, np.array([0.1, 0.0, 0.5, 0.1, 0.0, 0.5]), 6)
    assert [tuple(p) for p in found] == [((2, 2), 0.5, 3), ((2, 5), 0.5, 3), ((2, 0), 0.1, 3), ((2, 3), 0.1, 3)]
    assert ranked(2, 3, np.array([0.1, 0.0, 0.5, 0.1, 0.0, 0.5]), 3) == found[:3]


def test_tokens_are_counted_by_how_many_experts_a_token_goes_to() -> None:
    tokens = Tokens()
    prompt = event(0, (0, 1, 2, 3), tokens=(3, 3, 1, 1), phase=Phase.PREFILL)  # four tokens of two experts each
    assert tokens.of(prompt) == 3  # as far as can be known
    assert tokens.share(8) == 0.5
    assert tokens.of(event(0, (0, 1))) == 1
    assert tokens.of(prompt) == 4
    assert tokens.share(8) == 0.25
    assert tokens.of(event(0, (0, 1), tokens=(5, 5))) == 5


def test_a_decoding_batch_stays_as_large_and_a_prompt_is_followed_by_one_token() -> None:
    for phase, following in ((Phase.DECODE, 5), (Phase.PREFILL, 1)):
        seen = event(1, (0, 1), phase=phase)
        assert [tokens_ahead(seen, 5, lead, 3) for lead in (1, 2)] == [5, following]
    assert of_any_token(np.array([0.5, 0.0]), 3).tolist() == pytest.approx([1 - 0.5**3, 0])
