"""What all tests share: at the end of a run, which model families it ran exactly and which were refused."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts what `record_property("served", family)` and `record_property("refused", "family: reason")` said."""
    said: dict[str, set[str]] = {"served": set(), "refused": set()}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name in said:
                said[name].add(value)
    if not any(said.values()):
        return
    terminalreporter.section("model families")
    terminalreporter.write_line(f"{len(said['served'])} bit-identical: {', '.join(sorted(said['served']))}")
    terminalreporter.write_line(f"{len(said['refused'])} refused")
    for line in sorted(said["refused"]):
        terminalreporter.write_line(f"  {line}")
