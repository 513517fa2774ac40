"""How models mark what in their replies is thinking, answer or the call of a tool.

A tokenizer may say it in a response template. Few do, and transformers has none for the rest. But the marks stand in
the chat template, or among the tokens that were added to the vocabulary; those that are known are listed here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cache.errors import OffloadError
from offload.talk.channels import Channels
from offload.talk.template import chosen

_NEVER = "\0"  # in no reply
_THINKING = (
    ("<|channel>thought\n", "<channel|>"),  # Gemma
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, MiniMax, Kimi and most others
)
_ANSWERS = (("<answer>", "</answer>"), ("<response>", "</response>"))  # Hunyuan, Ernie; others say it without marks
_TOOLS = (
    ("<tool_call>", "</tool_call>"),  # Qwen, GLM and others
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),  # LFM
    ("<|tool_call>", "<tool_call|>"),  # Gemma
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # noqa: RUF001 (DeepSeek's)
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),  # Kimi
    ("[TOOL_CALLS]", _NEVER),  # Mistral: they end with the reply
)
_JSON = {"content": "json", "content_args": {"allow_non_json": True}}  # a reply may be cut off in its midst
_ENDS = ["<|end|>", "<|return|>", "<|call|>", "<|start|>"]
_HARMONY: Mapping[str, Any] = {  # of gpt-oss: a reply is several messages, each in a channel
    "thinking": {"open_pattern": r"<\|channel\|>analysis\s*<\|message\|>", "close": _ENDS},
    "content": {  # a comment to nobody is said to the user
        "open_pattern": r"<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>",
        "close": _ENDS,
    },
    "tool_calls": {  # its name stands before the channel or behind it
        "open_pattern": r"(?:<\|channel\|>\w+)?\s*to=(?:functions\.)?(?P<name>[^\s<]+)"
        r"(?:\s*(?:<\|channel\|>|<\|constrain\|>)?\s*\w+)*\s*<\|message\|>",
        "close": _ENDS,
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        **_JSON,
    },
}


def channels(tokenizer: Any, prompt: Sequence[int]) -> Channels | None:
    """What takes replies to the prompt of these ids apart; None where nothing says that they have parts.

    Warns of a tokenizer's own response template that cannot be used.
    """
    text = str(tokenizer.decode(prompt))
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        try:
            return Channels(own, text, kept=_named(tokenizer, str(own)))
        except OffloadError as error:
            warnings.warn(f"the tokenizer's response_template cannot be used ({error})", stacklevel=2)
    fields = _known_fields(tokenizer)
    if fields is None:
        return None
    opened = fields.get("thinking", {}).get("open", _NEVER)
    prefix = opened if text.rstrip().endswith(opened.rstrip()) else ""  # a template may begin the thinking
    return Channels({"start_anchor": _NEVER, "fields": fields}, prefix, kept=_named(tokenizer, str(fields)))


def _known_fields(tokenizer: Any) -> Mapping[str, Any] | None:
    """The fields of a response template, by the marks that the tokenizer knows."""
    known = chosen(tokenizer.chat_template) + "\n".join(tokenizer.get_added_vocab())
    if "<|channel|>" in known and "<|message|>" in known:
        return _HARMONY
    thinking = [pair for pair in _THINKING if pair[1] in known][:1]
    tools = [pair for pair in _TOOLS if pair[0] in known]
    if not thinking and not tools:
        return None
    fields: dict[str, Any] = {"content": {}}
    if thinking:
        fields["thinking"] = dict(zip(("open", "close"), thinking[0], strict=True))
        answers = [pair for pair in _ANSWERS if pair[0] in chosen(tokenizer.chat_template)]
        fields |= {"response": _between(answers)} if answers else {}
    if tools:
        fields["tool_calls"] = {**_between(tools), **_JSON, "transform": {"type": "function", "function": "{content}"}}
    return fields


def _between(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    return {"open": [pair[0] for pair in pairs], "close": [pair[1] for pair in pairs]}


def _named(tokenizer: Any, template: str) -> frozenset[int]:
    """The special tokens that a response template tells parts by. All others are no text, as everywhere."""
    spelled_out = template.replace("\\", "")
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.special and token.content in spelled_out)
