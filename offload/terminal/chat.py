"""A conversation at the terminal: the prompt that people type at, and its commands."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from cache.errors import OffloadError
from cache.outputs import output
from offload.options import SamplingOptions
from offload.system import messages
from offload.system.paths import cache_dir
from offload.system.text import without_surrogates
from offload.talk.conversation import Conversation, Turn
from offload.talk.marks import channels
from offload.talk.reply import Interrupt, Reply, reply_limit, seed_sampling, stream_reply
from offload.terminal import console
from offload.terminal.asides import Asides
from offload.terminal.tables import report, stats_table

_ROOM = 0.25  # share of the context that trimming keeps free for a reply of no stated length
HELP = """\
/help          this list
/reset         forget the conversation; the system prompt stays
/stats         everything counted during the last reply
/system TEXT   set the system prompt; without TEXT show it
/save FILE     write the conversation to a JSON file that is new or from this chat
/quit          leave; so does Ctrl-D, or Ctrl-C twice
Ctrl-C during a reply stops the reply. Text that starts with / needs a space before it."""


class Chat:
    """A conversation with a loaded model: asks, streams the reply, remembers both."""

    def __init__(
        self,
        model: Any,
        name: str,
        sampling: SamplingOptions,
        system: str | None = None,
        show_thinking: bool = False,
    ) -> None:
        self.conversation = Conversation(model, name, system)
        self.name = name
        self._model = model
        self._sampling = sampling
        self._show_thinking = show_thinking
        seed_sampling(sampling)

    def ask(self, text: str, interrupt: Interrupt, write: Callable[[str], None]) -> Reply:
        """Streams the answer to `text` to `write`; adds the turn, however partial, if anything was said.

        Standard error has the model's thinking, if it is to be shown, and tools that it calls. Raises OffloadError for
        what the model or its context cannot take; the conversation is then as before.
        """
        text = without_surrogates(text)
        context = int(self._model.context)
        room = self._sampling.max_new_tokens or int(context * _ROOM)
        ids, dropped = self.conversation.fit(text, context - room)
        limit = reply_limit(self._model, len(ids), self._sampling)
        if dropped:
            self.conversation.forget(dropped)
            console.dim(f"(the context of {context} tokens is full: forgot the {_turns(dropped)})")
        parts = channels(self._model.tokenizer, ids)
        with console.waiting(f"reading {len(ids)} tokens") as status, Asides(status, self._show_thinking) as asides:

            def answer(piece: str) -> None:
                asides.before_answer(piece)
                write(piece)

            reply = stream_reply(self._model, ids, self._sampling, limit, interrupt, answer, parts, asides.show)
        if reply.text or reply.tool_calls:
            turn = Turn(text, reply.text or "", reply.thinking or "", reply.tool_calls)
            self.conversation.turns.append(turn)
        elif reply.thinking:
            console.dim(f"(it was still thinking, so there is no answer{self._hint(reply)})")
        return reply

    def _hint(self, reply: Reply) -> str:
        if reply.finish != "length":
            return ""
        return ": raise --max-new-tokens" if self._sampling.max_new_tokens else ": raise --context"


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
            "/help": lambda _: console.dim(HELP),
            "/reset": self._reset,
            "/stats": self._stats,
            "/system": self._system,
            "/save": self._save,
        }

    def run(self) -> None:
        """Reads lines and answers them until /quit, Ctrl-D, or Ctrl-C twice at the prompt."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives `input` line editing; not earlier: it may write to stdout
        console.dim(f"{self._chat.name} · /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
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
            console.dim("(Ctrl-C again or Ctrl-D leaves)")
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
                messages.error(f"no command {name}: /help lists them; begin with a space to say it to the model")
        except (OffloadError, OSError) as error:
            messages.error(error)
        except Exception:
            self._rescue(line)
            raise

    def _rescue(self, line: str) -> None:
        """Keeps the conversation, and what was asked last, where a fault ends the program."""
        path = cache_dir() / "chats" / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
        said = [*self._chat.conversation.messages(), {"role": "user", "content": without_surrogates(line.strip())}]
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_json(path, {"model": self._chat.name, "messages": said})
            messages.notice(f"the conversation is in {path}")

    def _answer(self, text: str) -> None:
        with Interrupt() as interrupt:
            with console.Answer() as answer:
                self._last = self._chat.ask(text, interrupt, answer.write)
            report(self._last, self._full_stats)

    def _reset(self, _: str) -> None:
        self._chat.conversation.reset()
        console.dim("(forgot the conversation)")

    def _stats(self, _: str) -> None:
        if self._last is None:
            console.dim("(no reply yet)")
        else:
            console.stderr().print(stats_table(self._last.stats))

    def _system(self, text: str) -> None:
        conversation = self._chat.conversation
        if text:
            conversation.system = text
        console.dim(f"(system prompt: {conversation.system or 'none'})")

    def _save(self, name: str) -> None:
        if not name:
            raise OffloadError("/save needs a file name: /save chat.json")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise OffloadError(f"{path} exists: choose another name")
        said = self._chat.conversation.messages()
        _write_json(path, {"model": self._chat.name, "messages": said})
        self._saved.add(path)
        console.dim(f"(saved {len(said)} messages to {path})")


def _write_json(path: Path, content: object) -> None:
    with output(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


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
