"""What a running model decides by, and how that is changed between two passes: predictor, prompts, quota, scheduler."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from typing import Any

import torch

from cache.errors import PolicyError, TraceError
from offload.decide.loads import SplitCosts
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import OURS
from offload.decide.rules import Rules, nothing_to_divide, too_deep
from offload.decide.schedulers.base import find_scheduler
from offload.engine.host import HostWorker
from offload.engine.probe import probe_split
from offload.engine.runtime import ExpertRuntime
from offload.layers.calibration import find_calibration
from offload.layers.lookahead import GateLookahead
from offload.layers.opening import Openings
from offload.plan.prepare import Prepared
from offload.store.precisions import PrecisionStore
from offload.system import interrupts

_log = logging.getLogger("offload.model")


class Steering:
    """Puts rules into force in a model's manager; `rules` are those in force.

    `threads` of the CPU compute beside an accelerator. `probed` are slots to try a scheduler's costs on, of the device
    and of the host, by slice; `costs` are what that gave, None until it is asked for. What has to be undone is left
    with `resources`.
    """

    rules: Rules

    def __init__(
        self,
        prepared: Prepared,
        module: Any,
        store: PrecisionStore,
        runtime: ExpertRuntime,
        threads: int,
        probed: list[list[list[torch.Tensor]]],
        resources: ExitStack,
    ) -> None:
        self._prepared = prepared
        self._module: Any = module
        self._store = store
        self._runtime = runtime
        self._threads = threads
        self._probed = probed
        self._resources = resources
        self.costs: SplitCosts | None = None
        self._next_rules: Rules | None = None
        self._looking = ExitStack()
        resources.callback(self._forget)

    def settled(self, rules: Rules) -> Rules:
        """`rules` with "auto" decided for this model. Warns of a depth beyond its layers. Raises PolicyError."""
        said = too_deep(rules.prefetch_depth, self._prepared.plan.layers)
        if said is not None:
            warnings.warn(said, stacklevel=2)
        return rules.settled(lossy=self._prepared.fallback.lossy, ahead=may_miss(self._prepared))

    def prefetch_by(self, rules: Rules) -> None:
        """From now on, fetch ahead and read prompts as `rules` say; what was learnt for that before is forgotten.

        Raises PolicyError and TraceError, and changes nothing then.
        """
        manager, plan = self._runtime.manager, self._prepared.plan
        shape = plan.layers, self._prepared.experts.num_experts
        prefetcher = rules.make_prefetcher(*shape)
        lookahead = openings = None
        if prefetcher is not None and prefetcher.predictor.looks_ahead:
            try:
                lookahead = self._look_ahead(prefetcher, rules)
            except TraceError as error:
                if not rules.optional:
                    raise
                _log.info("nothing is fetched ahead: %s", error)
                if rules.prefetch_depth is not None or rules.prefetcher != OURS:
                    warnings.warn(f"--prefetch-depth and --prefetcher do nothing here: {error}", stacklevel=2)
                rules = rules.without_predictor()
                prefetcher = rules.make_prefetcher(*shape)
        if prefetcher is not None and prefetcher.predictor.reads:
            openings = Openings(self._module, self._runtime.receive_opening, wanted=lambda: manager.listens)
        with interrupts.held_back():
            self._runtime.settle()
        self._looking.close()
        if lookahead is not None:
            self._looking.callback(lookahead.detach)
        if openings is not None:
            self._looking.callback(openings.detach)
        for cache in manager.stacks.caches:
            cache.favour(())
            cache.rank(None)
        manager.prefetcher = prefetcher
        manager.prefill = rules.make_prefill(*shape)
        self.rules, self._next_rules = rules, None

    def share_by(self, rules: Rules) -> None:
        """From the next event on, divide caches among layers as `rules` say; what still fits stays.

        Raises PolicyError and TraceError, and changes nothing then.
        """
        quota = rules.make_quota(self._prepared.plan.layers, self._prepared.experts.num_experts)
        self._runtime.manager.share_by(quota)
        self.rules = rules

    def split_by(self, rules: Rules) -> None:
        """From now on, divide layers between the accelerator and the CPU as `rules` say.

        Raises PolicyError, and TransferError if the disk fails while costs are measured, the first time.
        """
        manager = self._runtime.manager
        if not rules.splits:
            manager.split = None
        else:
            check_scheduler(rules, self._prepared)
            with interrupts.held_back():
                self._runtime.settle()
                costs = self._measured_costs()
            manager.split = rules.make_split(costs)
        self.rules = rules

    def before_pass(self) -> None:
        """Put into force what came up in the midst of the last pass."""
        if self._next_rules is not None:
            self.prefetch_by(self._next_rules)

    def _forget(self) -> None:
        """Leave the gates, and keep no weight in memory."""
        self._looking.close()
        self._module = None

    def _look_ahead(self, prefetcher: Prefetcher, rules: Rules) -> GateLookahead:
        calibration = find_calibration(self._module, self._prepared.experts)
        return GateLookahead(
            self._module,
            self._prepared.experts,
            prefetcher.depth,
            self._runtime.receive_ahead,
            offsets=None if calibration is None else calibration.offsets,
            wanted=lambda: prefetcher.active,
            refused=self._gates_refused if rules.optional else None,
        )

    def _gates_refused(self, error: Exception) -> None:
        """In the midst of a pass: from the next one on nothing is fetched ahead."""
        _log.info("nothing is fetched ahead: %s", error)
        self._next_rules = self.rules.without_predictor()

    def _measured_costs(self) -> SplitCosts:
        runtime, layer = self._runtime, self._prepared.experts.layers[0]
        if runtime.host is None:
            runtime.host = HostWorker(self._prepared.device, self._threads)
            self._resources.callback(runtime.host.close)
        if self.costs is None:
            self.costs = probe_split(
                self._module.get_submodule(layer.path),
                self._module.config.get_text_config().hidden_size,
                self._store.slices[0],
                [precision.slices for precision in self._store.precisions],
                lambda precision, slots: runtime.weights(layer, precision, slots),
                self._module.dtype,
                self._prepared.device,
                runtime.host,
                *self._probed,
            )
        return self.costs


def may_miss(prepared: Prepared) -> bool:
    """Whether experts may have to be fetched to where they are computed."""
    plan, experts = prepared.plan, prepared.experts.total_experts
    return any(plan.slots(plan.computing_tier, slice_) < experts for slice_ in range(len(plan.pools)))


def check_scheduler(rules: Rules, prepared: Prepared) -> None:
    """Raises PolicyError where there is nothing to divide, and for a scheduler that takes too long to run live."""
    if rules.splits and not prepared.device.is_accelerator:
        raise nothing_to_divide(rules.scheduler)
    if not find_scheduler(rules.scheduler).live:
        raise PolicyError(
            f"--scheduler {rules.scheduler} tries all splits of a layer, and may take as long as the layer: it is for "
            "comparisons; choose another, such as auto or dali"
        )
