"""One case of peers/bench.py: engines that take turns in memory cgroups of the same size, and what they did."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from offload.system.sizes import format_bytes
from scripts.bench.common import BenchmarkError, medians, note, turns
from scripts.bench.serve import Answer
from scripts.bench.storage import beside_disk, drop_page_cache, shards
from scripts.bench.workers import EngineError, Worker
from scripts.peers.engines import AIRLLM, GGUF_TYPES, NOT_ROUTED, Files, Group, Pythons, Settings

_SPARE_BYTES = 1 << 30  # left to the rest of the machine
_PROCESS_BYTES = 1 << 30  # what an engine with everything in RAM takes beside its weights


@dataclass(frozen=True)
class Tokens:
    """The ids that every engine is fed: a warm-up, then a window for each repetition, then prompts, as often.

    `visits` are prompts that between them visit every expert: they make ours resident where everything is to be.
    """

    warm_up: list[int]
    windows: list[list[int]]
    prompts: list[list[int]]
    visits: list[list[int]]
    at_most_s: float  # a window ends early for an engine that takes longer
    trace: Path | None = None  # its sequences route, the first of them the warm-up

    @property
    def context(self) -> int:
        """Room for the longest of them and a reply, which is as long up to 256 tokens."""
        longest = max(map(len, (self.warm_up, *self.prompts, *self.windows, *self.visits)))
        return longest + min(longest, 256)

    def window(self, number: int) -> dict[str, Any]:
        """The request of a repetition."""
        return {"ids": self.windows[number], "at_most_s": self.at_most_s} | self.routed(number + 1)

    def routed(self, sequence: int) -> dict[str, Any]:
        """What a request says of the trace."""
        return {} if self.trace is None else {"trace": str(self.trace), "first_sequence": sequence}


@dataclass(frozen=True)
class Case:
    """Who takes part, on what, in how much memory: `settings.memory_bytes`, or everything in RAM."""

    group: Group
    files: Files
    pythons: Pythons
    tokens: Tokens
    settings: Settings

    @property
    def resident(self) -> bool:
        return self.settings.memory_bytes is None

    @property
    def described(self) -> str:
        """It in words."""
        ram = "everything in RAM" if self.resident else f"{format_bytes(self.settings.memory_bytes or 0)} of RAM"
        parts = [self.files.shape, f"{self.files.family.layers} layers", self.group.name, ram]
        return ", ".join([*parts, self.pythons.level, *(["routed by the trace"] if self.tokens.trace else [])])

    @property
    def engine_bytes(self) -> int:
        """What one engine may take."""
        return self.settings.memory_bytes or self.files.model_bytes(self.group.bits) + _PROCESS_BYTES


@dataclass
class Record:
    """What one engine did, or why it could not."""

    windows: list[Answer] = field(default_factory=list)
    prompts: dict[int, list[Answer]] = field(default_factory=dict)  # by their lengths
    unable: str | None = None
    peak_bytes: int | None = None  # its cgroup's, page cache included; with everything in RAM the process's own

    def tokens_per_s(self) -> list[float]:
        """Of each repetition."""
        return [len(answer["seconds"]) / sum(answer["seconds"]) for answer in self.windows]

    def prefills(self, tokens: int) -> list[float]:
        """Tokens/s of each reading of the prompt of so many tokens."""
        return [tokens / sum(answer["seconds"]) for answer in self.prompts.get(tokens, [])]


class Engine:
    """An engine's worker: it takes part until it fails once."""

    def __init__(self, name: str, record: Record, case: Case, limit_bytes: int | None) -> None:
        self.name, self.record = name, record
        command = case.files.command(name, case.pythons, case.settings)
        self._stack = ExitStack()
        self._worker = self._stack.enter_context(Worker(name, command, limit_bytes))

    def ask(self, **request: Any) -> Answer | None:
        """Its answer; None when it cannot, which ends it."""
        if self.record.unable:
            return None
        try:
            return self._worker.ask(**request)
        except EngineError as error:
            note(str(error))
            self.record.unable = error.why
            self.close()
            return None

    def close(self) -> None:
        """End it, if it has not ended, and note its peak."""
        if self.record.peak_bytes is None:
            usage = self._worker.usage()
            self.record.peak_bytes = usage.peak_bytes if usage else self._worker.resident_peak_bytes()
        self._stack.close()


def available_bytes() -> int:
    """What engines may take together."""
    return int(psutil.virtual_memory().available) - _SPARE_BYTES


def reference(case: Case) -> Record:
    """transformers with everything resident, in what memory there is: what every engine should choose."""
    record = Record()
    note("the reference: transformers with everything resident")
    drop_page_cache(case.files.all())
    engine = Engine("transformers", record, case, None if case.resident else available_bytes())
    try:
        for number in range(len(case.tokens.windows)):
            if answer := engine.ask(**case.tokens.window(number)):
                record.windows.append(answer)
    finally:
        engine.close()
    drop_page_cache(case.files.all())
    return record


