"""Text from tokens as they come, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from offload.talk.channels import Channels, Piece

_HOLD = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for a character whose bytes are not all there yet


class Detokenizer:
    """Text from tokens as they come: the pieces joined are the text of all of them.

    Decodes a window that starts at the last complete piece, so that the cost per token does not grow with the
    reply and a token is read after its left neighbour, as tokenizers that mark word starts need. Special tokens are no
    text, but for those that are `kept`.
    """

    def __init__(self, tokenizer: Any, kept: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._kept = kept
        added = tokenizer.added_tokens_decoder.items() if kept else ()
        self._dropped = {number for number, token in added if token.special} - set(kept)
        self._ids: list[int] = []
        self._start = 0
        self._read = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; "" while the last character still lacks bytes."""
        self._ids += [number for number in ids if number not in self._dropped]
        return self._piece(last=False)

    def flush(self) -> str:
        """What is still held back."""
        return self._piece(last=True)

    def _piece(self, last: bool) -> str:
        old, new = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if not last and (new.endswith(_HOLD) or len(new) <= len(old)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return new[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._kept)) if ids else ""


class ReplyStream(BaseStreamer):  # type: ignore[misc]
    """Collects generate's tokens and hands out their text; the first thing that generate puts is the prompt.

    `write` gets the answer and `beside` what else `channels` finds; without channels everything is the answer.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        write: Callable[[str], None],
        channels: Channels | None = None,
        beside: Callable[[Piece], object] = lambda piece: None,
    ) -> None:
        self.ids: list[int] = []
        self._prompt_seen = False
        self._tokenizer = tokenizer
        kept = () if channels is None else channels.kept
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, kept)
        self._write = write
        self._channels = channels
        self._beside = beside

    @property
    def text(self) -> str | None:
        """The answer so far; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        if self._channels is not None and not self._channels.empty:
            return self._channels.answer
        return str(self._tokenizer.decode(self.ids, skip_special_tokens=True))

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ids = value.flatten().tolist()
        self.ids += ids
        if self._detokenizer:
            self._take(self._detokenizer.feed(ids))
        else:
            self._take("," * (len(self.ids) > len(ids)) + ",".join(map(str, ids)))

    def end(self) -> None:
        if self._detokenizer:
            self._take(self._detokenizer.flush())
        if self._channels is None:
            return
        self._show(self._channels.end())
        if self._channels.empty and self.text:  # no mark that was expected: everything is the answer
            self._write(self.text)

    def _take(self, text: str) -> None:
        if text and self._channels is not None:
            self._show(self._channels.feed(text))
        elif text:
            self._write(text)

    def _show(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.kind == "answer":
                self._write(piece.text)
            else:
                self._beside(piece)
