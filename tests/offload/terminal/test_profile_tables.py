"""A profile's plots."""

from __future__ import annotations

import io
from dataclasses import replace

from machines import machine
from rich.console import Console

from cache.types import Tier
from offload.terminal.profile_tables import plot, profile_tables


def test_a_plot_has_every_series_and_the_ends_of_both_axes() -> None:
    drawn = plot("title", {"a": [(1, 1.0), (512, 8.0)], "b": [(1, 2.0)]}, str, lambda y: f"{y:g} s")
    lines = drawn.splitlines()
    assert lines[0] == "title"
    assert lines[1].startswith("8 s")
    assert lines[1].endswith("●")
    assert lines[10].startswith("1 s │●")
    assert lines[12].split() == ["1", "512"]
    assert "● a" in lines[13]
    assert "○ b" in lines[13]
    assert plot("one", {"a": [(4, 3.0)]}, str, str).count("●") == 2  # the point, and what it is called


def test_what_was_estimated_is_marked() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    profile = machine(with_accelerator=False)
    cpu = profile.compute[Tier.CPU]
    for table in profile_tables(profile):
        console.print(table)
    assert "~" not in console.export_text()
    first, *others = cpu.experts
    estimated = replace(cpu, experts=(replace(first, extrapolated=(512,)), *others))
    for table in profile_tables(replace(profile, compute={Tier.CPU: estimated})):
        console.print(table)
    shown = console.export_text()
    assert "~64.000 ms" in shown and "~1.000 ms" not in shown
    assert "~ estimated: to measure it would have taken too long" in shown
