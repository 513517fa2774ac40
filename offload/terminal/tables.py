"""Figures of a run for people: a reply's status line, its counters, a plan, speeds predicted beside measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from offload.stats import precision_shares as shares_of
from offload.system.sizes import format_bytes
from offload.terminal.console import answers, dim, stderr

if TYPE_CHECKING:
    from offload.costs.machine import MachineProfile
    from offload.costs.moe_lens import MoeLensBound
    from offload.plan.budgets import Plan
    from offload.simulation.forecast import Speeds
    from offload.talk.reply import Reply
    from offload.tuning.trials import Trial

_ENDINGS = {"length": " (cut at the limit)", "interrupted": " (stopped)"}


def report(reply: Reply, full: bool = False) -> None:
    """The status line of a reply, or with `full` every counter, on standard error."""
    if full:
        stderr().print(stats_table(reply.stats))
    else:
        dim(status_line(reply))


def status_line(reply: Reply) -> str:
    """Tokens, tokens/s, hit rate and memory against budget, in one line."""
    stats = reply.stats
    parts = [f"{len(reply.token_ids)} tokens{_ENDINGS.get(reply.finish, '')}"]
    if stats["decode_tokens_per_s"]:
        parts.append(f"{stats['decode_tokens_per_s']:.1f} tok/s")
    parts.append(f"hit rate {stats['hit_rate']:.0%}")
    shares = precision_shares(stats)
    if len(shares) > 1:
        parts.append(", ".join(f"{precision} {share:.0%}" for precision, share in shares.items()))
    ram, gpu = stats["cpu_mem_bytes"], stats["gpu_mem_bytes"]
    if reply.device == "emulated":  # its memory is host memory, and counts there too
        ram += gpu
    parts.append(f"RAM {format_bytes(stats['peak_rss_bytes'])} of {format_bytes(ram)}")
    if gpu is not None:
        parts.append(f"GPU {format_bytes(stats['peak_gpu_bytes'])} of {format_bytes(gpu)}")
    return " · ".join(parts)


def precision_shares(stats: Mapping[str, Any]) -> dict[str, float]:
    """Of all expert uses, the share at each precision; "skipped" and "dropped" where a fallback left experts out."""
    return shares_of(stats["precision_uses"], stats.get("dropped_share", 0.0))


def stats_table(stats: Mapping[str, Any]) -> Table:
    """Every counter of `Stats.as_dict()`, a row each; the tiers' counters are "gpu.hits" and so on."""
    table = Table("statistic", "value", box=None, header_style="dim")
    table.columns[1].justify = "right"
    for name, value in stats.items():
        if name == "precision_uses":
            for precision, share in precision_shares(stats).items():
                table.add_row(f"computed at {precision}", f"{share:.1%}")
        elif isinstance(value, Mapping):
            for tier, counters in value.items():
                for counter, count in counters.items():
                    table.add_row(f"{tier}.{counter}", _value(counter, count))
        else:
            table.add_row(name, _value(name, value))
    return table


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if "bytes" in name:
        return format_bytes(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def show(tables: Iterable[Table], machine: MachineProfile | None) -> None:
    """Print `tables`, and below each of them a line if their seconds are those of a machine that nobody measured."""
    for table in tables:
        answers().print(table)
        if machine is not None and machine.estimated is not None:
            answers().print(f"estimated: {machine.estimated}", soft_wrap=True)


def plan_table(plan: Plan) -> Table:
    """The rows of a plan: what, on which tier, how large, and why; then each tier's sum and budget."""
    table = Table("what", "where", "size", "", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for what, tier, size, note in plan.rows():
        table.add_row(what, tier, format_bytes(size), note)
    for tier, budget in (("gpu", plan.gpu_mem_bytes), ("cpu", plan.cpu_mem_bytes)):
        if budget is not None:
            total = sum(size for _, where, size, _ in plan.rows() if where == tier)
            table.add_row("sum", tier, format_bytes(total), f"of a budget of {format_bytes(budget)}")
    if plan.download_bytes:
        table.add_row("to download", "disk", format_bytes(plan.download_bytes), "")
    return table


def trials_table(title: str, trials: Sequence[Trial]) -> Table:
    """A row a composition, in the order given."""
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("preset")
    columns = ("tokens/s", "predicted", "hit rate", "predicted", "peak RAM", "peak GPU", "lossless")
    for column in columns:
        table.add_column(column, justify="right")
    for number, trial in enumerate(trials, 1):
        found, said = trial.actual, trial.predicted
        speed = None if found is None else found.decode_tokens_per_s
        table.add_row(
            str(number),
            trial.preset.name,
            "" if speed is None else f"{speed:,.2f}",
            "" if said is None else f"{said.tokens_per_s:,.2f}",
            "" if found is None or found.hit_rate is None else f"{found.hit_rate:.1%}",
            "" if said is None else f"{said.hit_rate:.1%}",
            "" if found is None else format_bytes(found.peak_rss_bytes or 0),
            "" if found is None or found.peak_gpu_bytes is None else format_bytes(found.peak_gpu_bytes),
            "yes" if trial.preset.lossless else "no" if said is None else f"{said.lossless_share:.1%}",
        )
    return table


def speeds_table(predicted: Speeds | None, actual: Speeds | None) -> Table:
    """A row a figure; how far a rate was off, as a share of what was measured."""
    table = Table("", box=None, header_style="dim")
    for column in (*(["predicted"] if predicted else []), *(["actual", "error"] if actual else [])):
        table.add_column(column, justify="right")
    some = predicted or actual
    for name in asdict(some) if some is not None else ():
        said, found = (None if speeds is None else getattr(speeds, name) for speeds in (predicted, actual))
        if said is None and found is None:
            continue
        error = f"{said / found - 1:+.0%}" if said and found and "hit_rate" not in name else ""
        cells = (*([_show(name, said)] if predicted else []), *([_show(name, found), error] if actual else []))
        table.add_row(_NAMES[name], *cells)
    return table


def bound_line(bound: MoeLensBound, measured: float) -> str:
    """The bound by name, what it goes by, and which share of it was measured."""
    return (
        f"MoE-Lens' bound (arXiv 2504.09345): {bound.tokens_per_s:,.1f} tokens/s, prompts included, at "
        f"p = {bound.prompt_tokens}, g = {bound.tokens}, {bound.kv_tokens:,} tokens of KV cache, and "
        f"{bound.pass_s:.3g} s a pass to read {format_bytes(bound.model_bytes)} at "
        f"{format_bytes(int(bound.bytes_per_s))}/s; measured {measured:,.1f}, {measured / bound.tokens_per_s:.1%} of it"
    )


_NAMES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "time_to_first_token_s": "time to first token",
    "hit_rate": "hit rate, decode",
    "host_hit_rate": "hit rate in RAM behind it",
    "peak_rss_bytes": "peak RAM",
    "peak_gpu_bytes": "peak accelerator memory",
}


def _show(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return format_bytes(int(value))
    if "hit_rate" in name:
        return f"{value:.1%}"
    return f"{value:.2f} s" if name.endswith("_s") and "per_s" not in name else f"{value:.1f}"
