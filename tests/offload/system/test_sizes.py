"""Sizes and rates as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from cache.errors import BudgetError
from offload.system.sizes import format_bytes, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8G", 8 * 2**30),
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("7.5GB", 7_500_000_000),
        ("1.5G", 3 * 2**29),
        (".5M", 2**19),
        ("900M", 900 * 2**20),
        ("900MB", 900_000_000),
        ("2K", 2048),
        ("2KB", 2000),
        ("1T", 2**40),
        ("1TiB", 2**40),
        ("1TB", 10**12),
        ("4096", 4096),
        ("4096B", 4096),
        ("8g", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8gb", 8 * 10**9),
        (" 8 G ", 8 * 2**30),
        ("1.9B", 1),
        (4096, 4096),
        (1.5e9, 1_500_000_000),
    ],
)
def test_sizes(text: str | float, expected: int) -> None:
    size = parse_bytes(text)
    assert size == expected
    assert type(size) is int


@pytest.mark.parametrize(
    "junk",
    [
        "",
        " ",
        "G",
        "8X",
        "8GG",
        "8Gb/s",
        "eight",
        "+8G",
        "1e9",
        "8,5G",
        "1.2.3G",
        "8 G B",
        "8.G",
        "nan",
        "inf",
    ],
)
def test_text_that_is_no_size_is_refused_by_name(junk: str) -> None:
    with pytest.raises(BudgetError, match="--gpu-mem: cannot read ") as caught:
        parse_bytes(junk, "--gpu-mem")
    assert f'"{junk}"' in str(caught.value)
    assert "7.5GB" in str(caught.value)


@pytest.mark.parametrize(
    "size", [0, -1, -(2**30), 0.5, float("nan"), float("inf"), -float("inf"), "0", "0G", ".1B", "-8G"]
)
def test_sizes_that_are_not_positive_and_finite_are_refused_by_name(size: str | float) -> None:
    with pytest.raises(BudgetError, match=f"--cpu-mem: {size} is not a positive size"):
        parse_bytes(size, "--cpu-mem")


def test_a_size_beyond_every_number_is_refused() -> None:
    with pytest.raises(BudgetError, match="not a positive size"):
        parse_bytes("9" * 400 + "G")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3GB/s", 3e9), ("3G/s", 3 * 2**30), ("500 MB/S", 5e8), (" 1.5GiB/s ", 1.5 * 2**30), (2e9, 2e9)],
)
def test_rates(text: str | float, expected: float) -> None:
    rate = parse_rate(text)
    assert rate == expected
    assert type(rate) is float


@pytest.mark.parametrize(
    "junk",
    ["3GB", "3", "", "/s", "GB/s", "-3GB/s", "3GB/m", "3 parsecs/s", 0, -1.0, float("nan"), float("inf")],
)
def test_what_is_no_rate_is_refused_by_name(junk: str | float) -> None:
    with pytest.raises(BudgetError, match="--link: "):
        parse_rate(junk, "--link")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (9437184, "9.0 MiB"),
        (2**30, "1.00 GiB"),
        (1.5 * 2**30, "1.50 GiB"),
        (2**40, "1.00 TiB"),
        (5 * 2**50, "5120.00 TiB"),
        (-(2**20), "-1.0 MiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(size: float, expected: str) -> None:
    assert format_bytes(size) == expected


@pytest.mark.parametrize("size", [1, 999, 2**20, 2**30, 5 * 2**40])
def test_printed_sizes_can_be_read_back(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


def test_a_share_is_refused_where_only_sizes_go() -> None:
    with pytest.raises(
        BudgetError, match=r'--expert-cache: cannot read "25%" as a size: .*; shares are not taken here'
    ):
        parse_bytes("25%", "--expert-cache")


@pytest.mark.parametrize("junk", [True, [8], 10**400, float("nan"), None])
def test_values_that_are_no_size_are_refused_by_name(junk: Any) -> None:
    with pytest.raises(BudgetError, match=r"--gpu-mem: .* is not a (positive )?size"):
        parse_bytes(junk, "--gpu-mem")
