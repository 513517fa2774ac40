"""A machine profile for people: tables, and plots made of characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from math import log2

from rich.table import Table

from cache.types import Tier
from offload.costs.machine import ComputeProfile, CopyTime, MachineProfile, ProductCurve
from offload.system.sizes import format_bytes

_WIDTH, _HEIGHT = 56, 10
_MARKS = "●○▲△■□"

Points = Sequence[tuple[int, float]]


def profile_tables(profile: MachineProfile) -> Iterator[Table]:
    """Reads from disk, memory and link, then each tier's experts by tokens and its other figures."""
    disk = profile.disk
    table = _table("disk, by the runtime", "alone", "streamed", "rate")
    for nbytes, alone_s, streamed_s in zip(disk.alone.at, disk.alone.seconds, disk.streamed.seconds, strict=True):
        table.add_row(format_bytes(nbytes), _ms(alone_s), _ms(streamed_s), _rate(nbytes / streamed_s))
    yield table
    threads = sorted({block.threads for block in disk.blocks})
    rates = {(block.block_bytes, block.threads): block.bytes_per_s for block in disk.blocks}
    table = _table("disk, direct reads", *(_count(n, "thread") for n in threads))
    for nbytes in sorted({block.block_bytes for block in disk.blocks}):
        table.add_row(format_bytes(nbytes), *(_rate(rates.get((nbytes, n))) for n in threads))
    yield table
    table = _table("memory", "rate", "latency")
    table.add_row("read", _rate(profile.host_read_bytes_per_s), "")
    table.add_row("copy, one thread", _rate(profile.host_copy_bytes_per_s), "")
    for name, rate in profile.packing_bytes_per_s.items():
        table.add_row(f"packing {name}, one thread", _rate(rate), "")
    table.add_row("handing work to a thread and back", "", _ms(profile.cpu_start_s))
    if profile.link is not None:
        link = profile.link
        _add_copy(table, "link, pinned memory", link.pinned)
        _add_copy(table, "link, pinned, CPU computing", link.pinned_computing)
        _add_copy(table, "link, pageable memory", link.pageable)
        _add_copy(table, "link, pageable, CPU computing", link.pageable_computing)
    yield table
    for tier, compute in profile.compute.items():
        yield from _compute_tables(tier.value, compute)


def profile_plots(profile: MachineProfile) -> Iterator[str]:
    """What the disk gives by block size, and what an expert takes by tokens, on logarithmic axes."""
    blocks = profile.disk.blocks
    yield plot(
        "disk, direct reads: bytes/s by block size",
        {
            _count(n, "thread"): [(b.block_bytes, b.bytes_per_s) for b in blocks if b.threads == n]
            for n in sorted({block.threads for block in blocks})
        },
        format_bytes,
        lambda rate: f"{format_bytes(int(rate))}/s",
    )
    for tier in (Tier.CPU, Tier.GPU):
        if tier not in profile.compute:
            continue
        experts = profile.compute[tier].experts
        fullest = max(experts, key=lambda curve: (len(curve.seconds.at), curve.threads))
        shape, threads = fullest.shape, fullest.threads
        yield plot(
            f"{tier.value}: an expert of {shape[0]} x {shape[1]}, ms by tokens",
            {
                curve.format: list(zip(curve.seconds.at, curve.seconds.seconds, strict=True))
                for curve in experts
                if curve.shape == shape and curve.threads == threads
            },
            str,
            lambda seconds: f"{1e3 * seconds:.2g} ms",
        )


def plot(
    title: str, series: Mapping[str, Points], x_label: Callable[[int], str], y_label: Callable[[float], str]
) -> str:
    """`series` of positive numbers as a plot of characters, both axes logarithmic; where two meet, the first shows."""
    points = [point for each in series.values() for point in each]
    left, right = (log2(end(x for x, _ in points)) for end in (min, max))
    low, high = (log2(end(y for _, y in points)) for end in (min, max))
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    marks = dict(zip(series, cycle(_MARKS), strict=False))
    for name, each in reversed(list(series.items())):
        for x, y in each:
            column = round((log2(x) - left) / ((right - left) or 1) * (_WIDTH - 1))
            row = round((log2(y) - low) / ((high - low) or 1) * (_HEIGHT - 1))
            rows[-1 - row][column] = marks[name]
    ends = {0: y_label(2**high), _HEIGHT - 1: y_label(2**low)}
    margin = max(map(len, ends.values()))
    first, last = x_label(round(2**left)), x_label(round(2**right))
    return "\n".join(
        [
            title,
            *(f"{ends.get(i, ''):>{margin}} │{''.join(row)}" for i, row in enumerate(rows)),
            f"{'':{margin}} └{'─' * _WIDTH}",
            f"{'':{margin}}  {first}{last:>{_WIDTH - len(first)}}",
            f"{'':{margin}}  {'   '.join(f'{mark} {name}' for name, mark in marks.items())}",
        ]
    )


def _compute_tables(tier: str, compute: ComputeProfile) -> Iterator[Table]:
    rows = [("expert", curve) for curve in compute.experts] + [("dense", curve) for curve in compute.dense]
    tokens = sorted({count for _, curve in rows for count in curve.seconds.at})
    name = f"{tier} ({compute.device}, threads: {compute.threads})"
    table = _table(name, "format", "shape", "size", "threads", *(_count(count, "token") for count in tokens))
    for what, curve in rows:
        shape = " x ".join(map(str, curve.shape))
        times = [_by_tokens(curve, count) for count in tokens]
        table.add_row(what, curve.format, shape, format_bytes(curve.weight_bytes), str(curve.threads), *times)
    if any(curve.extrapolated for _, curve in rows):
        table.caption = "~ estimated: to measure it would have taken too long"
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


def _add_copy(table: Table, name: str, copy: CopyTime) -> None:
    table.add_row(name, _rate(copy.bytes_per_s), _ms(copy.latency_s))


def _by_tokens(curve: ProductCurve, tokens: int) -> str:
    if tokens not in curve.seconds.at:
        return ""
    return f"{'~' if tokens in curve.extrapolated else ''}{_ms(curve.seconds(tokens))}"


def _rate(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f"{format_bytes(int(bytes_per_s))}/s"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
