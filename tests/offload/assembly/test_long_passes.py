"""What is longer than a pass is read in several, on every way of generating, and answered as in one; or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from cache.errors import ContextError
from offload.model import OffloadedModel

REPLY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


def repeating() -> torch.Tensor:
    """85 tokens, where a pass has 64, that say the same again and again: looking back finds continuations."""
    return tiny.ids(1, 17, seed=2).repeat(1, 5)


@pytest.mark.parametrize("helped", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_a_helped_reply_to_a_long_prompt(model: OffloadedModel, resident: Any, helped: dict[str, Any]) -> None:
    helped = {name: resident if value is True else value for name, value in helped.items()}
    expected = resident.generate(repeating(), **REPLY)
    assert torch.equal(model.generate(repeating(), **REPLY, **helped), expected)
    assert model.stats.as_dict()["prefill_tokens"] >= 85


def test_a_long_prompt_of_embeddings(model: OffloadedModel, resident: Any) -> None:
    embeds = resident.get_input_embeddings()(tiny.ids(1, 85)).detach()
    expected = resident.generate(tiny.ids(1, 85), **REPLY)[:, 85:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **REPLY), expected)


def test_hidden_states_of_all_tokens(model: OffloadedModel, resident: Any) -> None:
    asked = REPLY | {"output_hidden_states": True, "return_dict_in_generate": True}
    expected, found = (each.generate(tiny.ids(1, 85), **asked).hidden_states for each in (resident, model))
    assert [layer.shape for layer in found[0]] == [layer.shape for layer in expected[0]]
    torch.testing.assert_close(found[0][-1], expected[0][-1])


def test_a_static_cache_and_a_long_prompt(model: OffloadedModel, resident: Any) -> None:
    asked = REPLY | {"cache_implementation": "static"}
    expected = resident.generate(tiny.ids(1, 85), **asked)
    assert torch.equal(model.generate(tiny.ids(1, 85), **asked), expected)


def test_windows_do_not_hold_the_whole_prompt_for_an_assistant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers lets windows grow while tokens may be taken back; the plan has room for windows and a pass."""
    tiny.save(tmp_path, "gpt_oss")
    held: list[int] = []
    update = DynamicSlidingWindowLayer.update

    def noted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(layer, *args, **kwargs)
        held.append(layer.keys.shape[-2])
        return found

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", noted)
    prompt, window = repeating(), 24
    with tiny.open_model(tmp_path, context=128) as model:
        found = model.generate(prompt, prompt_lookup_num_tokens=3, prefill_chunk_size=8, **REPLY)
        assert max(held) < window + 8
        assert torch.equal(found, model.generate(prompt, prefill_chunk_size=8, **REPLY))


