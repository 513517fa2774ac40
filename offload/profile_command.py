"""`offload profile`: measures this machine, stores what it measured, and shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cache.machine import ComputeProfile, MachineProfile
from offload import terminal
from offload.options import Json, flat
from offload.paths import cache_dir, machine_profile_path
from offload.sizes import format_bytes


@flat
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
            metavar="FOLDER", help="A folder on the disk that models are read from. Default: offload's cache."
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
    """Measure this machine: disk, memory, link, experts by format, shape and tokens, and overheads.

    What timed replay and planning price things by. Takes well under a minute on an idle machine, a temporary file of
    512 MiB on the disk, and memory of a few times the processor's cache.
    """
    with _steps() as on_step:
        on_step("starting")
        from offload.device import make_device
        from offload.profile import busy_cores, measure_machine

        others = busy_cores()
        chosen = make_device(device, link)
        try:
            measured = measure_machine(disk or cache_dir(), chosen, threads, on_step=on_step)
        finally:
            chosen.close()
    path = out or machine_profile_path()
    measured.write(path)
    if others is not None and others > 0.5:
        terminal.warning(
            f"{others:.1f} cores were busy with other things in the minute before: "
            "the times are those of a busy machine: measure again when it is idle, "
            "or with --threads 1, since several threads that wait for each other suffer most"
        )
    if json_output:
        print(json.dumps(measured.as_dict()))
    else:
        for table in profile_tables(measured):
            terminal.answers().print(table)
    terminal.notice(f"stored in {path}")


def profile_tables(profile: MachineProfile) -> Iterator[Table]:
    """What was measured, for people: transfers, then each tier's experts by tokens and its other figures."""
    table = _table("transfers", "record", "alone", "streamed", "rate")
    for nbytes, alone_s, streamed_s in zip(
        profile.disk.alone.at, profile.disk.alone.seconds, profile.disk.streamed.seconds, strict=True
    ):
        rate = f"{format_bytes(nbytes / streamed_s)}/s"
        table.add_row("disk", format_bytes(nbytes), _ms(alone_s), _ms(streamed_s), rate)
    table.add_row("host copy", "", "", "", f"{format_bytes(profile.host_copy_bytes_per_s)}/s")
    if profile.link is not None:
        table.add_row("link", "", _ms(profile.link.latency_s), "", f"{format_bytes(profile.link.bytes_per_s)}/s")
    yield table
    for tier, compute in profile.compute.items():
        yield from _compute_tables(tier.value, compute)


def _compute_tables(tier: str, compute: ComputeProfile) -> Iterator[Table]:
    rows = [("expert", curve) for curve in compute.experts] + [("dense", curve) for curve in compute.dense]
    tokens = compute.experts[0].seconds.at
    name = f"{tier} ({compute.device}, threads: {compute.threads})"
    table = _table(
        name, "format", "shape", "size", *(f"{count} tokens" if count > 1 else "1 token" for count in tokens)
    )
    for what, curve in rows:
        shape = " x ".join(map(str, curve.shape))
        times = [_ms(curve.seconds(count)) for count in tokens]
        table.add_row(what, curve.format, shape, format_bytes(curve.weight_bytes), *times)
    yield table
    table = _table(f"{tier}, beside products", "")
    for count, layer_s in zip(compute.layer_overhead.at, compute.layer_overhead.seconds, strict=True):
        table.add_row(f"a layer, tokens: {count}", _ms(layer_s))
    table.add_row("each expert of an event", _ms(compute.expert_overhead_s))
    table.add_row("a pass", _ms(compute.pass_overhead_s))
    table.add_row("computing while reading", f"x {compute.reading_slowdown:.2f}")
    table.add_row("reading while computing", f"x {compute.computing_slowdown:.2f}")
    yield table


def _table(*columns: str) -> Table:
    table = Table(columns[0], box=None, header_style="dim")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


@contextmanager
def _steps() -> Iterator[Any]:
    """Shows, on a terminal's standard error, the step told to the function it gives."""
    with terminal.console().status("") as status:
        yield status.update
