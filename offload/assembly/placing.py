"""What lies where before the first token: a placement carried out, and what it goes by kept for the next start."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cache.errors import OffloadError
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.decide.placements.base import make_placement, uses_of
from offload.decide.rules import Rules
from offload.engine.event_run import receive
from offload.engine.runtime import ExpertRuntime
from offload.layers.uses import add_uses
from offload.system import interrupts
from offload.system.progress import progress_bar

_AT_ONCE = 16  # fetches under way: Ctrl-C waits for them
_log = logging.getLogger(__name__)


def order_of(
    rules: Rules, num_layers: int, num_experts: int, used_before: Callable[[], NDArray[np.int64] | None]
) -> list[ExpertKey]:
    """The experts that `rules` want in memory at the start, the most important first. `used_before` says how often this
    model used each, which counts where there is no profile.

    Warns where nothing is known yet. Raises PolicyError, and TraceError for the profile of another model.
    """
    placement = make_placement(rules.placement, num_layers, num_experts)
    counts = uses_of(placement, rules.profile)
    if counts is None and placement.needs_counts:
        counts = used_before()
        if counts is None:
            warnings.warn(
                f"--placement {rules.placement}: nothing is known of this model's use yet, so it starts with empty "
                "caches; what it uses is kept for the next start",
                stacklevel=2,
            )
    return placement.order(counts)


def fill_caches(runtime: ExpertRuntime, order: list[ExpertKey], *, progress: bool) -> None:
    """Bring the experts of `order` into the tiers that have room for them. Statistics do not count it.

    With `progress`, Ctrl-C skips the rest. Raises TransferError.
    """
    manager, engine = runtime.manager, runtime.engine
    runtime.settle()
    left = list(manager.place(order))
    total = sum(manager.stacks.sizes[fetch.slice] for fetch in left)
    title = "placing experts (Ctrl-C skips the rest)" if progress else "placing experts"
    try:
        with progress_bar(title, total, unit="bytes", show=progress and total > 0) as bar:
            while left:
                with interrupts.held_back():
                    begun, left = left[:_AT_ONCE], left[_AT_ONCE:]
                    engine.submit(begun)
                    for transfer in engine.landed():
                        if transfer.error is not None:
                            manager.failed(transfer.fetch)
                            receive(runtime, engine.landed())
                            raise transfer.error
                        manager.arrived(transfer.fetch, transfer.bytes_from_disk)
                        engine.release(transfer)
                bar.advance(sum(manager.stacks.sizes[fetch.slice] for fetch in begun))
    except KeyboardInterrupt:
        if not progress:
            raise
    finally:
        for fetch in left:
            manager.failed(fetch)
        runtime.reset_stats()


def keep_uses(runtime: ExpertRuntime, module: nn.Module, experts: ExpertMap) -> None:
    """Keep what a model used for its next start, where it used anything and the cache folder can be written to."""
    uses = np.array(runtime.manager.uses)
    if not uses.any():
        return
    try:
        add_uses(module, experts, uses)
    except (OSError, OffloadError) as error:
        _log.info("what was used is not kept: %s", error)
