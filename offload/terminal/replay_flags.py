"""The flags of `offload replay`, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import OffloadError, ProfileError
from offload.system.paths import machine_profile_path
from offload.system.sizes import parse_bytes
from offload.terminal.loading import checked

if TYPE_CHECKING:
    from offload.costs.machine import MachineProfile
    from offload.simulation.compare import Setting

_REPLAY = "What is replayed"
_COST = "What it costs"
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
            "--timed. --policy, --pool, --quota, --predictor, --prefetcher, --prefetch-depth and --placement replace "
            "these parts in all of them.",
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
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="Recorded trace that trains policies which learn, and quotas.",
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
    placement: Annotated[
        str | None,
        typer.Option(
            hidden=True,
            metavar="NAME",
            help="With --preset: which experts are in memory before the first token.",
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
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="What computes: cpu, or gpu for the accelerator that was measured. gpu implies --timed.",
            rich_help_panel=_COST,
        ),
    ] = "cpu"
    host_capacity: Annotated[
        str,
        typer.Option(
            hidden=True,
            metavar="SIZE",
            help="Size of the cache in host memory behind the accelerator's.",
            rich_help_panel=_COST,
        ),
    ] = "100%"
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
    def is_timed(self) -> bool:
        """Whether anything asks for the simulated clock."""
        return self.timed or set(self.predictors) != {"none"} or self.device != "cpu" or self.preset is not None

    def setting(self) -> Setting:
        """What all rows share. Raises OffloadError."""
        from offload.decide.prefetchers.base import OURS
        from offload.simulation.compare import Setting

        return Setting(
            pool=self.pool or "layer",
            quota=self.quota,
            warm=self.warm,
            timed=self.is_timed,
            profile=self.profile,
            machine=_machine(self.machine, required=self.is_timed),
            expert_bytes=None if self.expert_bytes is None else parse_bytes(self.expert_bytes, "--expert-bytes"),
            dense_layer_bytes=0 if self.dense_layer is None else parse_bytes(self.dense_layer, "--dense-layer"),
            predictor=self.predictors[0],
            prefetcher=self.prefetcher or OURS,
            prefetch_depth=self.prefetch_depth,
            device=self.device,
            host_capacity=self.host_capacity,
        )


def split_list(text: str) -> list[str]:
    """The parts of `text` between commas, except those inside brackets. Raises OffloadError for an empty one."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise OffloadError(f'"{text}" has an empty part: write names with single commas between them')
    return parts


def _machine(path: Path | None, *, required: bool) -> MachineProfile | None:
    from offload.costs.machine import MachineProfile
    from offload.costs.stock import find_machine

    stored = machine_profile_path()
    if path is None and not stored.exists():
        if required:
            raise ProfileError("this machine has not been measured: run `offload profile`, or give --machine")
        return None
    return checked(MachineProfile.read(stored) if path is None else find_machine(path))
