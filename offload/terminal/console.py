"""What the terminal looks like: one-line errors and warnings, the status line, tables, and quiet libraries.

Answers go to standard output, everything about them to standard error.
"""

from __future__ import annotations

import _thread
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from offload.system.sizes import format_bytes

if TYPE_CHECKING:
    from offload.plan.budgets import Plan
    from offload.talk.reply import Reply

_PATIENCE_S = 1.0
_OURS = r"(offload|cache|predictors)(\.|$)"
_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
_ENDINGS = {"length": " (cut at the limit)", "interrupted": " (stopped)"}
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def console() -> Console:
    """A console on standard error, where everything but the answer goes."""
    return Console(stderr=True, highlight=False, markup=False)


def answers() -> Console:
    """A console on standard output, as wide as it takes where that is not a terminal."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def notice(message: object) -> None:
    """One line on standard error: "offload: ..."."""
    print(f"offload: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def error(message: object) -> None:
    """One line on standard error: "offload: error: ..."."""
    notice(f"error: {message}")


def warning(message: object) -> None:
    """One line on standard error: "offload: warning: ..."."""
    notice(f"warning: {message}")


def dim(message: str) -> None:
    """One quiet line on standard error."""
    console().print(message, style="dim", soft_wrap=True)


class _WarningLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning(record.getMessage())


def prepare() -> None:
    """Sets this process up as a terminal program; once, before transformers is imported.

    Keeps libraries' warnings, logs and progress bars off the terminal, unless environment variables or
    `python -W` ask for them; our own warnings become one line each. What a stream cannot encode is replaced.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("offload").addHandler(_WarningLines(logging.WARNING))
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("default", module=_OURS)
        warnings.showwarning = _show_warning
    sys.unraisablehook = _deliver_interrupt
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, io.StringIO())
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def steps() -> Iterator[Callable[[str], object]]:
    """Shows, on a terminal's standard error, the step told to the function it gives."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    with console().status("") as status:
        yield status.update


def piped_text() -> str | None:
    """All of standard input if it is not a terminal, saying so if that takes a while; else None."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        return None
    if os.name == "posix" and not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
        notice("waiting for the end of standard input")
    return sys.stdin.read()


def _deliver_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that came while a finalizer ran would be lost there: it comes again, now."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(unraisable)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    warning(message)


@contextmanager
def waiting(what: str) -> Iterator[Any]:
    """Shows `what` with a spinner while the block runs, on a terminal; gives a function to end it early."""
    with console().status(what) as status:
        yield status.stop


def printable(text: str) -> str:
    """`text` without the control characters by which a model's output could steer a terminal."""
    return text.translate(_CONTROL)


class Answer:
    """The answer on standard output, piece by piece; ends its line on exit if anything was written."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._tail = "\n"

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._tail != "\n" and kind is not BrokenPipeError:
            self.write("\n")

    def write(self, text: str) -> None:
        """Shows `text` at once."""
        if text and not self._silent:
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
            self._tail = text[-1]


def report(reply: Reply, full: bool = False) -> None:
    """The status line of a reply, or with `full` every counter, on standard error."""
    if full:
        console().print(stats_table(reply.stats))
    else:
        dim(status_line(reply))


def status_line(reply: Reply) -> str:
    """Tokens, tokens/s, hit rate and memory against budget, in one line."""
    stats = reply.stats
    parts = [f"{len(reply.token_ids)} tokens{_ENDINGS.get(reply.finish, '')}"]
    if stats["decode_tokens_per_s"]:
        parts.append(f"{stats['decode_tokens_per_s']:.1f} tok/s")
    parts.append(f"hit rate {stats['hit_rate']:.0%}")
    if len(stats["precision_uses"]) > 1:
        parts.append(", ".join(f"{precision} {share:.0%}" for precision, share in precision_shares(stats).items()))
    ram, gpu = stats["cpu_mem_bytes"], stats["gpu_mem_bytes"]
    if reply.device == "emulated":  # its memory is host memory, and counts there too
        ram += gpu
    parts.append(f"RAM {format_bytes(stats['peak_rss_bytes'])} of {format_bytes(ram)}")
    if gpu is not None:
        parts.append(f"GPU {format_bytes(stats['peak_gpu_bytes'])} of {format_bytes(gpu)}")
    return " · ".join(parts)


def precision_shares(stats: Mapping[str, Any]) -> dict[str, float]:
    """Of all expert uses, the share at each precision; "skipped" where a fallback left experts out."""
    uses: Mapping[str, int] = stats["precision_uses"]
    total = sum(uses.values()) or 1
    return {precision: count / total for precision, count in uses.items()}


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