@pytest.fixture
def phi(tmp_path: Path) -> Iterator[OffloadedModel]:
    """Positions change for all tokens once there are more than 70; 64 go into a pass."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 70, "factor": 4.0,
        "long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "long_mscale": 1.3, "short_mscale": 1.0,
    }  # fmt: skip
    tiny.save(tmp_path, "phimoe", rope_parameters=rope, original_max_position_embeddings=70)
    with tiny.open_model(tmp_path, context=100) as model:
        yield model


def test_a_text_that_is_read_anew_in_the_middle_of_a_reply(phi: OffloadedModel, tmp_path: Path) -> None:
    ids, reply = tiny.ids(1, 60), {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = tiny.resident(tmp_path).generate(ids, **reply)
    caches: list[Any] = []
    phi.module.model.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    assert torch.equal(phi.generate(ids, **reply), expected)
    assert phi.stats.as_dict()["prefill_tokens"] == 60 + 71
    assert len(caches[0].layers) == 0 < len(caches[-1].layers)  # there is room for one, not for two


def test_a_static_cache_is_refused_where_chunks_have_to_know_of_the_whole(phi: OffloadedModel) -> None:
    with pytest.raises(ContextError, match=r"85 tokens does not fit a pass, which has room for 64.*take a dynamic one"):
        phi.generate(tiny.ids(1, 85), cache_implementation="static", **REPLY)


def test_minimax_long_prompts_beams_and_phases(tmp_path: Path) -> None:
    tiny.save(tmp_path, "minimax")
    resident = tiny.resident(tmp_path)
    with tiny.open_model(tmp_path, context=400) as model:
        assert model.plan.chunk == 256
        ids = tiny.ids(1, 300)
        with torch.no_grad():
            expected = resident(ids).logits[:, -1]
        output = model.generate(ids, **REPLY, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(output.logits[0], expected, rtol=0, atol=1e-4)
        assert output.past_key_values.get_seq_length() == 309
        stats = model.stats.as_dict()
        assert (stats["prefill_tokens"], stats["decode_tokens"]) == (300, 9)
        beams = REPLY | {"num_beams": 4, "max_new_tokens": 20}
        expected = resident.generate(tiny.ids(1, 40), use_cache=False, **beams)  # every pass from the beginning
        assert torch.equal(model.generate(tiny.ids(1, 40), **beams), expected)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_checkpoint_without_use_cache_has_one_all_the_same(file: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    expected = tiny.resident(tmp_path).generate(tiny.ids(1, 80), **REPLY)
    settings = json.loads((tmp_path / file).read_text()) | {"use_cache": False}
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="use_cache: false"):
        model = tiny.open_model(tmp_path, context=100)
    with model:
        assert torch.equal(model.generate(tiny.ids(1, 80), **REPLY), expected)
        assert model.stats.as_dict()["decode_tokens"] == 9


def test_no_cache_where_it_is_asked_for(model: OffloadedModel, resident: Any) -> None:
    expected = resident.generate(tiny.ids(1, 20), use_cache=False, **REPLY)
    assert torch.equal(model.generate(tiny.ids(1, 20), use_cache=False, **REPLY), expected)
    with pytest.raises(ContextError, match=r"use_cache=False.*up to 69 tokens.*room for 64"):
        model.generate(tiny.ids(1, 60), use_cache=False, **REPLY)


def test_what_cannot_be_cut_is_refused_with_the_numbers(model: OffloadedModel) -> None:
    with pytest.raises(ContextError, match=r"1 x 85 tokens .* has 64: output_attentions .* raise the memory budget"):
        model.generate(tiny.ids(1, 85), output_attentions=True, return_dict_in_generate=True, **REPLY)


def test_padding_alone_in_a_pass_is_refused_where_there_are_states(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_next")
    ids, mask = tiny.ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    with tiny.open_model(tmp_path) as model:
        with pytest.raises(ContextError, match=r"recurrent states.*leave out prefill_chunk_size"):
            model.generate(ids, attention_mask=mask, prefill_chunk_size=1, **REPLY)
        model.generate(ids, prefill_chunk_size=1, **REPLY)


# KV caches that go on.


def test_a_cache_goes_on_with_a_long_turn(model: OffloadedModel, resident: Any) -> None:
    ids = tiny.ids(1, 90)
    expected = resident.generate(ids, **REPLY)
    cache = DynamicCache(config=model.config)
    model.generate(ids[:, :20], max_new_tokens=1, do_sample=False, past_key_values=cache)
    model.reset_stats()
    assert torch.equal(model.generate(ids, past_key_values=cache, **REPLY), expected)
    assert model.stats.as_dict()["prefill_tokens"] == 70


def test_what_a_cache_has_counts_against_the_context(model: OffloadedModel) -> None:
    cache = model(tiny.ids(1, 60), use_cache=True).past_key_values
    with pytest.raises(ContextError, match="31 tokens, 60 before it and a reply make up to 101"):
        model.generate(tiny.ids(1, 31), attention_mask=torch.ones(1, 91), past_key_values=cache, **REPLY)
    assert cache.get_seq_length() == 60


def test_several_tokens_after_a_mamba_state(tmp_path: Path) -> None:
    tiny.save(tmp_path, "jamba")
    ids = tiny.ids(2, 40)
    with torch.no_grad():
        expected = tiny.resident(tmp_path)(ids).logits
    with tiny.open_model(tmp_path) as model:
        first = model(ids[:, :25], use_cache=True)
        second = model(ids[:, 25:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=0, atol=1e-4)


def test_a_cropped_cache_goes_on_where_it_can(model: OffloadedModel, resident: Any) -> None:
    ids = tiny.ids(1, 40)
    with torch.no_grad():
        expected = resident(ids).logits[:, 30:]
    cache = model(torch.cat([ids[:, :30], tiny.ids(1, 5, seed=3)], 1), use_cache=True).past_key_values
    cache.crop(-5)
    found = model(ids[:, 30:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_cropped_cache_is_refused_where_states_stay_behind(tmp_path: Path) -> None:
    tiny.save(tmp_path, "deepseek_v4")
    with tiny.open_model(tmp_path) as model:
        cache = model(tiny.ids(1, 16), use_cache=True).past_key_values
        cache.crop(-6)
        with pytest.raises(ContextError, match="cropped from 16 tokens to 10"):
            model(tiny.ids(1, 6), past_key_values=cache, use_cache=True)
