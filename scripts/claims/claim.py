"""What a claim is, and the list of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from scripts.claims.workloads import Workload

Measure = Callable[[Workload], str | None]
"""What a workload gives, as text; None where it cannot say."""

_KINDS = ("eviction", "routing", "prediction", "systems")
_CLAIMS: list[Claim] = []


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and how it is measured here."""

    system: str
    source: str
    """An arXiv number."""
    what: str
    theirs: str
    """The paper's figures and its setting."""
    ours: str
    """What is measured here, and in which setting."""
    command: str
    """That gives the like; T is a trace, P another one of the same model, M a machine."""
    why: str
    """Where ours does not reach the claim, why."""
    measure: Measure


def claim(
    system: str, source: str, what: str, *, theirs: str, ours: str, command: str = "", why: str = ""
) -> Callable[[Measure], Measure]:
    """Adds what it decorates to the claims."""

    def add(measure: Measure) -> Measure:
        _CLAIMS.append(Claim(system, source, what, theirs, ours, command, why, measure))
        return measure

    return add


def claims() -> list[Claim]:
    """All of them, in the order of their files."""
    for kind in _KINDS:
        import_module(f"scripts.claims.{kind}")
    return list(_CLAIMS)


def percent(share: float | None) -> str:
    """As tables have it."""
    return "-" if share is None else f"{100 * share:.1f}"


def row(*shares: float | None) -> str:
    """Several percentages."""
    return " / ".join(map(percent, shares))
