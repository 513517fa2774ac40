"""Generation settings that a reply cannot have, and whose fault it is when `generate` refuses."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_chat import Resident

from cache.errors import ModelError
from offload.options import SamplingOptions
from offload.talk.prompts import answer
from offload.talk.reply import Interrupt, stream_reply
from scripts.fuzz.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GREEDY = SamplingOptions(temperature=0, max_new_tokens=8)


def reply_with(sampling: SamplingOptions = GREEDY, tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    """A reply of at most 8 tokens, with these generation settings."""
    model = Resident(tokenizer=tokenizer)
    model.generation_config.update(**settings)
    with Interrupt() as interrupt:
        return stream_reply(model, TOKENIZER("Hello")["input_ids"], sampling, 8, interrupt, lambda piece: None)


PLAIN = reply_with().token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6},
        {"dola_layers": "high"},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "offloaded"},
        {"token_healing": True},
    ],
)
def test_what_a_streamed_reply_cannot_have_is_left_out_with_a_warning(settings: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="generation_config.json: "):
        assert reply_with(**settings).token_ids == PLAIN


def test_a_reply_leaves_the_settings_as_they_were() -> None:
    model = Resident(tokenizer=TOKENIZER)
    model.generation_config.update(num_beams=4, return_dict_in_generate=True)
    config, before = model.generation_config, model.generation_config.to_dict()
    with Interrupt() as interrupt, pytest.warns(UserWarning, match="num_beams is 4"):
        stream_reply(model, TOKENIZER("Hello")["input_ids"], GREEDY, 8, interrupt, lambda piece: None)
    assert model.generation_config is config and config.to_dict() == before


def test_settings_that_only_add_to_the_output_change_nothing() -> None:
    assert reply_with(return_dict_in_generate=True, output_scores=True).token_ids == PLAIN
    model = Resident(tokenizer=TOKENIZER)
    model.generation_config.update(return_dict_in_generate=True)
    prompt = TOKENIZER("Hello")["input_ids"]
    with Interrupt() as interrupt:
        assert answer(model, prompt, GREEDY, interrupt) == prompt + PLAIN


def test_a_reply_ends_at_a_stop_string() -> None:
    stop = TOKENIZER.decode(PLAIN[2:3])
    reply = reply_with(stop_strings=[stop])
    assert (reply.token_ids, reply.finish) == (PLAIN[: PLAIN.index(PLAIN[2]) + 1], "stop")
    with pytest.warns(UserWarning, match="stop_strings is .*: they need a tokenizer"):
        assert reply_with(tokenizer=None, stop_strings=[stop]).finish == "length"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"repetition_penalty": 0}, "strictly positive float"),
        ({"do_sample": True, "min_p": 2.0}, "min_p"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"do_sample": True, "suppress_tokens": list(range(258))}, "probability tensor"),
    ],
)
def test_what_generate_refuses_is_one_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=f"ask for what cannot be generated .*{says}"):
        reply_with(SamplingOptions(), **settings)


def test_a_fault_of_the_model_is_not_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeModel.forward", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        reply_with()
