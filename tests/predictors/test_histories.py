"""Predictors that look for the nearest recorded sequence or pass, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from workload import EXPERTS, LAYERS, event, make, passes, said, trace_of

from cache.types import ExpertKey


def test_without_a_profile_the_sequence_is_its_own_activation_matrix() -> None:
    matrix = make("activation-matrix")
    for seen in passes(((0, 1), (4, 5), (6, 7)), ((0, 2), (4, 5), (6, 7)), ((0, 3), (4, 5), (6, 7))):
        matrix.observe(seen)
    assert said(matrix) == {ExpertKey(0, 0): 3 / 4, **{ExpertKey(0, expert): 1 / 4 for expert in (1, 2, 3)}}
    matrix.observe(event(0, (5, 6), sequence=1))
    assert matrix.predict(2) == []  # a new sequence


def test_the_nearest_activation_matrix_says_what_comes() -> None:
    one = (((0, 1), (0, 1), (2, 3)), ((0, 1), (0, 1), (2, 4)))
    other = (((0, 2), (6, 7), (6, 7)), ((0, 1), (6, 7), (6, 7)))
    matrix = make("activation-matrix", trace_of(*one, *other, offsets=(0, 2, 4)))
    matrix.observe(event(0, (0, 1)))  # nothing to compare: both sequences together
    assert said(matrix) == {ExpertKey(1, expert): 0.5 for expert in (0, 1, 6, 7)}
    matrix.observe(event(1, (7, 6)))
    matrix.observe(event(0, (0, 1), step=1))
    assert said(matrix, 2) == {ExpertKey(layer, expert): 1.0 for layer in (1, 2) for expert in (6, 7)}
    matrix.observe(event(2, (2, 3), step=1))
    assert said(matrix) == {ExpertKey(0, 0): 1.0, ExpertKey(0, 1): 0.5, ExpertKey(0, 2): 0.5}


def test_the_nearest_expert_maps_are_asked() -> None:
    tokens = (((0, 1), (2, 3), (4, 5)), ((0, 1), (2, 6), (4, 7)), ((6, 7), (2, 3), (5, 6)))
    one, two = make("expert-map(nearest=1)", trace_of(*tokens)), make("expert-map(nearest=2)", trace_of(*tokens))
    for maps in (one, two):
        maps.observe(event(0, (0, 1)))
    assert set(said(one)) == {ExpertKey(1, 2), ExpertKey(1, 3)}
    assert sum(each.probability for each in one.predict(1)) == pytest.approx(1)  # the map's own
    assert one.similarity == pytest.approx(1)
    assert said(two) == {ExpertKey(1, 2): 1.0, ExpertKey(1, 3): 0.5, ExpertKey(1, 6): 0.5}
    for maps in (one, two):
        maps.observe(event(1, (2, 6)))
    assert set(said(one)) == {ExpertKey(2, 4), ExpertKey(2, 7)}  # now only the second is like it
    one.observe(event(2, (4, 7)))
    assert set(said(one)) == {ExpertKey(0, 0), ExpertKey(0, 1)}
    one.observe(event(0, (3, 5), step=1))
    assert one.similarity == 0.0  # no map has these


def test_expert_maps_go_by_scores_where_there_are_some() -> None:
    scores = np.zeros((2, LAYERS, EXPERTS), np.float16)
    scores[0, 0, :3], scores[1, 0, :3] = (5, 4, 3), (5, 4, -3)
    trace = replace(trace_of(((0, 1), (2, 3), (4, 5)), ((0, 1), (6, 7), (4, 5))), scores=scores)
    maps = make("expert-map(nearest=1)", trace)
    maps.observe(event(0, (0, 1), scores=scores[1, 0].astype(np.float32)))
    assert [key.expert for key in said(maps)][:2] == [0, 1]  # of layer 1 all scores are equal, and the first ones win
