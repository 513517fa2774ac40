"""FreeToken: misses are split as the link's speed is to the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, register, residents_first, timed


@dataclass(frozen=True)
class Params:
    """`least`: how many times as fast as the link the CPU must go through weights to compute any."""

    least: float = 2.0


@register
class Ratio(Scheduler):
    """Of m missing experts, m * link / (link + CPU) are fetched, to the nearest integer and at least one, and the CPU
    computes the others; all are fetched where the CPU is too slow. The accelerator computes what it holds.

    Speeds are those of weights: a transfer, against the CPU's time for one token, which is the time to read them once.
    Both should be measured while the other is busy; then their sum is what host memory gives, and the rule is the
    published one, m * link / host. It knows nothing of tokens, so it is one for decoding. Which ones are fetched: most
    tokens first, where FreeToken takes those that came back most recently, which a load does not say.

    Source: FreeToken, arXiv 2608.16157, and its public code, commit 233f3a19.
    """

    name = "ratio"
    Params = Params

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        order = residents_first(loads)
        held = sum(load.cached for load in loads)
        missing = len(order) - held
        fetches = missing
        if missing:
            copy_s = sum(costs.transfer_s(loads[i]) for i in order[held:]) / missing
            read_s = costs.cpu_s(1)
            if self.params.least * read_s < copy_s:
                share = read_s / (read_s + copy_s)
                fetches = max(1, int(missing * share + 0.5))
        return timed(loads, costs, order[: held + fetches], order[held + fetches :])
