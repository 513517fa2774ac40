"""A conversation, rendered by the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from cache.errors import ModelError


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
