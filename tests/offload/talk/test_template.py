"""Chat templates are programs of strangers: what they may do to a chat, and what they may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
from tiny_chat import Resident, Scripted

from cache.errors import ModelError
from offload.options import SamplingOptions
from offload.talk.conversation import Conversation
from offload.talk.reply import Interrupt
from offload.talk.template import ChatTemplate, Limits
from offload.terminal.chat import Chat
from scripts.fuzz.tokenizer import TEMPLATE, tiny_tokenizer

EACH = "{% for m in messages %}"
TEXT = EACH + "{{ m.content }}{% endfor %}"
PARTS = EACH + "{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %};{% endfor %}"
USUAL = Limits()
TOO_LONG = Limits(seconds=1, bytes=2**28, characters=1000)
THINKING = [
    {"role": "user", "content": "é 'quoted'"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "user", "content": "?"},
]


def rendered(template: Any, *messages: dict[str, Any], limits: Limits = USUAL) -> str:
    [text] = ChatTemplate(tiny_tokenizer(template), limits).render([messages or [{"role": "user", "content": "Hello"}]])
    return text


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        TEXT + "{{ messages|tojson(indent=2) }}{{ bos_token }}{{ eos_token }}{{ tools is none }}",
        EACH
        + "{{ m.thinking }}{{ m.reasoning_content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
        + "{{ m.content }}{% endfor %}",
        "{% set ns = namespace(last=none, self=1) %}"
        + EACH
        + "{% set ns.last = m.content %}{{ ns.last }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}"
        + "{{ ns.self }}",
        EACH
        + "\n  {% if true %}\n  {% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}\n{% endif %}"
        + "{% endfor %}",
        TEXT + "{{ dict(a=1, b=2) }}{{ dict.fromkeys(['a']) }}{{ strftime_now('%Y') }}",
        TEXT + "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a')|upper }}{{ 'abc'[::-1] }}{{ ''.join(['a', 'b']) }}",
    ],
)
def test_a_conversation_is_rendered_as_transformers_renders_it(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    expected = tokenizer.apply_chat_template(THINKING, tokenize=False, add_generation_prompt=True)
    assert rendered(template, *THINKING) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (TEXT + "{{ 1 + 'a' }}", "TypeError"),
        (TEXT + "{{ 1 / 0 }}", "ZeroDivisionError"),
        (TEXT + "{{ 10.0 ** 1000 }}", "OverflowError"),
        (TEXT + "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{% extends 'x' %}", "TypeError: no loader"),
        ("{% for %}", "refuses this conversation: Expected an expression"),
        (TEXT + "{{ nothing.at.all }}", "refuses this conversation: 'nothing' is undefined"),
        (TEXT + "{{ raise_exception('no') }}", "refuses this conversation: no$"),
        (TEXT + "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
        (TEXT + "{% set ns = namespace(__class__=1) %}", "__class__"),
        ("Hello.", "leaves out what the user says"),
        (5, "is 5, which is no text"),
        ([{"name": "a", "template": None}], "is null, which is no text"),
    ],
)
def test_what_a_template_does_wrong_is_one_error(template: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        rendered(template)


@pytest.mark.parametrize(
    ("doing", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "within 1 s of processor"),
        ("{{ 2 ** (2 ** 60) }}", "(within 1 s of processor|more memory)"),
        ("{{ 'x' * 10 ** 9 }}", "more memory"),
        ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "more memory"),
        ("{{ 'x' * 10 ** 4 }}", "makes 100.. characters"),
    ],
)
def test_a_template_without_end_is_ended(doing: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        rendered(TEXT + doing, limits=TOO_LONG)


def test_a_template_that_takes_lists_of_parts_gets_them() -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
    assert rendered(PARTS, *messages) == "user:Hello;assistant:Yes.;"
    assert rendered(PARTS.replace("part in m.content", "part in m.content[:1]"), *messages).count("Hello") == 1


def test_each_role_is_given_as_the_template_takes_it() -> None:
    users = EACH + "{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    assert rendered(users, *messages) == "S;U;A;"
    both = EACH + "{% if m.content is string %}{{ m.content }}{% else %}parts{% endif %};{% endfor %}"
    assert rendered(both, *messages) == "S;U;A;"


def test_of_several_templates_the_default_or_the_first_is_taken() -> None:
    several = {"tool_use": "{{ messages[0].content }} with tools", "rag": "{{ messages[0].content }} with texts"}
    with pytest.warns(UserWarning, match=r"\(tool_use, rag\) is the default: took the first"):
        assert rendered(several) == "Hello with tools"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rendered({**several, "default": TEXT}) == "Hello"


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="this system has no sessions")
def test_ctrl_c_at_the_terminal_does_not_reach_what_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gives it to every process of its session."""
    sessions: list[int] = []
    run = subprocess.run

    def watched(command: list[str], **arguments: Any) -> Any:
        done = run([sys.executable, "-c", "import os; print(os.getsid(0))"], **arguments)
        sessions.append(int(done.stdout))
        return run(command, **arguments)

    template = ChatTemplate(tiny_tokenizer(TEXT))
    monkeypatch.setattr(subprocess, "run", watched)
    assert template.render([[{"role": "user", "content": "Hello"}]]) == ["Hello"]
    assert len(sessions) == 1 and os.getsid(0) not in sessions


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_joined() -> None:
    tokenizer = tiny_tokenizer()
    model = Scripted(tokenizer, "Yes.")
    chat = Chat(model, "tiny", SamplingOptions(), system="\ud83d\ude00")
    with Interrupt() as interrupt:
        chat.ask("a\ud83db", interrupt, lambda piece: None)
    text = tokenizer.decode(model.prompts[0])
    assert "system\n\N{GRINNING FACE}<" in text
    assert "user\na\N{REPLACEMENT CHARACTER}b<" in text
    json.dumps(chat.conversation.messages(), ensure_ascii=False).encode()
    with pytest.raises(ModelError, match="tokenizer cannot read this conversation"):
        Conversation(Resident(tokenizer=tiny_tokenizer(TEXT + "\ud83d")), "tiny").fit("a", 1000)
