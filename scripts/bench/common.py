"""What benchmarks share: arguments, turns, medians, tables, and the line that says what they ran on."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.table import Table

from cache.errors import OffloadError
from offload.system.sizes import format_bytes, parse_bytes
from scripts.bench.machine import default_threads, machine, machine_line

T = TypeVar("T")
Args = argparse.Namespace
Result = dict[str, Any]
"""What a benchmark finds, as JSON has it; and one row of it."""
Row = Mapping[str, Any]

POSITIONAL = {
    "checkpoint": "a folder that scripts/bench/make_checkpoint.py wrote",
    "trace": "a recorded routing trace (docs/traces.md)",
}
SHARED = {
    "tokens": "measured tokens a repetition",
    "warm_up": "tokens before the first",
    "prompt": "tokens of the prompt",
    "repetitions": "of each, in turn",
    "threads": "that compute, of each engine",
    "disk_bytes": "read to time the disk",
}
QUICK = {"repetitions": 2, "tokens": 8, "warm_up": 8}
"""What --quick sets, where it is less."""


class BenchmarkError(OffloadError):
    """An engine died or the machine cannot run this benchmark."""


def size(text: str) -> int:
    """The type of an option that takes bytes, such as 4G."""
    try:
        return parse_bytes(text)
    except OffloadError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Arguments:
    """The command line of a benchmark: the options that many have, by their defaults, and its own."""

    def __init__(self, doc: str | None, *positional: str, quick: Row = QUICK, **shared: int | None) -> None:
        self._parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
        self._quick, self._defaults = quick, dict(shared)
        for name in positional:
            self.positional(name, POSITIONAL[name], type=Path)
        for name, default in shared.items():
            said = "all cores" if default is None else default
            help = f"{SHARED[name]} (default: {said})"
            self._parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=help)
        self._parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs")
        self._parser.add_argument("--json", action="store_true", help="the line of JSON alone, without progress")

    def positional(self, name: str, help: str, **how: Any) -> None:
        """An argument without a flag."""
        self._parser.add_argument(name, help=help, **how)

    def option(self, flag: str, default: Any, help: str, **how: Any) -> None:
        """An option; the default's type is its type, unless `how` says, and is told in its help."""
        several = isinstance(default, (list, tuple))
        if several:
            how = {"nargs": "+", "type": type(default[0])} | how
        elif default is False:
            how = {"action": "store_true"} | how
        elif "type" not in how and default is not None:
            how = {"type": type(default)} | how
        if default not in (None, False, ""):
            help += f" (default: {' '.join(map(str, default)) if several else default})"
        self._parser.add_argument(flag, default=default, help=help, **how)

    def parse(self, argv: Sequence[str] | None = None) -> Args:
        """The arguments, defaults filled in."""
        args = self._parser.parse_args(argv)
        for name, default in self._defaults.items():
            if getattr(args, name) is None:
                value = default_threads() if default is None else default
                setattr(args, name, min(value, self._quick.get(name, value)) if args.quick else value)
        return args

    def error(self, why: str) -> NoReturn:
        """End the program: these arguments make no sense."""
        self._parser.error(why)

    def run(self, benchmark: Callable[[Args], Result], argv: Sequence[str] | None = None) -> int:
        """Parse, run, and print the result with the arguments and the machine as one line of JSON, the last one.

        Returns the exit code.
        """
        return run(benchmark, self.parse(argv))


def run(benchmark: Callable[[Args], Result], args: Args) -> int:
    """Run `benchmark` with `args` and print its result; a mistake is one line and exit code 2."""
    name = Path(benchmark.__code__.co_filename).stem
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere) if args.json else nullcontext():
            result = benchmark(args)
            note(machine_line())
    except OffloadError as error:
        note(f"error: {error}")
        return 2
    said = {"benchmark": name, **vars(args), **result, "machine": machine()}
    print(json.dumps(said, default=lambda value: value.name if isinstance(value, Path) else str(value)))
    return 0


