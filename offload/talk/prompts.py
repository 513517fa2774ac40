"""A file of prompts, answered one after the other: what recording and calibrating run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cache.errors import ModelError, OffloadError
from offload.options import SamplingOptions
from offload.system.text import without_surrogates

_LONGEST_REPLY = 256  # tokens, where neither a flag nor the model says


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file of JSON lines. Raises OffloadError for what is none, and OSError."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise OffloadError(f'{path}, line {number}: not a JSON object with a text as its "prompt"')
        if prompt != without_surrogates(prompt):
            raise OffloadError(
                f'{path}, line {number}: its "prompt" has half of a surrogate pair, which is no character'
            )
        prompts.append(prompt)
    if not prompts:
        raise OffloadError(f"{path} has no prompts: write one JSON object a line")
    return prompts


def prompt_ids(model: Any, name: str, text: str) -> list[int]:
    """The token ids of a prompt, as `chat` would ask it, or plain where the model has no chat template."""
    from offload.talk.conversation import Conversation  # brings jinja2

    if model.tokenizer is None:
        raise ModelError(f"{name} has no tokenizer: its prompts cannot be read")
    if model.tokenizer.chat_template:
        return Conversation(model, name).fit(text, model.context)[0]
    return list(model.tokenizer(text)["input_ids"])


def answer(model: Any, prompt: list[int], sampling: SamplingOptions, interrupt: Any) -> list[int]:
    """`prompt` and the reply to it. Raises KeyboardInterrupt between two tokens if Ctrl-C was pressed."""
    import torch

    from offload.talk.reply import check_ids, reply_limit
    from offload.talk.settings import generate_one

    check_ids(model, prompt)

    def stop(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        if interrupt.requested:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    limit = reply_limit(model, len(prompt), sampling, default=_LONGEST_REPLY)
    return generate_one(model, prompt, sampling, limit, stop)
