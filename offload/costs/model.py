"""What things cost on one machine, for one model: seconds for a read, a copy, a computation.

The times come from a measured `MachineProfile`; nothing here is a constant of anybody's machine. A simulated clock
needs no more than this to time a pass as the runtime runs it (`offload/engine/transfer.py`,
`offload/engine/event_run.py`):

- A pass takes `pass_s`, and for each layer `layer_s` and then its event.
- An event submits all its fetches at once. The disk is one serial channel, since every reader works on the same
  expert: the first read of an idle disk takes `read_s(nbytes, alone=True)`, each further one `read_s(nbytes)`. The
  link, where there is one, is the next serial channel: a copy starts when its bytes are in host memory and the copy
  before it is done, and takes `link_s(nbytes)`.
- The processor meanwhile computes the residents, then each arrival as it lands: `expert_s` each, one after the other.
  The time it waits with nothing to compute is the stall. While reads and computations overlap, both are slower:
  `expert_s(..., reading=True)`, `read_s(..., computing=True)`.
- Without prefetching, nothing is read or copied outside of events. With it both channels go on between them, urgent
  transfers first (`offload/simulation/overlap.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from cache.errors import ProfileError
from cache.types import Tier
from offload.costs.machine import ComputeProfile, Curve, MachineProfile, ProductCurve

__all__ = ["CostModel", "Curve", "MachineProfile"]


class CostModel:
    """Seconds on one machine for one model, whose experts take `expert_bytes` each, in `format`.

    `tier` is where the dense part runs. Its time for one layer is estimated from `dense_layer_bytes`, the weights
    beside the experts (attention, shared experts, router), or given as measured for one token, `dense_layer_s`;
    `dense_pass_bytes` are the weights that each pass reads once, the output head. Both are in `dense_format`, by
    default the experts'. An expert takes `record_bytes` on disk, by default as many as in memory. `threads` compute on
    the CPU, by default as many as were measured. A reader `packs` what is not stored as the format computes with it.
    Attention over a long context is not in it. Raises ProfileError if the
    profile has no measurement of that tier or format. Answers are remembered: asking again is cheap.
    """

    def __init__(
        self,
        profile: MachineProfile,
        *,
        expert_bytes: int,
        format: str = "bf16",
        tier: Tier = Tier.CPU,
        dense_layer_bytes: int | None = None,
        dense_layer_s: float | None = None,
        dense_pass_bytes: int = 0,
        dense_format: str | None = None,
        record_bytes: int | None = None,
        threads: int | None = None,
        packs: bool = False,
    ) -> None:
        if (dense_layer_bytes is None) == (dense_layer_s is None):
            raise ValueError("give the dense part of a layer as bytes or as seconds: one of the two")
        if expert_bytes < 1 or min(dense_layer_bytes or 0, dense_layer_s or 0, dense_pass_bytes) < 0:
            raise ValueError("bytes and seconds are not negative, and an expert has at least one byte")
        self.profile = profile
        self.expert_bytes = expert_bytes
        self.record_bytes = record_bytes or expert_bytes
        self.format = format
        self.tier = tier
        self.threads = threads
        self.packs = packs
        self._compute = measured_tier(profile, tier)
        self._experts = {tier: expert_curve(self._compute.experts, format, expert_bytes, threads)}
        dense = _of_format(self._compute.dense, dense_format or format, threads)[-1]
        self._dense_s = dense.seconds
        one_token_s = dense.seconds(1)
        if dense_layer_bytes is not None:
            self._dense_layer_share = dense_layer_bytes / dense.weight_bytes
        else:
            self._dense_layer_share = (dense_layer_s or 0.0) / one_token_s if one_token_s else 0.0
        self._dense_pass_share = dense_pass_bytes / dense.weight_bytes
        self._expert_memo: dict[tuple[Tier, int, bool], float] = {}
        self._read_memo: dict[tuple[int, bool, bool], float] = {}
        self._layer_memo: dict[tuple[int, int], float] = {}

    def read_s(self, nbytes: int, *, alone: bool = False, computing: bool = False) -> float:
        """Reading an expert of `nbytes` on disk into host memory.

        `alone`: from the request to the landing, on a disk that was idle; else from one landing to the next.
        `computing`: while the processor of the model's tier computes.
        """
        key = nbytes, alone, computing
        if key not in self._read_memo:
            disk = self.profile.disk
            seconds = (disk.alone if alone else disk.streamed)(nbytes)
            if self.packs and self.format in self.profile.packing_bytes_per_s:
                # One reader reads all of an expert and packs it, while the others do the same with the next ones.
                whole_s = disk.alone(nbytes) + nbytes / self.profile.packing_bytes_per_s[self.format]
                seconds = whole_s if alone else max(seconds, whole_s / disk.readers)
            slowdown = self._compute.computing_slowdown if computing else 1.0
            self._read_memo[key] = slowdown * seconds
        return self._read_memo[key]

    def link_s(self, nbytes: int, *, computing: bool = False) -> float:
        """Copying `nbytes` from pinned host memory to the accelerator; `computing`: while the CPU computes experts.

        Raises ProfileError if the machine has no accelerator.
        """
        link = self.profile.link
        if link is None:
            raise ProfileError("this profile has no accelerator's link: measure one with: offload profile --device ...")
        return (link.pinned_computing if computing else link.pinned)(nbytes)

    @property
    def cpu_start_s(self) -> float:
        """Handing a layer's experts to the CPU and learning that they are done, for an accelerator's thread."""
        return self.profile.cpu_start_s

    def expert_s(self, tier: Tier, tokens: int, *, reading: bool = False) -> float:
        """Computing one expert, in place on `tier`, for `tokens` tokens.

        `reading`: while experts are read from disk. Raises ProfileError if `tier` was not measured in this format.
        """
        key = tier, tokens, reading
        if key not in self._expert_memo:
            compute = measured_tier(self.profile, tier)
            if tier not in self._experts:
                self._experts[tier] = expert_curve(compute.experts, self.format, self.expert_bytes, self.threads)
            slowdown = compute.reading_slowdown if reading else 1.0
            self._expert_memo[key] = slowdown * self._experts[tier](tokens)
        return self._expert_memo[key]

    def layer_s(self, tokens: int, experts: int = 0) -> float:
        """What one MoE layer takes beside computing its experts: the dense part for `tokens` tokens, and the overhead.

        `experts` is how many the event has: each adds its share of the overhead.
        """
        key = tokens, experts
        if key not in self._layer_memo:
            dense_s = self._dense_layer_share * self._dense_s(tokens)
            overhead_s = self._compute.layer_overhead(tokens) + experts * self._compute.expert_overhead_s
            self._layer_memo[key] = dense_s + overhead_s
        return self._layer_memo[key]

    def pass_s(self, sequences: int = 1) -> float:
        """What one forward pass takes beside its layers: its overhead, and the output head for a token a sequence."""
        return self._compute.pass_overhead_s + self._dense_pass_share * self._dense_s(sequences)


def expert_curve(measured: Iterable[ProductCurve], format: str, expert_bytes: int, threads: int | None = None) -> Curve:
    """Seconds by tokens of an expert of that size, computed by so many `threads`, as far as they were measured: between
    two measured sizes linear in bytes, outside them in proportion to the nearest. Raises ProfileError if none was
    measured in `format`."""
    curves = _of_format(measured, format, threads)
    below = [curve for curve in curves if curve.weight_bytes <= expert_bytes][-1:]
    above = [curve for curve in curves if curve.weight_bytes >= expert_bytes][:1]
    if not below or not above:
        nearest = (below or above)[0]
        scale = expert_bytes / nearest.weight_bytes
        return Curve(nearest.seconds.at, tuple(scale * seconds for seconds in nearest.seconds.seconds))
    (small,), (large,) = below, above
    span = large.weight_bytes - small.weight_bytes
    share = (expert_bytes - small.weight_bytes) / span if span else 0.0
    tokens = tuple(sorted({*small.seconds.at, *large.seconds.at}))
    return Curve(tokens, tuple((1 - share) * small.seconds(n) + share * large.seconds(n) for n in tokens))


def _of_format(curves: Iterable[ProductCurve], format: str, threads: int | None = None) -> list[ProductCurve]:
    """Those of `format`, by ascending size; of each the one with as many `threads`, or the most below, if there are
    several."""
    curves = list(curves)
    found: dict[int, ProductCurve] = {}
    for curve in sorted((c for c in curves if c.format == format), key=lambda c: c.threads):
        if curve.weight_bytes not in found or threads is None or curve.threads <= threads:
            found[curve.weight_bytes] = curve
    if not found:
        known = ", ".join(dict.fromkeys(curve.format for curve in curves))
        raise ProfileError(f'this profile has no measurement of "{format}" weights, only of {known}')
    return [found[nbytes] for nbytes in sorted(found)]


def measured_tier(profile: MachineProfile, tier: Tier) -> ComputeProfile:
    """What was measured of `tier`. Raises ProfileError if nothing was."""
    if tier not in profile.compute:
        known = ", ".join(measured.value for measured in profile.compute)
        raise ProfileError(
            f"this profile has the {known} and not the {tier.value}: measure it with: offload profile --device ..."
        )
    return profile.compute[tier]
