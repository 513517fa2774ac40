"""The process that runs inputs, one after the other: the command line, and the plain model beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from scripts.fuzz.case import Case, make_case
from scripts.fuzz.resident import Refused, answers
from scripts.fuzz.verdict import Verdict, judge_refusal

MOST_MEMORY = 6 * 2**30
"""Bytes that one process may take, beyond which it is told that there are no more."""


def work(pipe: Connection, seed: int, originals: Mapping[str, Path], folder: Path) -> None:
    """Answers every number that comes through `pipe` with (what was changed, verdict), until it is closed.

    A finding's checkpoint stays in `folder`, under its number. Whatever else an input writes is there, too.
    """
    os.environ["OFFLOAD_CACHE"] = str(folder / "cache")
    (folder / "here").mkdir(exist_ok=True)
    os.chdir(folder / "here")
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(try_one(seed, pipe.recv(), originals, folder))


def try_one(seed: int, number: int, originals: Mapping[str, Path], folder: Path) -> tuple[str, Verdict]:
    """What was changed in the input `number`, and what came of it."""
    shutil.rmtree(folder / str(number), ignore_errors=True)
    case = make_case(seed, number, originals, folder / str(number))
    verdict = run(case)
    if verdict.good:
        shutil.rmtree(case.folder)
    return describe(case), verdict


def describe(case: Case) -> str:
    """The input in a line."""
    changes = "; ".join(case.changes) or "nothing"
    return f"{case.number} {case.original.name} [{changes}] {' '.join(map(ascii, case.command.line(Path('M'))))}"


def run(case: Case) -> Verdict:
    """Runs the command line, and judges."""
    from offload.terminal.main import main

    out, err = io.StringIO(), io.StringIO()
    code: object = None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(case.command.line(case.folder))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        return Verdict("traceback", traceback.format_exc()[-2500:])
    if code != 0:
        return judge_refusal(code, err.getvalue())
    if "Traceback" in err.getvalue():
        return Verdict("traceback", err.getvalue()[-2500:])
    try:
        said = json.loads(out.getvalue())
    except ValueError:
        return Verdict("wrong", f"no JSON: {out.getvalue()[:500]!r}")
    if case.command.name == "plan" or case.command.lossy:
        return Verdict("planned")
    return _compare(case, said, err.getvalue())


def _compare(case: Case, said: dict[str, object], err: str) -> Verdict:
    try:
        right = answers(case, said, mended="generation_config.json" in err)
    except Refused as refused:
        return Verdict("wrong", f"answered {said['token_ids']} where transformers does not ({refused}); said {err!r}")
    if said["token_ids"] not in right:
        return Verdict("wrong", f"answered {said['token_ids']}, right is {right}; said {err!r}")
    return Verdict("answered")
