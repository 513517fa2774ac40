"""A grid of replays on all cores, which can be stopped and goes on where it was.

Every finished policy's rows are appended to a file of JSON lines at once; a row that is there already is not made
again.
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
from typing import Any

from cache.errors import OffloadError, PolicyError
from cache.traces.trace import Trace
from offload.simulation.compare import replay_one
from offload.simulation.rows import Row, Setting
from offload.system.processes import processes


@dataclass(frozen=True)
class Task:
    """One policy with its parameters on one trace, at every capacity."""

    trace: str
    policy: str
    capacities: tuple[str, ...]
    setting: Setting

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
    tasks: Sequence[Task],
    jobs: int | None = None,
    store: Path | None = None,
    done: Callable[[int], object] | None = None,
) -> list[Row]:
    """Run `tasks` in `jobs` processes (default: one a core); the rows in the order of the tasks.

    `store` is a file of JSON lines that finished rows are appended to, and taken from the next time, if the trace, the
    policy and the setting are the same. `done` is told after each task how many rows there are. Raises OffloadError for
    the first task that fails, after which the rows of those that did not are in the store.
    """
    stored = _read(store) if store is not None else {}
    # By what tells them apart: a task whose setting has a machine cannot be a key itself.
    names = [tuple(_key(task, capacity) for capacity in task.capacities) for task in tasks]
    results: dict[tuple[str, ...], list[Row]] = {}
    waiting = []
    for keys, task in dict(zip(names, tasks, strict=True)).items():
        if all(key in stored for key in keys):
            results[keys] = [stored[key] for key in keys]
        else:
            waiting.append(task)
    if done is not None:
        done(len(results))
    for task, rows in _run(waiting, jobs):
        keys = tuple(_key(task, capacity) for capacity in task.capacities)
        results[keys] = rows
        if store is not None:
            with store.open("a", encoding="utf-8") as file:
                for key, row in zip(keys, rows, strict=True):
                    file.write(json.dumps({"key": key, "row": row.as_dict()}) + "\n")
        if done is not None:
            done(len(results))
    return [row for keys in names for row in results[keys]]


def _run(tasks: Sequence[Task], jobs: int | None) -> Iterator[tuple[Task, list[Row]]]:
    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task, task.run()
        return
    with processes(workers) as pool:
        futures = {pool.submit(task.run): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _key(task: Task, capacity: str) -> str:
    """What a row depends on. A trace is known by its file's size and time, as `make` would."""
    status = Path(task.trace).stat()
    setting = task.setting
    machine = None if setting.machine is None else setting.machine.as_dict()
    facts = {**setting.__dict__, "machine": machine}
    return json.dumps([task.trace, status.st_size, status.st_mtime_ns, task.policy, capacity, facts], sort_keys=True)


def _read(store: Path) -> dict[str, Row]:
    """The rows in `store`. What a kill cut short at its end is cut off: it is made again."""
    rows: dict[str, Row] = {}
    if not store.exists():
        return rows
    text = store.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(store, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            rows[entry["key"]] = Row(**entry["row"])
        except (ValueError, KeyError, TypeError) as error:
            raise OffloadError(f"{store}, line {number}: not a row of a sweep: name another file") from error
    return rows
