"""Conversations: what the model sees, what is streamed, what Ctrl-C leaves, and the prompt people type at."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import Resident, Scripted, Terminal, save_checkpoint

from cache.errors import ContextError, ModelError
from offload.options import SamplingOptions
from offload.talk.conversation import Conversation, Turn
from offload.talk.reply import Interrupt, reply_limit, stream_reply
from offload.terminal.chat import Chat, Repl
from scripts.fuzz.tokenizer import TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GREEDY = SamplingOptions(temperature=0, max_new_tokens=8)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
interactive = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def ask(chat: Chat, text: str) -> Any:
    with Interrupt() as interrupt:
        return chat.ask(text, interrupt, lambda piece: None)


def reply_to(model: Resident, prompt: str, sampling: SamplingOptions, limit: int = 8) -> tuple[str, Any]:
    """The streamed text and the reply."""
    pieces: list[str] = []
    with Interrupt() as interrupt:
        ids = TOKENIZER(prompt)["input_ids"]
        reply = stream_reply(model, ids, sampling, limit, interrupt, pieces.append)
    return "".join(pieces), reply


def test_reply_is_what_transformers_generates() -> None:
    model = Resident(tokenizer=TOKENIZER)
    streamed, reply = reply_to(model, "Hello", GREEDY, limit=30)
    ids = TOKENIZER("Hello", return_tensors="pt").input_ids
    expected = model._model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
    assert reply.token_ids == expected
    assert streamed == reply.text == TOKENIZER.decode(expected)
    assert reply.finish == "length"


def test_end_token_ends_the_reply_and_is_not_shown() -> None:
    model = Resident(tokenizer=TOKENIZER)
    first = reply_to(model, "Hello", GREEDY, limit=1)[1].token_ids[0]
    model.generation_config.eos_token_id = [257, first]
    assert reply_to(model, "Hello", GREEDY)[1].finish == "stop"
    model.generation_config.suppress_tokens = [token for token in range(258) if token != 257]
    streamed, reply = reply_to(model, "Hello", GREEDY)
    assert (streamed, reply.text, reply.token_ids, reply.finish) == ("", "", [257], "stop")


def test_temperature_0_is_greedy_even_for_a_model_that_samples_by_default() -> None:
    model = Resident(tokenizer=TOKENIZER)
    greedy = reply_to(model, "Hello", GREEDY)[1].token_ids
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert reply_to(model, "Hello", GREEDY)[1].token_ids == greedy
    sampled = [tuple(reply_to(model, "Hello", SamplingOptions())[1].token_ids) for _ in range(3)]
    assert len(set(sampled)) == 3  # not given: the model's own configuration, which samples


def test_a_given_temperature_or_top_p_samples() -> None:
    model = Resident(tokenizer=TOKENIZER)
    greedy = reply_to(model, "Hello", GREEDY)[1].token_ids
    assert reply_to(model, "Hello", SamplingOptions(temperature=9.0))[1].token_ids != greedy
    assert reply_to(model, "Hello", SamplingOptions(top_p=1e-9))[1].token_ids == greedy
    assert reply_to(model, "Hello", SamplingOptions(temperature=9.0, top_p=1e-9))[1].token_ids == greedy


def test_seed_makes_sampling_reproducible() -> None:
    def talk(seed: int) -> list[int]:
        chat = Chat(
            Resident(tokenizer=TOKENIZER),
            "tiny",
            SamplingOptions(seed=seed, temperature=9.0, max_new_tokens=8),
        )
        return [*ask(chat, "Hello").token_ids, *ask(chat, "Again").token_ids]

    assert talk(1) == talk(1) != talk(2)


def test_reply_limit_is_the_flag_then_the_model_then_the_default_then_the_context() -> None:
    model = Resident(context=100)
    assert reply_limit(model, 40, SamplingOptions(max_new_tokens=60)) == 60
    assert reply_limit(model, 40, SamplingOptions()) == 60
    assert reply_limit(model, 40, SamplingOptions(), default=20) == 20
    assert reply_limit(model, 40, SamplingOptions(), default=256) == 60
    model.generation_config.max_new_tokens = 30
    assert reply_limit(model, 40, SamplingOptions(), default=20) == 30
    with pytest.raises(ContextError, match=r"40 tokens and a reply of 61 .* context of 100"):
        reply_limit(model, 40, SamplingOptions(max_new_tokens=61))
    with pytest.raises(ContextError, match="raise --context"):
        reply_limit(model, 100, SamplingOptions())


def test_model_sees_system_prompt_history_and_message_through_its_template() -> None:
    model = Resident(tokenizer=TOKENIZER)
    chat = Chat(model, "tiny", GREEDY, system="Be brief.")
    first = ask(chat, "Hello")
    ask(chat, "Why?")
    assert TOKENIZER.decode(model.prompts[1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        f"<|im_start|>assistant\n{first.text}<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_oldest_turns_go_when_the_context_is_full_and_the_system_prompt_never(capsys: Any) -> None:
    model = Resident(context=200, tokenizer=TOKENIZER)
    chat = Chat(model, "tiny", GREEDY, system="SYSTEM")
    for number in range(8):
        ask(chat, f"message {number}")
        prompt = TOKENIZER.decode(model.prompts[-1])
        assert len(model.prompts[-1]) + 8 <= 200
        assert "SYSTEM" in prompt
        assert f"message {number}" in prompt
    assert "message 0" not in prompt
    assert "message 6" in prompt
    assert "context of 200 tokens is full: forgot the oldest turn" in capsys.readouterr().err
    assert len(chat.conversation.messages()) == 1 + 2 * 8  # what is saved is all that was said


def test_a_message_that_can_never_fit_is_refused_and_forgets_nothing() -> None:
    model = Resident(context=200, tokenizer=TOKENIZER)
    chat = Chat(model, "tiny", GREEDY)
    ask(chat, "message 0")
    with pytest.raises(ContextError, match="context of 200"):
        ask(chat, "x" * 300)
    ask(chat, "message 1")
    assert "message 0" in TOKENIZER.decode(model.prompts[-1])


def test_a_long_message_may_take_the_room_that_trimming_keeps_for_replies() -> None:
    model = Resident(context=200, tokenizer=TOKENIZER)
    chat = Chat(model, "tiny", SamplingOptions(temperature=0))
    assert len(ask(chat, "x" * 170).token_ids) == 200 - len(model.prompts[0])


def test_reset_forgets_the_turns_and_keeps_the_system_prompt() -> None:
    model = Resident(tokenizer=TOKENIZER)
    chat = Chat(model, "tiny", GREEDY, system="SYSTEM")
    ask(chat, "Hello")
    chat.conversation.reset()
    ask(chat, "Why?")
    assert "Hello" not in TOKENIZER.decode(model.prompts[-1])
    assert "SYSTEM" in TOKENIZER.decode(model.prompts[-1])


def test_a_system_prompt_that_the_template_refuses_changes_nothing() -> None:
    conversation = Conversation(Resident(tokenizer=tiny_tokenizer(NO_SYSTEM)), "tiny")
    with pytest.raises(ModelError, match="no system role"):
        conversation.system = "Be brief."
    assert conversation.system is None
    assert conversation.fit("Hello", 100)[1] == 0


def test_a_model_that_cannot_chat_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ModelError, match=r"no tokenizer.*offload generate tiny --prompt-ids"):
        Conversation(Resident(), "tiny")
    with pytest.raises(ModelError, match=r"no chat template.*offload generate tiny --prompt TEXT"):
        Conversation(Resident(tokenizer=tiny_tokenizer(None)), "tiny")


@pytest.fixture
def sigint_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("sigint_restored")
def test_ctrl_c_stops_the_reply_and_keeps_what_was_said() -> None:
    model = Resident(tokenizer=TOKENIZER)
    chat = Chat(model, "tiny", SamplingOptions(temperature=0, max_new_tokens=100))
    pieces: list[str] = []

    def press_at_third(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with Interrupt() as interrupt:
        reply = chat.ask("Hello", interrupt, press_at_third)
    assert reply.finish == "interrupted"
    assert "".join(pieces) == reply.text
    assert chat.conversation.turns == [Turn("Hello", reply.text)]
    assert len(reply.token_ids) < 100
    ask(chat, "Why?")
    assert f"assistant\n{reply.text}<|im_end|>" in TOKENIZER.decode(model.prompts[-1])


@pytest.mark.usefixtures("sigint_restored")
def test_ctrl_c_before_the_first_word_leaves_no_turn_behind() -> None:
    model = Resident(tokenizer=TOKENIZER)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(257))  # leaves one that has no text
    chat = Chat(model, "tiny", SamplingOptions(temperature=0))
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        reply = chat.ask("Hello", interrupt, lambda piece: None)
    assert (reply.finish, reply.text, len(reply.token_ids)) == ("interrupted", "", 1)
    assert chat.conversation.turns == []


@pytest.mark.usefixtures("sigint_restored")
def test_the_third_ctrl_c_gets_out_of_a_reply_that_does_not_stop() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("tiny")))


@interactive
def test_a_session_at_a_terminal(checkpoint: str, tmp_path: Path) -> None:
    saved, other = tmp_path / "chat.json", tmp_path / "other.json"
    other.write_text("mine")
    with Terminal("chat", checkpoint, "--system", "Be brief.", "--temperature", "0") as terminal:
        terminal.enter("/stats")
        terminal.wait_for("no reply yet")
        terminal.enter("Hello")
        terminal.wait_for("Hello\n")
        terminal.wait_for_more()
        terminal.type("\x03")
        terminal.wait_for("(stopped) · ")
        status = terminal.wait_for("GiB\n")
        assert re.fullmatch(r"[\d.]+ tok/s · hit rate \d+% · RAM [\d.]+ [MG]iB of [\d.]+ GiB\n", status)
        terminal.enter("/stats")
        assert re.search(r"cpu\.bytes_in +\d", terminal.wait_for("cpu.peak_bytes"))
        terminal.enter("/system Be long.")
        terminal.wait_for("(system prompt: Be long.)")
        terminal.enter(f"/save {other}")
        terminal.wait_for("exists: choose another name")
        for _ in range(2):  # the same file again is its own to replace
            terminal.enter(f"/save {saved}")
            terminal.wait_for("(saved 3 messages")
        terminal.enter("/reset")
        terminal.wait_for("(forgot the conversation)")
        terminal.enter("/nonsense")
        terminal.wait_for("error: no command /nonsense")
        terminal.enter("/save")
        terminal.wait_for("/save needs a file name")
        terminal.enter("/help")
        terminal.wait_for("/quit")
        terminal.enter("/quit")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.seen
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert [message["role"] for message in content["messages"]] == ["system", "user", "assistant"]
    assert content["messages"][0]["content"] == "Be long."
    assert content["messages"][1]["content"] == "Hello"
    assert content["messages"][2]["content"]
    assert other.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "other.json"]


def test_a_fault_leaves_the_conversation_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    chat = Chat(Scripted(TOKENIZER, "Yes."), "tiny", GREEDY, system="Be brief.")  # has nothing more to say
    lines = iter(["Hello", "Why?"])
    monkeypatch.setattr("offload.terminal.chat._read_line", lambda: next(lines))
    with pytest.raises(IndexError):
        Repl(chat).run()
    [path] = (tmp_path / "chats").iterdir()
    said = [message["content"] for message in json.loads(path.read_text(encoding="utf-8"))["messages"]]
    assert said == ["Be brief.", "Hello", "Yes.", "Why?"]


@interactive
@pytest.mark.parametrize("last", ["\x03", "\x04"], ids=["Ctrl-C twice", "Ctrl-D"])
def test_leaving_at_the_prompt(checkpoint: str, last: str) -> None:
    with Terminal("chat", checkpoint) as terminal:
        terminal.wait_for_prompt()
        terminal.type("\x03")
        terminal.wait_for("(Ctrl-C again or Ctrl-D leaves)")
        terminal.wait_for_prompt()
        terminal.type(last)
        assert terminal.wait() == 0
