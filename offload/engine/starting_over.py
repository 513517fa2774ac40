"""After an error: whether everything is still in order, and how all of it starts over where it may not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from offload.decide.manager import Manager
from offload.engine.host import HostWorker
from offload.engine.protocols import Fused
from offload.engine.transfer import TransferEngine


class Parts(Protocol):
    """What an `ExpertRuntime` is made of."""

    host: HostWorker | None
    engine: TransferEngine
    manager: Manager
    fused: Fused | None
    refill: Callable[[], object]

    def forget(self) -> None: ...


def in_order(manager: Manager, engine: TransferEngine) -> bool:
    """Between events, with nothing on its way: whether caches are as they should be, and hold what has a place."""
    try:
        manager.check_integrity()
    except RuntimeError:
        return False
    return all(
        engine.held(cache.tier, slice_) == set(cache.resident())
        for slice_, caches in enumerate(manager.stacks.by_slice)
        for cache in caches
    )


def start_over(runtime: Parts) -> None:
    """Empty caches, free slots, nothing under way and nothing pinned, in whatever state an error has left them."""
    if runtime.host is not None:
        runtime.host.restart()  # first: what it is at gives places back to the engine
    runtime.engine.restart()
    runtime.manager.start_over()
    runtime.forget()
    if runtime.fused is not None:
        runtime.fused.forget()
    runtime.refill()
