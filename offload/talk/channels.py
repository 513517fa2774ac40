"""A reply taken apart while it comes: what is the answer, what is thinking, and what calls a tool.

transformers' `ResponseParser` finds the regions; here they become pieces that can be shown at once. No piece of one
kind is ever given as another, and the pieces of the answer, joined, are the answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cache.errors import OffloadError
from offload.system.text import summary

Kind = Literal["answer", "thinking", "tool"]

_KINDS: Mapping[str, Kind] = {"content": "answer", "response": "answer", "tool_calls": "tool"}  # the rest is thinking
_BETWEEN = "\n\n"  # regions of one kind


@dataclass(frozen=True)
class Piece:
    """Some of the reply, as it may be shown."""

    kind: Kind
    text: str


class Channels:
    """Takes the text of a reply to a prompt apart, by a response template as transformers' tokenizers have it.

    `prefix` is what the prompt says of the reply already, and `kept` the special tokens that belong to the text. Text
    outside of all regions is given up; a reply without regions is left to whoever asks (`empty`). Raises OffloadError
    for what is no response template.
    """

    def __init__(self, template: Mapping[str, Any], prefix: str, kept: Collection[int] = ()) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self.kept = kept
        self.tool_calls: list[Any] = []
        self._said: dict[Kind, list[str]] = {"answer": [], "thinking": [], "tool": []}
        self._unshown = ""  # marks, and a region that is shown only once it is whole
        self._body = ""  # of that region
        self._held = ""  # blanks that end a region if nothing follows
        self._fresh = True  # whether nothing of the region was shown yet
        try:
            self._parser: Any = ResponseParser(template, prefix=prefix)
        except Exception as error:  # a file's, of any shape
            raise OffloadError(summary(error)) from error
        self._pieces(self._parser.initial_events)

    @property
    def answer(self) -> str:
        """What was said to the user, so far."""
        return "".join(self._said["answer"])

    @property
    def thinking(self) -> str:
        """What was thought, so far."""
        return "".join(self._said["thinking"])

    @property
    def empty(self) -> bool:
        """Whether nothing was found, so far."""
        return not any(self._said.values())

    def feed(self, text: str) -> list[Piece]:
        """What `text`, which comes next, makes clear."""
        if self._parser is None:
            return self._say("answer", text)
        self._unshown += text
        try:
            found = self._pieces(self._parser.feed(text))
        except Exception:  # a region is not what the template says of it, such as a number that is a word
            self._parser = None
            return self._as_it_is(_BETWEEN if self._said["answer"] else "")
        if found:
            self._unshown = self._body
        return found

    def end(self) -> list[Piece]:
        """What was still held back."""
        if self._parser is None:
            return []
        try:
            return self._pieces(self._parser.finalize()[1])
        except Exception:
            return self._as_it_is()

    def _pieces(self, events: list[dict[str, Any]]) -> list[Piece]:
        found = []
        for event in events:
            kind = _KINDS.get(event["field"], "thinking")
            if event["type"] == "region_open":
                self._body, self._held, self._fresh = "", "", True
            elif event["type"] == "region_close":
                self._body = ""
                if kind == "tool":
                    found += self._called(event["value"])
            elif kind == "tool":
                self._body += event["text"]
            else:
                found += self._trimmed(kind, event["text"])
        return found

    def _trimmed(self, kind: Kind, text: str) -> list[Piece]:
        """The next of a region, without blanks at its start; those at its end are held until something follows."""
        text = self._held + text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if self._fresh:
            shown = shown.lstrip()
            if not shown:
                return []
            shown = (_BETWEEN if self._said[kind] else "") + shown
            self._fresh = False
        return self._say(kind, shown)

    def _called(self, value: Any) -> list[Piece]:
        calls = value if isinstance(value, list) else [value]
        self.tool_calls += calls
        return [piece for call in calls for piece in self._say("tool", spelled(call))]

    def _as_it_is(self, before: str = "") -> list[Piece]:
        text, self._unshown = self._unshown.lstrip(), ""
        return self._say("answer", before + text) if text else []

    def _say(self, kind: Kind, text: str) -> list[Piece]:
        if not text:
            return []
        self._said[kind].append(text)
        return [Piece(kind, text)]


def spelled(call: Any) -> str:
    """The call of a tool, for people: `name({"argument": 1})`, or what the model wrote."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if isinstance(function, str):
        return function.strip()
    if isinstance(function, Mapping) and "name" in function:
        arguments = function.get("arguments", function.get("parameters", {}))
        inside = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        return f"{function['name']}({inside})"
    return json.dumps(function, ensure_ascii=False, default=str)
