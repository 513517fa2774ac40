"""A profile's plots."""

from __future__ import annotations

from offload.terminal.profile_tables import plot


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
