"""Gives the program checkpoints and command lines that are wrong in thousands of ways, and looks what comes of it.

python -m scripts.fuzz_inputs --minutes 30

Allowed are the plain model's answer and a refusal in one line with exit code 2. A traceback, a process that dies, an
answer that never comes and any other answer are findings: each is printed, and its checkpoint kept. Exits with 1 if
there is one. The same seed gives the same inputs; --only runs one of them again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from scripts.fuzz.verdict import Verdict

_LIVES = 150  # inputs that one process runs, so that what one leaves behind does not reach far


class Worker:
    """A process that runs inputs; a new one where the last has died, hung or grown old."""

    def __init__(self, seed: int, originals: Mapping[str, Path], folder: Path, patience: float) -> None:
        self._arguments = seed, originals, folder
        self._patience = patience
        self._process: Any = None
        self._done = 0

    def run(self, number: int) -> tuple[str, Verdict]:
        """What was changed in the input `number`, and what came of it."""
        if self._process is None or self._done >= _LIVES:
            self._start()
        self._done += 1
        try:
            self._pipe.send(number)
            if self._pipe.poll(self._patience):
                return self._pipe.recv()  # type: ignore[no-any-return]
            verdict = Verdict("hang", f"nothing after {self._patience:.0f} s")
        except (EOFError, OSError):
            self._process.join()
            verdict = Verdict("crash", f"the process ended with {self._process.exitcode}")
        self.close()
        return str(number), verdict

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        from scripts.fuzz.worker import work

        self.close()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._done = 0


def fuzz(arguments: argparse.Namespace, folder: Path) -> Counter[str]:
    """Runs inputs until the time is up: how many had which outcome."""
    from scripts.fuzz.checkpoints import write_checkpoints

    originals = write_checkpoints(folder / "originals")
    found: Counter[str] = Counter()
    lock, numbers, end = Lock(), _numbers(arguments), time.monotonic() + arguments.minutes * 60

    def turn() -> None:
        with _worker(arguments, originals, folder) as worker:
            while time.monotonic() < end or arguments.inputs:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                changed, verdict = worker.run(number)
                with lock:
                    found[verdict.kind] += 1
                    if arguments.verbose or not verdict.good:
                        print(f"{verdict.kind}: {changed}\n    {verdict.line}", flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        for each in [pool.submit(turn) for _ in range(arguments.workers)]:
            each.result()
    return found


def _numbers(arguments: argparse.Namespace) -> Iterator[int]:
    if arguments.only is not None:
        return iter([arguments.only])
    return iter(range(arguments.inputs)) if arguments.inputs else count()


@contextmanager
def _worker(arguments: argparse.Namespace, originals: Mapping[str, Path], folder: Path) -> Iterator[Worker]:
    worker = Worker(arguments.seed, originals, folder, arguments.patience)
    try:
        yield worker
    finally:
        worker.close()


def main(given: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long")
    parser.add_argument("--inputs", type=int, help="how many, instead of how long")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one input again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds after which an input hangs")
    parser.add_argument("--keep", type=Path, help="folder for what was found; by default a temporary one, which stays")
    parser.add_argument("--verbose", action="store_true", help="print what is as it should be, too")
    arguments = parser.parse_args(given)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    folder = (arguments.keep or Path(tempfile.mkdtemp(prefix="offload-fuzz-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = fuzz(arguments, folder)
    kinds = ("answered", "planned", "refused", "traceback", "crash", "hang", "wrong")
    print(f"{found.total()} inputs, seed {arguments.seed}: " + ", ".join(f"{kind} {found[kind]}" for kind in kinds))
    bad = sum(found[kind] for kind in kinds[3:])
    if bad:
        print(f"findings are in {folder}; --only NUMBER --seed {arguments.seed} runs one again")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
