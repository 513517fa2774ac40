"""`offload profile`: measures this machine, stores what it measured, and shows it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from cache.errors import ProfileError
from cache.outputs import check_output
from offload.costs.machine import MachineProfile
from offload.system.cores import too_many_threads
from offload.system.messages import notice, warning
from offload.system.paths import cache_dir, machine_profile_path, own_place
from offload.terminal import console
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import Json
from offload.terminal.profile_tables import profile_plots, profile_tables

_PROMISED_S, _LEAST_S = 39.0, 25.0  # a measurement that has begun is not cut short: some seconds are left for that


def profile(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to store the profile. Default: machine.json in offload's cache folder."
        ),
    ] = None,
    disk: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder on the disk that models are read from. Default: offload's cache folder."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="Accelerator to measure beside the CPU: auto, cpu, cuda, cuda:N or emulated."
        ),
    ] = "auto",
    link: Annotated[
        str | None, typer.Option(metavar="SPEED", help='Link speed of the emulated device, such as "3GB/s".')
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads that compute. Default: one a core.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure this machine: disk, memory, link, experts and overheads.

    Plans and timed replays take their costs from this. It takes less than 45 seconds: on a slow machine less is
    measured, and the rest estimated. It needs a temporary file of 512 MiB on the disk, and memory of a few times the
    processor's cache. Ctrl-C stores what was measured until then, once that is enough for a plan and
    where no profile is stored yet.
    """
    if disk is not None and not disk.is_dir():
        raise ProfileError(f"--disk {disk}: there is no such folder")
    path = out or own_place(machine_profile_path())
    check_output(path)
    if (said := too_many_threads(threads)) is not None:
        warning(said)
    measured, stopped_at = _measure(disk or cache_dir(), device, link, threads)
    stays = stopped_at is not None and path.exists()  # whole, and worth more than a part
    if measured is not None and not stays:
        measured.write(path)
        if measured.busy is not None:
            warning(
                f"{measured.busy}: the times are those of a busy machine: measure again when it is idle, "
                "or with --threads 1, since several threads that wait for each other suffer most"
            )
    if measured is None or stopped_at is not None:
        kept = f"what was measured until then is stored in {path}, the rest is estimated or missing"
        if stays:
            kept = f"the profile in {path} stays as it was"
        elif measured is None:
            kept = "too little was measured to be stored"
        notice(f"stopped while {stopped_at}: {kept}")
        raise typer.Exit(INTERRUPTED)
    _show(measured, json_output)
    notice(f"stored in {path}")


def _measure(
    disk: Path, device: str, link: str | None, threads: int | None
) -> tuple[MachineProfile | None, str | None]:
    """What was measured, and while doing what it was stopped by Ctrl-C; no profile where that was too soon."""
    with console.steps(lines=True) as on_step:
        on_step("starting")
        from offload.device.choose import make_device
        from offload.machine.measure import Stopped, measure_machine

        chosen = make_device(device, link)
        try:
            return measure_machine(disk, chosen, threads, on_step=on_step, limit_s=_limit_s()), None
        except Stopped as stopped:
            return stopped.profile, stopped.step
        finally:
            chosen.close()


def _limit_s() -> float:
    """How long measuring may take. The program's start takes part of what is promised: seconds on a slow machine."""
    started_s = time.time() - psutil.Process().create_time()
    return max(_PROMISED_S - started_s, _LEAST_S)


def _show(measured: MachineProfile, json_output: bool) -> None:
    if json_output:
        console.print_json(measured.as_dict())
        return
    for table in profile_tables(measured):
        console.answers().print(table)
    for drawn in profile_plots(measured):
        console.answers().print(f"\n{drawn}", soft_wrap=True)