def measure(case: Case, unable: dict[str, str]) -> tuple[dict[str, Record], list[float]]:
    """Load every engine, let them take turns: (their records, the disk's bytes/s beside each of our repetitions, none
    with everything in RAM).

    `unable` are the engines that cannot run, and why. Raises BenchmarkError where memory for all of them is missing.
    """
    group, tokens = case.group, case.tokens
    records = {name: Record(unable=unable.get(name)) for name in group.engines}
    if tokens.trace is not None:
        for name in group.engines:
            if name in GGUF_TYPES or name == AIRLLM:
                records[name].unable = NOT_ROUTED
    able = [name for name in group.engines if records[name].unable is None]
    _need_memory(case, able)
    engines: list[Engine] = []
    drop_page_cache(case.files.all())
    with ExitStack() as stack:
        for name in able:
            drop_page_cache(shards(case.files.checkpoint))  # what others read is no cache on this one's account
            engines.append(Engine(name, records[name], case, case.settings.memory_bytes))
            stack.callback(engines[-1].close)
            for ids in tokens.visits if case.resident and name == group.ours else ():  # others load everything at once
                engines[-1].ask(ids=ids, prefill=True)
            engines[-1].ask(ids=tokens.warm_up, at_most_s=3 * tokens.at_most_s, **tokens.routed(0))
        speeds = _turns(engines, case)
        for ids in tokens.prompts:
            for number, engine in turns(engines, len(tokens.windows)):
                if answer := engine.ask(ids=ids, prefill=True, **tokens.routed(len(tokens.windows) + number + 1)):
                    engine.record.prompts.setdefault(len(ids), []).append(answer)
                    speed = engine.record.prefills(len(ids))[-1]
                    note(f"prompt of {len(ids)}, repetition {number + 1}: {engine.name} {speed:.1f} tokens/s")
    return records, speeds


def _need_memory(case: Case, able: Sequence[str]) -> None:
    """Raises BenchmarkError where the engines do not fit beside each other."""
    # One that is resident or nothing does not live to see the others where it does not fit.
    fits = case.engine_bytes > case.files.model_bytes(case.group.bits)
    staying = [name for name in able if name != "transformers" or fits]
    if case.engine_bytes * len(staying) > available_bytes():
        raise BenchmarkError(
            f"{len(staying)} engines with {format_bytes(case.engine_bytes)} each need more than the "
            f"{format_bytes(available_bytes())} that are free: choose "
            + ("fewer --layers or --peers" if case.resident else "a smaller --fractions")
        )


def _turns(engines: Sequence[Engine], case: Case) -> list[float]:
    """Every repetition of everybody; the disk's speed beside each of ours, which reads nothing with all in RAM."""
    speeds = []
    names, record_bytes = shards(case.files.checkpoint), case.files.expert_bytes(case.group.bits)
    total_bytes = min(1 << 28, case.files.model_bytes(16))
    for number, engine in turns(engines, len(case.tokens.windows)):
        ask = partial(engine.ask, **case.tokens.window(number))
        if engine.name == case.group.ours and not case.resident:
            answer, speed = beside_disk(names, record_bytes, total_bytes, number, ask)
            speeds += [speed] if answer else []
        else:
            answer = ask()
        if answer:
            engine.record.windows.append(answer)
            note(f"repetition {number + 1}: {engine.name} {engine.record.tokens_per_s()[-1]:.2f} tokens/s")
    return speeds


def our_figures(record: Record, disk: list[float], memory_bytes_per_s: float) -> dict[str, float] | None:
    """What our engine read and touched, beside what the disk and the memory allow; medians. None if it could not run.

    The limit is what a perfect engine with our hit rate would need for a token: its misses at the disk's speed, or all
    its weights at the memory's, whichever takes longer. Without any speed of the disk, 0, only the memory counts.
    """
    rows = []
    speeds = disk or [0.0] * len(record.windows)
    for answer, speed, ours in zip(record.windows, speeds, record.tokens_per_s(), strict=True):
        stats = answer["stats"]
        read = stats["bytes_from_disk"] / len(answer["seconds"])
        touched = stats["touched_bytes_per_token"]
        limit = 1 / max(read / speed if speed else 0.0, touched / memory_bytes_per_s)
        rows.append(
            {
                "hit_rate": stats["hit_rate"],
                "read_bytes_per_token": read,
                "touched_bytes_per_token": touched,
                "disk_bytes_per_s": speed,
                "memory_bytes_per_s": memory_bytes_per_s,
                "limit_tokens_per_s": limit,
                "share_of_limit": ours / limit,
            }
        )
    return medians(rows) if rows else None
