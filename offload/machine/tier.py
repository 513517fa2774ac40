"""What one tier's processor takes: experts and dense weights in every format, and overheads."""

from __future__ import annotations

from offload.costs.machine import ComputeProfile
from offload.machine.budget import Budget
from offload.machine.compute import ComputeProbe
from offload.machine.extent import Extent
from offload.machine.overhead import Overhead, measure_overhead
from offload.machine.products import Times, curves, measure_products

_FIRST_FORMAT, _USUAL = 0.3, 0.7  # until when the first format has the time for itself, then the usual shape


class TierProbe:
    """A tier's measurements, as far as they were taken."""

    def __init__(self, probe: ComputeProbe, extent: Extent) -> None:
        self.device = probe.device
        self.threads = probe.threads
        self._extent = extent
        self._overhead: Overhead | None = None
        self._experts = [
            Times(probe.expert(format, shape, tokens))
            for format in extent.formats
            for shape, tokens in extent.experts.items()
        ]
        self._dense = self._dense_times(probe)
        self._dense_alone = list[Times]()
        if probe.threads > 1 and not self.device.is_accelerator:  # as models with small experts do
            self._dense_alone = self._dense_times(ComputeProbe(self.device, 1, probe.block))

    def measure_overhead(self, budget: Budget) -> None:
        """Runs tiny models. Raises OffloadError."""
        self._overhead = measure_overhead(
            self.device, self._extent.overhead_tokens, self._extent.overhead_rounds, budget
        )

    def measure_products(self, budget: Budget) -> None:
        """Computes experts and dense weights, those that plans use most first."""
        usual = [each for each in self._experts if each.product.shape == self._extent.usual_shape]
        others = [each for each in self._experts if each.product.shape != self._extent.usual_shape]
        measure_products([*usual[:1], *self._dense[:1]], budget.until(_FIRST_FORMAT))
        measure_products([*usual, *self._dense], budget.until(_USUAL))
        measure_products([*usual, *self._dense, *others, *self._dense_alone], budget)

    def usual_s(self, budget: Budget) -> float:
        """Seconds for one token of the expert that plans use most, to be compared with those of another moment."""
        usual = next(each for each in self._experts if each.product.shape == self._extent.usual_shape)
        return usual.take(1, budget)

    def profile(self, least: int, contention: tuple[float, float] = (1.0, 1.0)) -> ComputeProfile | None:
        """What was measured of products known by at least so many counts of tokens; None if there are none.

        `contention` is by how many times computing is slower while records are read, and reading meanwhile.
        """
        experts, dense = curves(self._experts, least), curves([*self._dense, *self._dense_alone], least)
        if self._overhead is None or not experts or not dense:
            return None
        return ComputeProfile(
            device=self.device.name,
            threads=self.threads,
            experts=experts,
            dense=dense,
            layer_overhead=self._overhead.layer,
            expert_overhead_s=self._overhead.expert_s,
            pass_overhead_s=self._overhead.pass_s,
            reading_slowdown=contention[0],
            computing_slowdown=contention[1],
        )

    def _dense_times(self, probe: ComputeProbe) -> list[Times]:
        shape, tokens = self._extent.dense_shape, self._extent.dense_tokens
        return [Times(probe.dense(format, shape, tokens)) for format in self._extent.dense_formats]
