"""Replies taken apart while they come: thinking is never the answer, and no text of the answer is lost."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import Scripted

from offload.options import SamplingOptions
from offload.talk.channels import Channels
from offload.talk.marks import channels
from offload.talk.reply import Interrupt
from offload.terminal.chat import Chat
from scripts.fuzz.tokenizer import TEMPLATE, tiny_tokenizer

HARMONY_TOKENS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"]
HARMONY = (  # in short what gpt-oss' own does: thinking is shown before the call of a tool, and dropped from history
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('channels belong in fields') }}{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments|tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GPT_OSS = tiny_tokenizer(HARMONY, HARMONY_TOKENS)
QUESTION = "<|start|>user<|message|>What is the capital of France?<|end|><|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>France. Easy.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Paris.<|return|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"town": "Paris"}<|call|>'
TOOL = {"type": "function", "function": {"name": "look", "arguments": {"town": "Paris"}}}


def thinker(marks: str = "<think></think>", opens: str = "") -> Any:
    """A tokenizer whose chat template knows `marks`, and begins replies with `opens`."""
    return tiny_tokenizer(
        "{# " + marks + " #}" + TEMPLATE.replace("assistant\n{% endif", "assistant\n" + opens + "{% endif")
    )


def taken_apart(tokenizer: Any, prompt: str, reply: str) -> tuple[str, str, list[Any]]:
    found = channels(tokenizer, tokenizer(prompt)["input_ids"])
    assert found is not None
    pieces = [piece for letter in reply for piece in found.feed(letter)] + found.end()
    shown = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("answer", "thinking")}
    assert (shown["answer"], shown["thinking"]) == (found.answer, found.thinking)
    return found.answer, found.thinking, found.tool_calls


@pytest.mark.parametrize(
    ("reply", "answer", "thinking", "tools"),
    [
        (ANALYSIS + FINAL, "Paris.", "France. Easy.", []),
        (FINAL.removeprefix("<|start|>assistant"), "Paris.", "", []),
        (ANALYSIS + CALL, "", "France. Easy.", [TOOL]),
        (" to=functions.look<|channel|>commentary json<|message|>" + '{"town": "Paris"}<|call|>', "", "", [TOOL]),
        ("<|channel|>commentary<|message|>I shall look.<|end|>" + CALL, "I shall look.", "", [TOOL]),
        ("<|channel|>analysis<|message|>one<|end|>" + "<|start|>assistant" + ANALYSIS, "", "one\n\nFrance. Easy.", []),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}", "", []),
        ("<|channel|>analysis<|message|>cut o", "", "cut o", []),
        ("<|channel|>final<|message|>1 < 2, and to=you.", "1 < 2, and to=you.", "", []),
    ],
)
def test_gpt_oss(reply: str, answer: str, thinking: str, tools: list[Any]) -> None:
    assert taken_apart(GPT_OSS, QUESTION, reply) == (answer, thinking, tools)


@pytest.mark.parametrize(
    ("marks", "opens", "reply", "answer", "thinking", "tools"),
    [
        ("<think></think>", "", "<think>\nHm.\n</think>\n\nYes. ", "Yes.", "Hm.", []),
        ("<think></think>", "", "Yes.\n", "Yes.", "", []),
        ("<think></think>", "<think>\n", "Hm.\n</think>\n\nYes.", "Yes.", "Hm.", []),
        ("<think></think>", "<think>\n\n</think>\n\n", "Yes.", "Yes.", "", []),
        ("</think>", "<think>", "Hm.", "", "Hm.", []),  # the template only looks for the end; the reply is cut off
        ("<think></think>", "</think>", "Yes.", "Yes.", "", []),
        (
            "<think></think><answer></answer>",
            "",
            "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>",
            "Yes.",
            "Hm.",
            [],
        ),
        ("<think></think>", "", "An <answer> of 1 < 2", "An <answer> of 1 < 2", "", []),
        ("[THINK][/THINK]", "", "[THINK]Hm.[/THINK]Yes.", "Yes.", "Hm.", []),
        ("<|channel><channel|>", "", "<|channel>thought\nHm.<channel|>Yes.", "Yes.", "Hm.", []),
        (
            "<think></think><tool_call>",
            "",
            'Hm.\n<tool_call>\n{"name": "look", "arguments": {"town": "Paris"}}\n</tool_call>\nYes.',
            "Hm.\n\nYes.",
            "",
            [TOOL],
        ),
        ("<tool_call>", "", "<tool_call>look at it", "", "", [{"type": "function", "function": "look at it"}]),
    ],
)
def test_known_marks(marks: str, opens: str, reply: str, answer: str, thinking: str, tools: list[Any]) -> None:
    tokenizer = thinker(marks, opens)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    assert taken_apart(tokenizer, prompt, reply) == (answer, thinking, tools)


def test_a_chat_without_marks_is_not_taken_apart() -> None:
    assert channels(tiny_tokenizer(), [1, 2]) is None


@given(st.lists(st.integers(0, 200), max_size=8).map(sorted), st.sampled_from([ANALYSIS + FINAL, ANALYSIS + CALL]))
def test_where_the_text_is_cut_changes_nothing(cuts: list[int], reply: str) -> None:
    found = channels(GPT_OSS, GPT_OSS(QUESTION)["input_ids"])
    assert found is not None
    bounds = [0, *cuts, len(reply)]
    pieces = [p for first, last in pairwise(bounds) for p in found.feed(reply[first:last])]
    pieces += found.end()
    answer, thinking, tools = taken_apart(GPT_OSS, QUESTION, reply)
    assert (found.answer, found.thinking, found.tool_calls) == (answer, thinking, tools)
    assert "".join(piece.text for piece in pieces if piece.kind == "answer") == answer


def test_a_tokenizers_own_response_template_goes_first() -> None:
    tokenizer = thinker()
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"thinking": {"open": "{", "close": "}"}, "content": {"close": "<|im_end|>"}},
    }
    prompt = "<|im_start|>user\n{<|im_end|>\n<|im_start|>assistant\n{"
    assert taken_apart(tokenizer, prompt, "Hm.}<think>") == ("<think>", "Hm.", [])


def test_a_response_template_that_is_none_is_named_and_passed_over() -> None:
    tokenizer = thinker()
    tokenizer.response_template = {"fields": 5}
    with pytest.warns(UserWarning, match=r"response_template cannot be used \(ValueError"):
        assert taken_apart(tokenizer, "?", "<think>Hm.</think>Yes.") == ("Yes.", "Hm.", [])


def test_a_region_that_is_not_what_its_template_says_is_shown_as_it_is() -> None:
    found = Channels(
        {"start_anchor": "?", "fields": {"content": {}, "n": {"open": "[", "close": "]", "content": "int"}}}, ""
    )
    for text in ("One ", "[two", "] three", " [4] five"):  # nothing is taken apart any more
        found.feed(text)
    found.end()
    assert found.answer == "One\n\n] three [4] five"


CALLS = {
    "start_anchor": "?",
    "fields": {"content": {}, "tool_calls": {"open": "<c>", "close": "</c>", "content": "json"}},
}


def test_a_call_that_is_cut_off_is_shown_as_it_is() -> None:
    found = Channels(CALLS, "")
    pieces = [*found.feed('Yes. <c>["look'), *found.end(), *found.end()]
    assert [piece.text for piece in pieces] == ["Yes.", '["look']
    assert not found.tool_calls


def test_several_calls_at_once_are_several() -> None:
    found = Channels(CALLS, "")
    pieces = [*found.feed('<c>[{"name": "look"}, {"name": "listen"}]</c>'), *found.end()]
    assert [piece.text for piece in pieces] == ["look({})", "listen({})"]


def test_what_the_prompt_has_of_the_reply_belongs_to_it() -> None:
    fields = {"thinking": {"open": "<t>", "close": "</t>"}, "content": {}}
    found = Channels({"start_anchor": "?", "fields": fields}, "?<t>Half a")
    pieces = [*found.feed(" thought.</t>Yes."), *found.end()]
    assert [piece.text for piece in pieces] == [" thought.", "Yes."]
    assert (found.thinking, found.answer) == ("Half a thought.", "Yes.")


CALLING = {"content": {}, "tool_calls": {"open": "<call>", "close": "</call>", "repeats": True, "content": "json"}}


@pytest.mark.parametrize(
    ("fields", "reply", "answer", "calls"),
    [
        (CALLING, "Well. <call>look!</call> So.", "Well.\n\n<call>look!</call> So.", []),
        (CALLING, "<call>look!</call>", "<call>look!</call>", []),
        (CALLING, '<call>{"a": 1', '<call>{"a": 1', []),
        (CALLING, '<call>{"a": 1}</call>\n<call>{"b": 2}</call>', "", [{"a": 1}, {"b": 2}]),
        (CALLING | {"n": {"open": "[", "close": "]", "optional": False}}, '<call>{"a": 1}</call>', "", [{"a": 1}]),
    ],
)
def test_calls_are_whole_or_shown_as_they_are(fields: Any, reply: str, answer: str, calls: list[Any]) -> None:
    """However they come: letter by letter, or in pieces as tokens are. `n` would have to be there, and is not."""
    for size in (1, 3, 6):
        found = Channels({"start_anchor": "\0", "fields": fields}, "")
        for start in range(0, len(reply), size):
            found.feed(reply[start : start + size])
        found.end()
        assert (found.answer, found.tool_calls) == (answer, calls)


def said(chat: Chat, text: str) -> tuple[str, Any]:
    pieces: list[str] = []
    with Interrupt() as interrupt:
        reply = chat.ask(text, interrupt, pieces.append)
    return "".join(pieces), reply


def test_chat_streams_the_answer_alone_and_remembers_it_by_fields(capsys: Any) -> None:
    model = Scripted(GPT_OSS, ANALYSIS + FINAL, ANALYSIS + CALL, FINAL)
    chat = Chat(model, "tiny", SamplingOptions())
    streamed, reply = said(chat, "What is the capital of France?")
    assert streamed == reply.text == "Paris."
    assert (reply.thinking, reply.as_dict()["thinking"]) == ("France. Easy.",) * 2
    assert "Easy" not in capsys.readouterr().err
    said(chat, "Look at it.")
    assert 'it calls a tool: look({"town": "Paris"})' in capsys.readouterr().err
    said(chat, "?")
    assert GPT_OSS.decode(model.prompts[2]) == (
        f"{QUESTION}<|channel|>final<|message|>Paris.<|end|><|start|>user<|message|>Look at it.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>France. Easy.<|end|><|start|>assistant to=functions.look"
        '<|channel|>commentary json<|message|>{"town": "Paris"}<|call|><|start|>user<|message|>?<|end|>'
        "<|start|>assistant"
    )
    saved = json.loads(json.dumps(chat.conversation.messages()))
    assert saved[1] == {"role": "assistant", "content": "Paris.", "reasoning_content": "France. Easy."}
    assert saved[3]["tool_calls"] == [TOOL]


def test_show_thinking_shows_it_on_standard_error_in_lines_of_its_own(capsys: Any) -> None:
    chat = Chat(Scripted(GPT_OSS, ANALYSIS + FINAL), "tiny", SamplingOptions(), show_thinking=True)
    assert said(chat, "?")[0] == "Paris."
    assert capsys.readouterr().err == "(thinking) France. Easy.\n"


def test_a_reply_that_only_thinks_says_so_and_is_no_turn(capsys: Any) -> None:
    chat = Chat(Scripted(thinker(), "<think>Hm"), "tiny", SamplingOptions(max_new_tokens=9))
    assert said(chat, "?")[0] == ""
    assert "still thinking, so there is no answer" in capsys.readouterr().err
    assert chat.conversation.turns == []


def test_a_reply_without_the_marks_that_were_expected_is_the_answer() -> None:
    streamed, reply = said(Chat(Scripted(GPT_OSS, "Paris.<|end|>"), "tiny", SamplingOptions()), "?")
    assert streamed == reply.text == "Paris."


def test_a_call_that_the_template_cannot_show_stays_in_history_as_text() -> None:
    model = Scripted(thinker("<tool_call>"), "<tool_call>look around</tool_call>", "Yes.")
    chat = Chat(model, "tiny", SamplingOptions())
    said(chat, "?")
    said(chat, "!")
    assert "assistant\nlook around<|im_end|>" in model.tokenizer.decode(model.prompts[1])
