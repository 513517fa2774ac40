"""What all tests share: Ctrl-C, and at the end of a run which model families it ran exactly and which were refused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from own_cache import own_cache

hypothesis.settings.register_profile("patient", deadline=None)  # the machine may be busy with something else
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell ignores it for what it runs in the background, and so for all children."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


_own_cache_folder = pytest.fixture(scope="session", autouse=True)(own_cache)


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
