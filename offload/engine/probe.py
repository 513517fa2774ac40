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
from offload.decide.loads import SplitCosts
from offload.device.base import Device
from offload.engine.host import HostWorker, Job
from offload.engine.outputs import compute_expert
from offload.store.base import ExpertSlice, Weights
from offload.system.timing import median_s, rising

TOKENS = (1, 2, 8, 32, 128)
Run = Callable[[Job], None]
_BUDGET_S = 0.03
_MOST_SLOTS = 16  # weights in turn, so that few come from the processor's cache


def probe_split(
    module: Any,
    hidden: int,
    source: ExpertSlice,
    precisions: Sequence[Sequence[int]],
    weights: Callable[[int, Sequence[torch.Tensor]], Weights],
    dtype: torch.dtype,
    device: Device,
    worker: HostWorker,
    device_slots: Sequence[Sequence[torch.Tensor]],
    host_slots: Sequence[Sequence[torch.Tensor]],
) -> SplitCosts:
    """Costs of experts like `module`'s first, of inputs [n, hidden] of `dtype`.

    `source` is the first slice; `precisions` lists the slices of each precision, of which `weights` makes parameters;
    the slots are listed by slice. Side effect: the first slots, which must be free, are overwritten; the others are
    only read, whatever is in them. Raises TransferError when the disk does.
    """
    with closing(source.open()) as reader:
        read_s = median_s(partial(reader.read, ExpertKey(0, 0), host_slots[0][0]), _BUDGET_S)
    copy_s = median_s(partial(device.copy, device_slots[0][0], host_slots[0][0], device.fence()), _BUDGET_S)

    def times(slots: Sequence[Sequence[torch.Tensor]], run: Run, precision: int, tokens: Sequence[int]) -> list[float]:
        sets = zip(*(slots[slice_][:_MOST_SLOTS] for slice_ in precisions[precision]), strict=False)
        turns = itertools.cycle([weights(precision, each) for each in sets])
        inputs = {n: torch.ones(n, hidden, dtype=dtype, device=slots[0][0].device) for n in tokens}

        def compute(tokens: int) -> None:
            run(lambda: compute_expert(module, inputs[tokens], next(turns)))

        return [median_s(partial(compute, n), _BUDGET_S) for n in tokens]

    def here(job: Job) -> None:
        job()
        if (fence := device.fence()) is not None:
            fence.synchronize()

    def beside(job: Job) -> None:
        worker.start(job)
        worker.join()

    start_s = median_s(partial(beside, lambda: None), _BUDGET_S)
    with torch.no_grad(), device.computing():
        on_gpu = [times(device_slots, here, p, TOKENS if p == 0 else TOKENS[:1]) for p in range(len(precisions))]
        on_cpu = [times(host_slots, beside, p, TOKENS if p == 0 else TOKENS[:1]) for p in range(len(precisions))]
    on_cpu = [[max(seconds - start_s, 0.0) for seconds in each] for each in on_cpu]
    return SplitCosts(
        rising(dict(zip(TOKENS, on_gpu[0], strict=True))),
        rising(dict(zip(TOKENS, on_cpu[0], strict=True))),
        copy_s,
        read_s,
        start_s,
        gpu_factors=_factors(on_gpu),
        cpu_factors=_factors(on_cpu),
    )


def _factors(seconds: Sequence[Sequence[float]]) -> list[float]:
    """How many times as long as at the first precision one token takes at each."""
    first_s = seconds[0][0]
    return [each[0] / first_s if first_s else 1.0 for each in seconds]
