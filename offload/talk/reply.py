"""One streamed reply: prompt ids in, text out as it is made, stoppable with Ctrl-C between two tokens.

The model generates in the main thread. Ctrl-C only raises a flag, which a stopping criterion reads after each
token: so a stop never cuts a layer in half, and the tokens made until then are kept.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from transformers import set_seed

from cache.errors import ContextError, ModelError, OffloadError
from offload.options import SamplingOptions
from offload.talk.channels import Channels, Piece
from offload.talk.settings import generate_one
from offload.talk.stream import ReplyStream

Finish = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Reply:
    """What came back: the new tokens, their text (None without a tokenizer), why it ended, the statistics.

    `device` is the plan's name for what computed it. Where a chat's reply has parts, the text is the answer alone.
    """

    text: str | None
    token_ids: list[int]
    finish: Finish
    device: str
    stats: dict[str, Any]
    thinking: str | None = None
    tool_calls: Sequence[Any] = ()

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "text": self.text,
            "thinking": self.thinking,
            "tool_calls": list(self.tool_calls),
            "token_ids": self.token_ids,
            "finish": self.finish,
            "device": self.device,
            **self.stats,
        }


class Interrupt:
    """While open, Ctrl-C is a request that `requested` reports; the third one is a KeyboardInterrupt.

    Where Ctrl-C was ignored it stays so: a shell does that to what it runs in the background.
    """

    def __init__(self) -> None:
        self._presses = 0
        self._previous: Any = None

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed since this was opened."""
        return self._presses > 0

    def __enter__(self) -> Interrupt:
        self._presses = 0
        self._previous = signal.getsignal(signal.SIGINT)
        if self._previous is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._presses += 1
        if self._presses == 2:  # os.write: a signal may arrive inside a print, which must not be entered again
            os.write(2, b"\n(stopping after this token; Ctrl-C once more leaves the program)\n")
        if self._presses > 2:
            raise KeyboardInterrupt


def reply_limit(model: Any, prompt_tokens: int, sampling: SamplingOptions, default: int | None = None) -> int:
    """The most tokens the reply to a prompt may have.

    That is the flag's, else the model's own, else `default`; only the flag is a promise, the others give way
    to the context. Raises ContextError if there is no room for it.
    """
    room = int(model.context) - prompt_tokens
    asked = sampling.max_new_tokens
    if room < (asked or 1):
        reply = f"a reply of {asked} (--max-new-tokens)" if asked else "a reply"
        raise ContextError(
            f"a prompt of {prompt_tokens} tokens and {reply} do not fit a context of {model.context}: "
            "shorten one of them or raise --context"
        )
    return asked or min(room, model.generation_config.max_new_tokens or default or room)


def check_ids(model: Any, ids: Sequence[int]) -> None:
    """Raises ModelError for token ids that the model has no embedding for, and for none at all."""
    vocabulary = model.config.get_text_config().vocab_size
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ModelError(f"token id {wrong} is not in the model's vocabulary: ids go from 0 to {vocabulary - 1}")
    if not ids:
        raise OffloadError("the prompt is empty: there is nothing to continue")


def stream_reply(
    model: Any,
    prompt: Sequence[int],
    sampling: SamplingOptions,
    limit: int,
    interrupt: Interrupt,
    write: Callable[[str], None],
    channels: Channels | None = None,
    beside: Callable[[Piece], object] = lambda piece: None,
) -> Reply:
    """Generates up to `limit` tokens after `prompt` (token ids), handing text to `write` piece by piece.

    Without a tokenizer the pieces are "5" and then ",7". With `channels`, which takes the reply apart, `write` gets the
    answer, and `beside` the rest. Resets the model's statistics first, so that they describe this reply. Raises what
    `check_ids` and the model raise; the tokens are then lost.
    """
    check_ids(model, prompt)
    stream = ReplyStream(model.tokenizer, write, channels, beside)

    def stop(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), interrupt.requested, device=input_ids.device)

    model.reset_stats()
    generate_one(model, prompt, sampling, limit, stop, stream)
    finish = _finish(model, stream.ids, limit, interrupt)
    reply = Reply(stream.text, stream.ids, finish, model.plan.device, model.stats.as_dict())
    if channels is None:
        return reply
    return replace(reply, thinking=channels.thinking or None, tool_calls=tuple(channels.tool_calls))


def seed_sampling(sampling: SamplingOptions) -> None:
    """Seeds Python's, NumPy's and torch's random states if `sampling` has a seed."""
    if sampling.seed is not None:
        set_seed(sampling.seed)


def _finish(model: Any, ids: list[int], limit: int, interrupt: Interrupt) -> Finish:
    end = model.generation_config.eos_token_id
    if ids and ids[-1] in (end if isinstance(end, list) else [end]):
        return "stop"
    if interrupt.requested:
        return "interrupted"
    return "length" if len(ids) >= limit else "stop"  # a text or a time that the model's own settings stop at
