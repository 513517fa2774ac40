"""A model opened, used, failed and closed again and again, and one model asked by many threads: nothing may grow.

    python scripts/soak.py $(offload demo) --rounds 300 --calls 1000

Rounds: load, generate, an error in the midst of a reply, generate, close; resident memory, threads and descriptors are
noted after each. Calls: one model, many threads, every answer compared with the one that a single thread was given.
A line of JSON on standard output; exit code 1 if something grows, or if an answer is another one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch

from offload.model import OffloadedModel

PROMPTS, TOKENS = 8, 6
SHARE = 0.4
"""Of the experts, what fits: they come and go. What is right is told with all of them in memory."""
SLACK_BYTES = 16 * 2**20
"""By how much the median of the last third of the rounds may be above that of the second: what an allocator keeps."""


class Left(NamedTuple):
    """What a process holds between two rounds."""

    rss_bytes: int
    threads: int
    descriptors: int


class Planned(Exception):
    """The error that a round meets on purpose."""


def prompts(vocabulary: int) -> list[torch.Tensor]:
    """Token ids [1, n], of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (1, 5 + i), generator=generator) for i in range(PROMPTS)]


def answer(model: OffloadedModel, prompt: torch.Tensor, **arguments: Any) -> list[int]:
    """The tokens that come after a prompt."""
    reply = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **arguments)
    tokens: list[int] = reply[0, prompt.shape[1] :].tolist()
    return tokens


def fail(*_: object, **__: object) -> Any:
    """In the place of whatever may break."""
    raise Planned


def one_round(folder: Path, number: int, options: dict[str, Any], expected: list[list[int]]) -> int:
    """Load, generate, meet an error, generate, close. Gives how many answers were wrong."""
    wrong = 0
    with OffloadedModel.from_pretrained(folder, **options) as model:
        asked = prompts(model.config.get_text_config().vocab_size)
        i = number % len(asked)
        wrong += answer(model, asked[i]) != expected[i]
        with suppress(Planned):
            if number % 2:
                answer(model, asked[i], stopping_criteria=[fail])
            else:  # in the midst of a pass, where nobody foresees one
                with patch.object(model.parts.runtime.engine, "submit", fail):
                    answer(model, asked[i])
        wrong += answer(model, asked[-1 - i]) != expected[-1 - i]
    return wrong


def left() -> Left:
    """What is held now, once what is garbage is gone."""
    gc.collect()
    process = psutil.Process()
    with process.oneshot():
        return Left(process.memory_info().rss, threading.active_count(), process.num_fds() if os.name != "nt" else 0)


def grown(rounds: Sequence[Left]) -> dict[str, float]:
    """By how much each figure is larger in the last third of the rounds than in the second; the first warms up."""
    third = max(len(rounds) // 3, 1)
    middle, last = rounds[third : 2 * third] or rounds, rounds[-third:]
    return {
        name: median(getattr(each, name) for each in last) - median(getattr(each, name) for each in middle)
        for name in Left._fields
    }


def is_flat(growth: dict[str, float]) -> bool:
    """Whether that is nothing."""
    return growth["rss_bytes"] <= SLACK_BYTES and growth["threads"] <= 0 and growth["descriptors"] <= 0


def ask_from_threads(folder: Path, calls: int, threads: int, options: dict[str, Any], expected: list[list[int]]) -> int:
    """So many calls in all. Gives how many answers were wrong, or did not come."""
    wrong: list[object] = []
    with OffloadedModel.from_pretrained(folder, **options) as model:
        asked = prompts(model.config.get_text_config().vocab_size)

        def ask(first: int) -> None:
            for number in range(first, calls, threads):
                i = number % len(asked)
                try:
                    if answer(model, asked[i]) != expected[i]:
                        wrong.append(number)
                except Exception as error:
                    wrong.append(error)

        working = [threading.Thread(target=ask, args=(first,)) for first in range(threads)]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
    for error in {repr(each) for each in wrong if isinstance(each, Exception)}:
        print(error, file=sys.stderr)
    return len(wrong)


def soak(folder: Path, rounds: int, calls: int, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """Both, and what came of them."""
    with OffloadedModel.from_pretrained(folder, **options) as model:
        expected = [answer(model, prompt) for prompt in prompts(model.config.get_text_config().vocab_size)]
        all_bytes = model.parts.experts.total_experts * sum(model.parts.store.slot_bytes)
    options = options | {"expert_cache": int(SHARE * all_bytes)}
    held, wrong = [], 0
    for number in range(rounds):
        wrong += one_round(folder, number, options, expected)
        held.append(left())
        if not (number + 1) % 20:
            print(f"round {number + 1}: {held[-1]}", file=sys.stderr)
    growth = grown(held) if held else dict.fromkeys(Left._fields, 0.0)
    wrong_calls = ask_from_threads(folder, calls, threads, options, expected)
    return {
        "rounds": rounds,
        "wrong_in_rounds": wrong,
        "first": held[0]._asdict() if held else None,
        "last": held[-1]._asdict() if held else None,
        "growth": growth,
        "calls": calls,
        "wrong_calls": wrong_calls,
        "fine": is_flat(growth) and not wrong and not wrong_calls,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder with a small model")
    parser.add_argument("--rounds", type=int, default=300, help="of load, generate, error, close (default: 300)")
    parser.add_argument("--calls", type=int, default=1000, help="of one model (default: 1000)")
    parser.add_argument("--threads", type=int, default=8, help="that make them (default: 8)")
    parser.add_argument("--device", default="cpu", help='"cpu" or "emulated" (default: cpu)')
    args = parser.parse_args(argv)
    options = {"device": args.device, "context": 64, "threads": 1}
    found = soak(args.checkpoint, args.rounds, args.calls, args.threads, options)
    print(json.dumps({"device": args.device, **found}))
    return 0 if found["fine"] else 1


if __name__ == "__main__":
    sys.exit(main())
