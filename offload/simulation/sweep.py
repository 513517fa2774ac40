"""Many replays, one after the other or on all cores, which can be stopped and go on where they were.

The rows of every finished task are given out at once, and appended to a file of JSON lines; a row that is there already
is not made again.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cache.errors import OffloadError, PolicyError
from cache.traces.trace import Trace
from offload.simulation.compare import replay_one
from offload.simulation.rows import Row, Setting
from offload.system.processes import processes


class AnyTask(Protocol):
    """Something to replay at several capacities, with a row for each. It can be sent to another process."""

    @property
    def trace(self) -> str:
        """The trace's file."""

    @property
    def capacities(self) -> tuple[str, ...]:
        """As they were asked for."""

    @property
    def setting(self) -> Setting:
        """What it shares with others."""

    @property
    def title(self) -> str:
        """What a progress bar says."""

    @property
    def facts(self) -> Any:
        """What tells it from other tasks with this trace and this setting, as JSON."""

    @property
    def row(self) -> type[Any]:
        """The dataclass of its rows, which has `as_dict`."""

    def run(self) -> list[Any]:
        """The rows. Raises OffloadError."""


@dataclass(frozen=True)
class Task:
    """One policy with its parameters on one trace, at every capacity."""

    trace: str
    policy: str
    capacities: tuple[str, ...]
    setting: Setting

    row = Row

    @property
    def title(self) -> str:
        """What a progress bar says."""
        return f"{Path(self.trace).name}: {self.policy}"

    @property
    def facts(self) -> Any:
        """What tells it from other tasks with this trace and this setting."""
        return self.policy

    def run(self) -> list[Row]:
        """The rows, in a process of its own or not. Raises OffloadError."""
        return replay_one(Trace.open(self.trace), self.policy, self.capacities, self.setting)


def grid(spec: str) -> list[str]:
    """Every policy that `spec` stands for: a parameter given as a list is a choice, as in `hobbit(lfu=[0.2, 0.5])`.

    Raises PolicyError for what cannot be read.
    """
    name, bracket, _ = spec.partition("(")
    if not bracket:
        return [spec]
    try:
        call = ast.parse(f"_({spec[len(name) + 1 :]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        choices = []
        for word in call.keywords:
            value = ast.literal_eval(word.value)
            choices.append([(word.arg, one) for one in (value if isinstance(value, list) else [value])])
    except (SyntaxError, ValueError):
        raise PolicyError(f'cannot read the grid "{spec}": write it as name(key=[value, value], key=value)') from None
    return [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in chosen)})" for chosen in itertools.product(*choices)
    ]


def sweep(
    tasks: Sequence[AnyTask],
    jobs: int | None = None,
    store: Path | None = None,
    begins: Callable[[AnyTask], object] = lambda task: None,
) -> Iterator[tuple[int, list[Any]]]:
    """Run `tasks` in `jobs` processes (default: one a core): which of them is done, and its rows, as they come.

    `store` is a file of JSON lines that finished rows are appended to, and taken from the next time, if the trace, the
    policy or preset, and the setting are the same. `begins` is told of each task that this process runs itself. Raises
    OffloadError for the first task that fails, after which the rows of those that did not are in the store.
    """
    stored = _read(store) if store is not None else {}
    # By what tells them apart: a task whose setting has a machine cannot be a key itself.
    numbers: dict[tuple[str, ...], list[int]] = {}
    for number, task in enumerate(tasks):
        numbers.setdefault(tuple(_key(task, capacity) for capacity in task.capacities), []).append(number)
    waiting = []
    for keys, places in numbers.items():
        task = tasks[places[0]]
        if all(key in stored for key in keys):
            yield from ((number, [_row(task, stored[key], store) for key in keys]) for number in places)
        else:
            waiting.append(task)
    for task, rows in _run(waiting, jobs, begins):
        keys = tuple(_key(task, capacity) for capacity in task.capacities)
        if store is not None:
            with store.open("a", encoding="utf-8") as file:
                for key, row in zip(keys, rows, strict=True):
                    file.write(json.dumps({"key": key, "row": row.as_dict()}) + "\n")
        yield from ((number, rows) for number in numbers[keys])


def _run(
    tasks: Sequence[AnyTask], jobs: int | None, begins: Callable[[AnyTask], object]
) -> Iterator[tuple[AnyTask, list[Any]]]:
    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        for task in tasks:
            begins(task)
            yield task, task.run()
        return
    with processes(workers) as pool:
        futures = {pool.submit(task.run): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _key(task: AnyTask, capacity: str) -> str:
    """What a row depends on. A trace is known by its file's size and time, as `make` would."""
    status = Path(task.trace).stat()
    setting = task.setting
    machine = None if setting.machine is None else setting.machine.as_dict()
    facts = {**setting.__dict__, "machine": machine}
    return json.dumps([task.trace, status.st_size, status.st_mtime_ns, task.facts, capacity, facts], sort_keys=True)


def _row(task: AnyTask, values: Any, store: Path | None) -> Any:
    """A row that was stored. Raises OffloadError."""
    try:
        return task.row(**values)
    except TypeError as error:
        raise OffloadError(f"{store}: not rows of a sweep: name another file") from error


def _read(store: Path) -> dict[str, Any]:
    """The rows in `store`. What a kill cut short at its end is cut off: it is made again."""
    rows: dict[str, Any] = {}
    if not store.exists():
        return rows
    text = store.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(store, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            rows[entry["key"]] = entry["row"]
        except (ValueError, KeyError, TypeError) as error:
            raise OffloadError(f"{store}, line {number}: not a row of a sweep: name another file") from error
    return rows