def note(text: str) -> None:
    """A line about progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def turns(names: Iterable[T], repetitions: int) -> Iterator[tuple[int, T]]:
    """(repetition, name): all of them in each repetition, in the opposite order every other time."""
    order = list(names)
    for repetition in range(repetitions):
        for name in order if repetition % 2 == 0 else reversed(order):
            yield repetition, name


def in_turn(names: Iterable[T], repetitions: int, window: Callable[[T, int], Result]) -> dict[T, list[Result]]:
    """The rows that `window` gives for a name and a repetition, by name; notes tell their first figures."""
    rows: dict[T, list[Result]] = {name: [] for name in names}
    for repetition, name in turns(rows, repetitions):
        row = window(name, repetition)
        rows[name].append(row)
        column, value = next(iter(row.items()))
        note(f"repetition {repetition + 1}, {name}: {cell(column, value)} {column.replace('_', ' ')}")
    return rows


def take_turns(
    ways: Mapping[T, Callable[[], float]], repetitions: int, *, warm_up: bool = True
) -> dict[T, list[float]]:
    """What each of `ways` measures, repetition by repetition; to `warm_up`, after once that does not count."""
    if warm_up:
        for way in ways.values():
            way()
    measured: dict[T, list[float]] = {name: [] for name in ways}
    for _, name in turns(ways, repetitions):
        measured[name].append(ways[name]())
    return measured


def timed(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """`action`, as a measurement of its seconds."""

    def measure() -> float:
        began = clock()
        action()
        return clock() - began

    return measure


def medians(rows: Sequence[Row]) -> dict[str, float]:
    """The median of each column."""
    return {key: median(row[key] for row in rows) for key in rows[0]}


def summary(rows: Mapping[T, Sequence[Row]]) -> dict[T, dict[str, float]]:
    """The medians of what `in_turn` gives, by name; and a table of them."""
    found = {name: medians(own) for name, own in rows.items()}
    show(found)
    return found


def ratio(values: Iterable[float], others: Iterable[float]) -> float:
    """The median of `values` over `others`, one by one."""
    return median(a / b for a, b in zip(values, others, strict=True))


def ratio_of(column: str, rows: Iterable[Row], others: Iterable[Row]) -> float:
    """The same of one column of `rows` and of `others`."""
    return ratio((row[column] for row in rows), (row[column] for row in others))


def show(rows: Mapping[Any, Row], title: str = "", columns: Iterable[str] = ()) -> None:
    """A table on standard error: a line for each of `rows`, its name in front; all `columns` by default but lists."""
    found = dict.fromkeys(key for row in rows.values() for key, value in row.items() if not isinstance(value, list))
    shown = [column for column in columns or found if column in found]
    table = Table("", *(column.replace("_", " ") for column in shown), title=title, title_justify="left")
    for name, row in rows.items():
        table.add_row(str(name), *(cell(column, row.get(column)) for column in shown))
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)


def cell(column: str, value: Any) -> str:
    """A value as a table has it: sizes with their unit, three digits of other numbers."""
    if value is None:
        return "-"
    if not isinstance(value, float | int) or isinstance(value, bool):
        return str(value)
    if "bytes" in column:
        return format_bytes(int(value)) + ("/s" if column.endswith("_per_s") else "")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table for the documentation."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    """`count` token ids, fixed by `seed`: unlike a random model's own text, they keep on changing experts."""
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


def vocabulary(checkpoint: Path) -> int:
    """How many tokens its model knows."""
    return int(json.loads((checkpoint / "config.json").read_text())["vocab_size"])


def ids_for(checkpoint: Path, count: int, seed: int) -> list[int]:
    """`count` random ids of the tokens that its model knows."""
    return random_ids(count, vocabulary(checkpoint), seed)


def warm_prompts(checkpoint: Path, tokens: int) -> list[list[int]]:
    """Prompts of so many tokens that between them visit every expert."""
    return [ids_for(checkpoint, tokens, seed) for seed in range(12)]


def windows(args: Args) -> tuple[list[int], list[list[int]]]:
    """Token ids to feed: those that warm up, and those of each repetition."""
    ids = ids_for(args.checkpoint, args.warm_up + args.tokens * args.repetitions, 0)
    return ids[: args.warm_up], [ids[i : i + args.tokens] for i in range(args.warm_up, len(ids), args.tokens)]
