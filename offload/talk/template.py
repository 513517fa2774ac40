"""A model's chat template: which one it is, and messages turned into the text that the model reads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cache.errors import ModelError
from offload.system.text import one_line
from offload.talk import render

Message = dict[str, Any]
_MARK = "what the {} says"
_ROLES = ("user", "assistant", "system")


@dataclass(frozen=True)
class Limits:
    """What rendering may take: seconds of processor time, bytes of memory, characters of text."""

    seconds: int = 5
    bytes: int = 2**29
    characters: int = 2**24


class ChatTemplate:
    """The chat template of a tokenizer that has one.

    Raises ModelError for what is none, and for one that shows nothing of what a user says.
    """

    def __init__(self, tokenizer: Any, limits: Limits = Limits()) -> None:
        self.source = chosen(tokenizer.chat_template)
        if isinstance(tokenizer.chat_template, Mapping) and "default" not in tokenizer.chat_template:
            names = ", ".join(tokenizer.chat_template)
            warnings.warn(f"none of the model's chat templates ({names}) is the default: took the first", stacklevel=2)
        self._variables = {
            **tokenizer.special_tokens_map,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        self._limits = limits
        self._parts = _roles_in_parts(self.source, json.dumps(self._variables), limits)

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The text of each conversation, with the start of a reply. Raises ModelError for what is refused."""
        shaped = [[self._shaped(message) for message in messages] for messages in conversations]
        found = _rendered(self.source, shaped, self._variables, self._limits)
        for each in found:
            if "error" in each:
                raise ModelError(_complaint(each))
        return [each["text"] for each in found]

    def _shaped(self, message: Message) -> Message:
        if "reasoning_content" in message:
            message = {"thinking": message["reasoning_content"], **message}  # its name in gpt-oss' template
        return {**message, "content": _part(message["content"])} if message["role"] in self._parts else message


def chosen(template: Any) -> str:
    """The template to chat by: the only one, or of several by name the default or the first. Raises ModelError."""
    if isinstance(template, Mapping):
        template = template.get("default", next(iter(template.values()), None))
    if not isinstance(template, str):
        raise ModelError(f"the model's chat template is {json.dumps(template, default=str)[:40]}, which is no text")
    return template


@lru_cache
def _roles_in_parts(source: str, variables: str, limits: Limits) -> frozenset[str]:
    """Roles whose messages the template takes as lists of parts: it shows such a message and drops, or fails at, the
    same message as text. Raises ModelError if it shows no user's message in either way."""
    texts = [_trial(role) for role in _ROLES]
    parts = [[{**message, "content": _part(message["content"])} for message in trial] for trial in texts]
    found = _rendered(source, [*texts, *parts], json.loads(variables), limits)
    shows = [_MARK.format(role) in each.get("text", "") for role, each in zip(_ROLES * 2, found, strict=True)]
    as_text, as_parts = dict(zip(_ROLES, shows[:3], strict=True)), dict(zip(_ROLES, shows[3:], strict=True))
    if not as_text["user"] and not as_parts["user"]:
        if "error" in found[0]:
            raise ModelError(_complaint(found[0]))
        raise ModelError("the model's chat template leaves out what the user says: the model would answer nothing")
    return frozenset(role for role in _ROLES if as_parts[role] and not as_text[role])


def _trial(role: str) -> list[Message]:
    """A short conversation in which `role` says something."""
    before = {"user": (), "assistant": ("user",), "system": ()}[role]
    after = () if role == "user" else ("user",)
    return [{"role": each, "content": _MARK.format(each)} for each in (*before, role, *after)]


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _complaint(found: Mapping[str, Any]) -> str:
    if found["refused"]:
        return f"the model's chat template refuses this conversation: {found['error']}"
    return f"the model's chat template cannot render this conversation ({found['error']})"


def _rendered(
    source: str, conversations: Sequence[Any], variables: Mapping[str, Any], limits: Limits
) -> list[dict[str, Any]]:
    """What `offload.talk.render` says of each conversation, in a process of its own."""
    task = {"template": source, "conversations": conversations, "variables": variables, **asdict(limits)}
    done = subprocess.run(
        [sys.executable or "python3", "-I", str(Path(render.__file__)), *sys.path],
        input=json.dumps(task).encode(),
        capture_output=True,
        start_new_session=True,  # Ctrl-C is for the program, and it may wait for the text
        check=False,
    )
    if done.returncode == 0:
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found
    if done.returncode == -signal.SIGXCPU:
        reason = f"it did not come to an end within {limits.seconds} s of processor time"
    else:
        said = one_line(done.stderr.decode(errors="replace"))
        reason = f"it ended the process that renders it: {said[-200:] or done.returncode}"
    return [{"error": reason, "refused": False} for _ in conversations]
