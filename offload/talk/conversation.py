"""A conversation, rendered by the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import ModelError
from offload.system.text import without_surrogates
from offload.talk.channels import spelled
from offload.talk.template import ChatTemplate, Message

_AT_ONCE = 8  # renderings of a conversation that is too long, in one process


@dataclass
class Turn:
    """What the user said and what came back: the answer, the thinking before it, and calls of tools."""

    user: str
    assistant: str
    thinking: str = ""
    tool_calls: Sequence[Any] = ()

    def messages(self, plain: bool = False) -> list[Message]:
        """The turn as chat messages; `plain` leaves out all but the texts that were said."""
        said: Message = {"role": "assistant", "content": self.assistant}
        if plain and not self.assistant:
            said["content"] = "\n".join(spelled(call) for call in self.tool_calls)
        if self.thinking and not plain:
            said["reasoning_content"] = self.thinking
        if self.tool_calls and not plain:
            said["tool_calls"] = list(self.tool_calls)
        return [{"role": "user", "content": self.user}, said]

    @property
    def well_formed(self) -> bool:
        """Whether its calls of tools are what chat templates expect: a function's name and its arguments, by name."""
        functions = [call.get("function") if isinstance(call, Mapping) else None for call in self.tool_calls]
        return all(isinstance(each, Mapping) and isinstance(each.get("arguments"), Mapping) for each in functions)


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
        self._template = ChatTemplate(model.tokenizer)
        self._system: str | None = None
        self._first = 0  # the oldest turn that the model still sees
        if system:
            self.system = system

    @property
    def system(self) -> str | None:
        """The system prompt. Setting one that the template refuses raises ModelError and changes nothing."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        previous, self._system = self._system, text and without_surrogates(text)
        try:
            self._render([[{"role": "user", "content": "?"}]])
        except ModelError:
            self._system = previous
            raise

    def fit(self, user: str, tokens: int) -> tuple[list[int], int]:
        """Token ids that ask for the reply to `user`, and how many of the oldest turns they leave out.

        As few turns as bring the ids down to `tokens`;
        all of them if none would, but never the system prompt.
        """
        asked = {"role": "user", "content": user}
        starts = range(self._first, len(self.turns) + 1)
        for batch in (starts[:1], *(starts[at : at + _AT_ONCE] for at in range(1, len(starts), _AT_ONCE))):
            for first, text in zip(batch, self._texts(batch, asked), strict=True):
                ids = self._ids(text)
                if len(ids) <= tokens:
                    return ids, first - self._first
        return ids, first - self._first

    def forget(self, turns: int) -> None:
        """Stops showing the model the `turns` oldest turns that it still sees."""
        self._first += turns

    def reset(self) -> None:
        """Forgets every turn."""
        self.turns.clear()
        self._first = 0

    def messages(self) -> list[Message]:
        """The whole conversation, dropped turns included, as chat messages."""
        return self._with_system([message for turn in self.turns for message in turn.messages()])

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return ([{"role": "system", "content": self._system}] if self._system else []) + messages

    def _texts(self, starts: Sequence[int], asked: Message) -> list[str]:
        """What the model reads from each of these turns on, and then `asked`.

        Thinking and calls of tools are the template's to show. One that cannot gets what was said, as text.
        """

        def conversation(first: int, plain: bool) -> list[Message]:
            turns = self.turns[first:]
            return [message for turn in turns for message in turn.messages(plain or not turn.well_formed)] + [asked]

        try:
            return self._render([conversation(first, plain=False) for first in starts])
        except ModelError:
            if not any(turn.tool_calls or turn.thinking for turn in self.turns):
                raise
        return self._render([conversation(first, plain=True) for first in starts])

    def _render(self, conversations: Sequence[list[Message]]) -> list[str]:
        return self._template.render([self._with_system(messages) for messages in conversations])

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # half a surrogate pair in the template, a tokenizer without what it needs
            raise ModelError(f"the model's tokenizer cannot read this conversation ({error})") from error
