"""The worker's side of a benchmark: requests in, answers out. Needs the standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

Request = dict[str, Any]
Answer = dict[str, Any]
Handler = Callable[[Request], Answer]


def serve(load: Callable[[], Handler]) -> int:
    """`load` the engine, then answer requests on standard input until it ends.

    What the engine prints goes to standard error: standard output has answers only. Returns the exit code.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handle = load()
    for line in sys.stdin:
        answers.write(json.dumps(handle(json.loads(line))) + "\n")
        answers.flush()
    return 0


def explaining(load: Callable[[], Handler]) -> Handler:
    """`load` the engine; where that or a request fails, every answer from then on is {"unable": why}."""
    unable: list[str] = []

    def explain(error: BaseException) -> None:
        traceback.print_exc()
        text = str(error).strip() or "no message"
        unable.append(f"{type(error).__name__}: {text.splitlines()[0]}")

    handle: Handler = dict
    try:
        handle = load()
    except Exception as error:
        explain(error)

    def explained(request: Request) -> Answer:
        if not unable:
            try:
                return handle(request)
            except Exception as error:
                explain(error)
        return {"unable": unable[0]}

    return explained


def same_choices(answers: Iterable[Answer], others: Iterable[Answer]) -> list[bool]:
    """Of each token of `answers` whether `others` have the same, as far as both go."""
    chosen = ((answer["chosen"], other["chosen"]) for answer, other in zip(answers, others, strict=False))
    return [a == b for ours, theirs in chosen for a, b in zip(ours, theirs, strict=False)]


def steps(request: Request, feed: Callable[[list[int]], int]) -> Answer:
    """Feed the ids of {"ids", "prefill", "at_most_s"}, one a step or all at once: times and what `feed` chooses."""
    ids: list[int] = request["ids"]
    seconds: list[float] = []
    chosen: list[int] = []
    for step in [ids] if request.get("prefill") else [[token] for token in ids]:
        began = time.perf_counter()
        chosen.append(feed(step))
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > request.get("at_most_s", float("inf")):
            break
    return {"seconds": seconds, "chosen": chosen, "stats": {}}
