"""What one expert of a loaded model costs on either processor, over the link and from disk, to split layers by.

Measured in the memory where experts lie, with the code that computes them. Takes about a second; what contention adds
is learnt while the model runs (`offload/decide/split.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch

from cache.types import ExpertKey
from offload.costs.machine import Curve
from offload.decide.split import SplitCosts
from offload.device.base import Device
from offload.engine.hook import compute_expert
from offload.engine.host import HostWorker
from offload.store.base import ExpertSlice, Weights
from offload.system.timing import median_s, rising

TOKENS = (1, 2, 8, 32, 128)
_BUDGET_S = 0.03
_MOST_SLOTS = 16  # weights in turn, so that few come from the processor's cache


def probe_split(
    module: Any,
    hidden: int,
    source: ExpertSlice,
    weights: Callable[[torch.Tensor], Weights],
    dtype: torch.dtype,
    device: Device,
    worker: HostWorker,
    device_slots: Sequence[torch.Tensor],
    host_slots: Sequence[torch.Tensor],
) -> SplitCosts:
    """Costs of experts like `module`'s first, of inputs [n, hidden] of `dtype`.

    `weights` makes parameters of a slot. Side effect: the first slots, which must be free, are overwritten; the others
    are only read, whatever is in them. Raises TransferError when the disk does.
    """
    with closing(source.open()) as reader:
        read_s = median_s(partial(reader.read, ExpertKey(0, 0), host_slots[0]), _BUDGET_S)
    copy_s = median_s(partial(device.copy, device_slots[0], host_slots[0], device.fence()), _BUDGET_S)

    def curve(slots: Sequence[torch.Tensor], run: Callable[[Callable[[], object]], None]) -> Curve:
        turns = itertools.cycle([weights(slot) for slot in slots[:_MOST_SLOTS]])
        inputs = {n: torch.ones(n, hidden, dtype=dtype, device=slots[0].device) for n in TOKENS}

        def compute(tokens: int) -> None:
            run(lambda: compute_expert(module, inputs[tokens], next(turns)))

        return rising({tokens: median_s(partial(compute, tokens), _BUDGET_S) for tokens in TOKENS})

    def here(job: Callable[[], object]) -> None:
        job()
        if (fence := device.fence()) is not None:
            fence.synchronize()

    def beside(job: Callable[[], object]) -> None:
        worker.start(job)
        worker.join()

    start_s = median_s(partial(beside, lambda: None), _BUDGET_S)
    with torch.no_grad(), device.computing():
        on_gpu = curve(device_slots, here)
        alone = curve(host_slots, beside)
    on_cpu = Curve(alone.at, tuple(max(seconds - start_s, 0.0) for seconds in alone.seconds))
    return SplitCosts(on_gpu, on_cpu, copy_s, read_s, start_s)
