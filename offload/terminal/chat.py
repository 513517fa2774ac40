"""A conversation with the model's own chat template, and the prompt that people type it at."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cache.errors import ModelError, OffloadError
from offload.options import SamplingOptions
from offload.talk.reply import Interrupt, Reply, reply_limit, seed_sampling, stream_reply
from offload.terminal import console as terminal

_ROOM = 0.25  # share of the context that trimming keeps free for a reply of no stated length
HELP = """\
/help          this list
/reset         forget the conversation; the system prompt stays
/stats         everything counted during the last reply
/system TEXT   set the system prompt; without TEXT show it
/save FILE     write the conversation to a new JSON file
/quit          leave; so does Ctrl-D, or Ctrl-C twice
Ctrl-C during a reply stops the reply. Text that starts with / needs a space before it."""


@dataclass
class Turn:
    """What the user said and what came back."""

    user: str
    assistant: str


class Conversation:
    """Turns and a system prompt, rendered by the tokenizer's chat template into at most `context` tokens.

    Raises ModelError for a model without a tokenizer or chat template, and for what its template refuses.
    """

    def __init__(self, model: Any, name: str, system: str | None = None) -> None:
        if model.tokenizer is None:
            raise ModelError(
                f"{name} has no tokenizer, so it cannot chat: continue token ids with "
                f"`offload generate {name} --prompt-ids 1,2,3`"
            )
        if not model.tokenizer.chat_template:
            raise ModelError(
                f"{name} has no chat template, so it was not taught to chat: take its instruct version, or "
                f"continue text with `offload generate {name} --prompt TEXT`"
            )
        self.turns: list[Turn] = []
        self._tokenizer = model.tokenizer
        self._system: str | None = None
        self._first = 0  # the oldest turn that the model still sees
        self.system = system

    @property
    def system(self) -> str | None:
        """The system prompt. Setting one that the template refuses raises ModelError and changes nothing."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        previous, self._system = self._system, text
        try:
            self._render([{"role": "user", "content": "?"}])
        except ModelError:
            self._system = previous
            raise

    def fit(self, user: str, tokens: int) -> tuple[list[int], int]:
        """Token ids that ask for the reply to `user`, and how many of the oldest turns they leave out.

        As few turns as bring the ids down to `tokens`;
        all of them if none would, but never the system prompt.
        """
        for first in range(self._first, len(self.turns) + 1):
            messages = [message for turn in self.turns[first:] for message in _messages(turn)]
            ids = self._render([*messages, {"role": "user", "content": user}])
            if len(ids) <= tokens:
                break
        return ids, first - self._first

    def forget(self, turns: int) -> None:
        """Stops showing the model the `turns` oldest turns that it still sees."""
        self._first += turns

    def reset(self) -> None:
        """Forgets every turn."""
        self.turns.clear()
        self._first = 0

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, dropped turns included, as chat messages."""
        return self._with_system([message for turn in self.turns for message in _messages(turn)])

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self._system}] if self._system else []) + messages

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            rendered = self._tokenizer.apply_chat_template(
                self._with_system(messages), add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise ModelError(f"the model's chat template refuses this conversation: {error}") from error
        return list(rendered["input_ids"])


def _messages(turn: Turn) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]


class Chat:
    """A conversation with a loaded model: asks, streams the reply, remembers both."""

    def __init__(self, model: Any, name: str, sampling: SamplingOptions, system: str | None = None) -> None:
        self.conversation = Conversation(model, name, system)
        self.name = name
        self._model = model
        self._sampling = sampling
        seed_sampling(sampling)

    def ask(self, text: str, interrupt: Interrupt, write: Callable[[str], None]) -> Reply:
        """Streams the reply to `text` to `write`; adds the turn, however partial, if anything was said.

        Raises OffloadError for what the model or its context cannot take; the conversation is then as before.
        """
        context = int(self._model.context)
        room = self._sampling.max_new_tokens or int(context * _ROOM)
        ids, dropped = self.conversation.fit(text, context - room)
        limit = reply_limit(self._model, len(ids), self._sampling)
        if dropped:
            self.conversation.forget(dropped)
            terminal.dim(f"(the context of {context} tokens is full: forgot the {_turns(dropped)})")
        with terminal.waiting(f"reading {len(ids)} tokens") as started:

            def show(piece: str) -> None:
                started()
                write(piece)

            reply = stream_reply(self._model, ids, self._sampling, limit, interrupt, show)
        if reply.text:
            self.conversation.turns.append(Turn(text, reply.text))
        return reply


def _turns(count: int) -> str:
    return "oldest turn" if count == 1 else f"oldest {count} turns"


class Repl:
    """The interactive prompt. Replies go to standard output, all else to standard error."""

    def __init__(self, chat: Chat, full_stats: bool = False) -> None:
        self._chat = chat
        self._full_stats = full_stats
        self._last: Reply | None = None
        self._saved: set[Path] = set()
        self._pressed = False  # whether the last thing typed at the prompt was Ctrl-C
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: terminal.dim(HELP),
            "/reset": self._reset,
            "/stats": self._stats,
            "/system": self._system,
            "/save": self._save,
        }

    def run(self) -> None:
        """Reads lines and answers them until /quit, Ctrl-D, or Ctrl-C twice at the prompt."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives `input` line editing; not earlier: it may write to stdout
        terminal.dim(f"{self._chat.name} · /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        while self._step():
            pass

    def _step(self) -> bool:
        """Reads and handles one line; False to leave."""
        try:
            line = _read_line()
            if line is None or line.strip() == "/quit":
                return False
            self._pressed = False
            self._handle(line)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if self._pressed:
                return False
            self._pressed = True
            terminal.dim("(Ctrl-C again or Ctrl-D leaves)")
        return True

    def _handle(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if not line.strip():
                return
            if not line.startswith("/"):
                self._answer(line.strip())
            elif name in self._commands:
                self._commands[name](rest.strip())
            else:
                terminal.error(f"no command {name}: /help lists them; begin with a space to say it to the model")
        except (OffloadError, OSError) as error:
            terminal.error(error)

    def _answer(self, text: str) -> None:
        with Interrupt() as interrupt:
            with terminal.Answer() as answer:
                self._last = self._chat.ask(text, interrupt, answer.write)
            terminal.report(self._last, self._full_stats)

    def _reset(self, _: str) -> None:
        self._chat.conversation.reset()
        terminal.dim("(forgot the conversation)")

    def _stats(self, _: str) -> None:
        if self._last is None:
            terminal.dim("(no reply yet)")
        else:
            terminal.console().print(terminal.stats_table(self._last.stats))

    def _system(self, text: str) -> None:
        conversation = self._chat.conversation
        if text:
            conversation.system = text
        terminal.dim(f"(system prompt: {conversation.system or 'none'})")

    def _save(self, name: str) -> None:
        if not name:
            raise OffloadError("/save needs a file name: /save chat.json")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise OffloadError(f"{path} exists: choose another name")
        messages = self._chat.conversation.messages()
        _write_json(path, {"model": self._chat.name, "messages": messages})
        self._saved.add(path)
        terminal.dim(f"(saved {len(messages)} messages to {path})")


def _write_json(path: Path, content: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_line() -> str | None:
    """A line typed by the user; None at the end of input."""
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # input would print its prompt between the answers
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None
