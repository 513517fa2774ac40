"""The table of what every policy does on the made-up trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
from golden import TABLE, rows, shape

from cache.policy import names

Row = dict[str, dict[str, list[int]]]
ROUNDING = ("recall", "ridge")
"""Sums of products, whose last bits are the processor's: they may decide between two experts of equal worth."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(TABLE.read_text())
    return content


def test_the_trace_is_the_same(golden: dict[str, Any]) -> None:
    assert shape() == {key: golden[key] for key in ("trace", "accesses", "slots")}


@pytest.mark.parametrize("name", names())
def test_misses_and_bytes_are_the_same(name: str, golden: dict[str, Any]) -> None:
    found = rows(name)
    if name not in ROUNDING:
        assert found == golden["policies"][name]
        return
    for mode, row in golden["policies"][name].items():
        for what, values in row.items():
            assert found[mode][what] == pytest.approx(values, rel=0.01), (mode, what)


def test_no_policy_has_left(golden: dict[str, Any]) -> None:
    assert sorted(golden["policies"]) == sorted(names())


def test_at_least_twelve_policies_differ_from_each_other(golden: dict[str, Any]) -> None:
    """Not all need to: in a pool of one layer, some rules are the same."""
    policies: dict[str, Row] = golden["policies"]
    by_layer = {tuple(modes["layer, warm"]["misses"]) for modes in policies.values()}
    assert len(by_layer) >= 12
    every = {tuple(tuple(row["misses"]) for row in modes.values()) for modes in policies.values()}
    assert len(every) >= 12
