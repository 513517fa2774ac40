"""The flags of `offload replay`, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import OffloadError, ProfileError
from offload.system.sizes import parse_bytes
from offload.terminal.lists import split_list
from offload.terminal.loading import measured_machine

if TYPE_CHECKING:
    from offload.simulation.compare import Setting

_REPLAY = "What is replayed"
_COST = "What it costs"
_SYSTEM = "A system of one's own"
_GRID = "Large grids"


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What is replayed, and what it costs."""

    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help='Eviction policies, with commas between them; "all" is every policy. Parameters go in brackets: '
            '"lfu(reset=True)". Your own is module:Class. Default: lru.',
            rich_help_panel=_REPLAY,
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Published systems to compare as a whole (docs/presets.md), with commas between them, or all. Implies "
            "--timed. The flags of parts, from --policy to --placement, replace that part in all of them.",
            rich_help_panel=_REPLAY,
        ),
    ] = None
    capacity: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="Sizes of the expert cache, with commas between them: shares of all experts, or bytes: 10%,25%,4G.",
            rich_help_panel=_REPLAY,
        ),
    ] = "25%"
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="POOL",
            help="layer, the default, has a cache for each layer; global has one for all layers.",
            rich_help_panel=_REPLAY,
        ),
    ] = None
    quota: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="NAME",
            help="How the layers' caches divide the capacity: even (the default), shallow, dp, distinct or plec "
            "(docs/policies.md), or module:Class.",
            rich_help_panel=_REPLAY,
        ),
    ] = None
    warm: Annotated[
        bool,
        typer.Option(
            "--warm/--cold",
            help="Keep caches and counters from one sequence to the next, or empty them before each.",
            rich_help_panel=_REPLAY,
        ),
    ] = False
    warm_up: Annotated[
        int,
        typer.Option(
            hidden=True,
            metavar="N",
            min=0,
            help="With --warm: replay the first N sequences of each trace, and do not count them.",
            rich_help_panel=_REPLAY,
        ),
    ] = 0
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="Recorded trace that trains the policies, quotas, predictors and placements which learn.",
            rich_help_panel=_REPLAY,
        ),
    ] = None
    machine: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `offload profile` measured, or a machine of docs/costs.md: rtx-4060-laptop. Default: what it "
            "stored last.",
            rich_help_panel=_COST,
        ),
    ] = None
    expert_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of an expert. Default: what the trace says.", rich_help_panel=_COST),
    ] = None
    dense_layer: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="SIZE",
            help="Size of a layer without its experts: attention, router, shared experts.",
            rich_help_panel=_COST,
        ),
    ] = None
    timed: Annotated[
        bool,
        typer.Option(
            "--timed",
            help="Go event by event through the live decision loop under a simulated clock, instead of counting.",
            rich_help_panel=_COST,
        ),
    ] = False
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Predictors of the next experts, with commas between them (docs/predictors.md). Implies --timed. "
            "Default: none.",
            rich_help_panel=_COST,
        ),
    ] = None
    prefetcher: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="NAME",
            help="Which of the expected experts are fetched, in which order (docs/predictors.md). Default: ours.",
            rich_help_panel=_COST,
        ),
    ] = None
    prefetch_depth: Annotated[
        int | None,
        typer.Option(
            hidden=True,
            metavar="D",
            min=1,
            help="Number of layers to look ahead. Default: the prefetcher's own.",
            rich_help_panel=_COST,
        ),
    ] = None
    experts: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="PRECISION",
            help="Precision of the experts; with a --fallback several, the best first (docs/precision.md). Without "
            "--preset, this and the next three compose one system of what runs by default and the parts that are "
            "named, and replay that.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None
    fallback: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="NAME",
            help="What serves an expert that is missing at its best precision. Default: none, which waits for it.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="NAME",
            help="With --device gpu: who computes an expert that the accelerator lacks (docs/scheduling.md).",
            rich_help_panel=_SYSTEM,
        ),
    ] = None
    placement: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="NAME",
            help="Which experts are in memory before the first token: empty, popular (by --profile), random, or "
            "module:Class.",
            rich_help_panel=_SYSTEM,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="What computes: cpu, or gpu for the accelerator that was measured. gpu implies --timed.",
            rich_help_panel=_COST,
        ),
    ] = "cpu"
    host_capacity: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="SIZE",
            help="Size of the cache in host memory behind the accelerator's. Default: 100%.",
            rich_help_panel=_COST,
        ),
    ] = None
    sweep: Annotated[
        Path | None,
        typer.Option(
            hidden=True,
            metavar="FILE",
            help="Replay a grid on all cores. FILE keeps the rows as they come, and a second run goes on from there. A "
            'list of values is a choice: "hobbit(lfu=[0.2, 0.5])".',
            rich_help_panel=_GRID,
        ),
    ] = None
    jobs: Annotated[
        int | None,
        typer.Option(
            hidden=True, metavar="N", min=1, help="Processes of a sweep. Default: one a core.", rich_help_panel=_GRID
        ),
    ] = None

    @property
    def predictors(self) -> list[str]:
        """Those that are compared."""
        return split_list(self.predictor or "none")

    @property
    def presets(self) -> list[str]:
        """Those that are compared; what runs by default where flags compose a system; none for policies alone."""
        composed = (self.experts, self.fallback, self.scheduler, self.placement)
        if self.preset is None:
            return ["default"] if any(part is not None for part in composed) else []
        return split_list(self.preset)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of a system that are said, by name; None for those that are not."""
        from offload.decide.preset import PARTS

        return {name: getattr(self, name) for name in PARTS}

    @property
    def is_timed(self) -> bool:
        """Whether anything asks for the simulated clock."""
        return self.timed or set(self.predictors) != {"none"} or self.device != "cpu" or bool(self.presets)

    def setting(self) -> Setting:
        """What all rows share. Raises OffloadError, also for a flag that would do nothing."""
        from offload.decide.prefetchers.base import OURS
        from offload.simulation.compare import Setting

        self._check()
        setting = Setting(
            pool=self.pool or "layer",
            quota=self.quota,
            warm=self.warm,
            warm_up=self.warm_up,
            timed=self.is_timed,
            profile=self.profile,
            machine=measured_machine(self.machine, required=self.is_timed),
            expert_bytes=None if self.expert_bytes is None else parse_bytes(self.expert_bytes, "--expert-bytes"),
            dense_layer_bytes=0 if self.dense_layer is None else parse_bytes(self.dense_layer, "--dense-layer"),
            predictor=self.predictors[0],
            prefetcher=self.prefetcher or OURS,
            prefetch_depth=self.prefetch_depth,
            device=self.device,
            host_capacity=self.host_capacity or "100%",
        )
        if self.dense_layer is not None and setting.machine is None:
            raise ProfileError("--dense-layer does nothing without seconds: run `offload profile`, or give --machine")
        return setting

    def _check(self) -> None:
        """Raises OffloadError for a flag that does nothing without another one."""
        predicts = bool(self.presets) or set(self.predictors) != {"none"}  # presets look for themselves
        needs = (
            ("--jobs", self.jobs, "--sweep", self.sweep is not None),
            ("--host-capacity", self.host_capacity, "--device gpu", self.device == "gpu"),
            ("--prefetcher", self.prefetcher, "a --predictor", predicts),
            (f"--prefetch-depth {self.prefetch_depth}", self.prefetch_depth, "a --predictor", predicts),
        )
        for flag, value, other, is_there in needs:
            if value is not None and not is_there:
                raise OffloadError(f"{flag} does nothing without {other}: leave it out")
