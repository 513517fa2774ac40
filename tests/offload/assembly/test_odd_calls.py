"""`generate` told something odd: what the resident model answers is answered, and what it refuses is its own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, GenerationConfig

from cache.errors import ContextError
from cache.traces.trace import Trace
from offload.model import OffloadedModel

IDS = tiny.ids(1, 5)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.generation")  # the same as the resident's
SHORT: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
Call = Callable[[Any], Any]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[OffloadedModel]:
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW, context=100) as model:
        yield model


def embeds(model: Any) -> torch.Tensor:
    vectors: torch.Tensor = model.get_input_embeddings()(IDS).detach()
    return vectors


def cached(model: Any) -> DynamicCache:
    """A KV cache of the first three tokens."""
    cache: DynamicCache = model(IDS[:, :3], use_cache=True).past_key_values
    return cache


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate(),
        lambda model: model.generate(None, input_ids=IDS, **SHORT),
        lambda model: model.generate(IDS, GenerationConfig(prefill_chunk_size=2, **SHORT)),
        lambda model: model.generate(IDS, GenerationConfig(max_length=7)),
        lambda model: model.generate(IDS.int(), **SHORT),
        lambda model: model.generate(input_ids=None, inputs_embeds=embeds(model), **SHORT),
        lambda model: model.generate(IDS, inputs_embeds=embeds(model), **SHORT),
        lambda model: model.generate(input_ids=IDS[:, :1], inputs_embeds=embeds(model), **SHORT),
        lambda model: model.generate(IDS, attention_mask=torch.ones(1, 900), **SHORT),
        lambda model: model.generate(IDS, past_key_values=cached(model), **SHORT),
        lambda model: model.generate(
            IDS[:, 3:], attention_mask=torch.ones(1, 5), past_key_values=cached(model), **SHORT
        ),
        lambda model: model.generate(IDS, assistant_model=model, **SHORT),
        lambda model: model.generate(IDS, None, None, None, None, None, model, **SHORT),
        lambda model: model.generate(IDS, assistant_model=model, max_new_tokens=4, do_sample=True),
    ],
)
def test_what_the_resident_model_answers(model: OffloadedModel, resident: Any, call: Call) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        expected = call(resident)
    torch.manual_seed(0)
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize(
    "call",
    [
        # No prompts.
        lambda model: model.generate(IDS[0], **SHORT),
        lambda model: model.generate(IDS[0, 0], **SHORT),
        lambda model: model.generate(IDS[None], **SHORT),
        lambda model: model.generate(IDS.tolist(), **SHORT),
        lambda model: model.generate("Hello", **SHORT),
        lambda model: model.generate(IDS[:, :0], **SHORT),
        lambda model: model.generate(IDS[:0], **SHORT),
        lambda model: model.generate(IDS.float(), **SHORT),
        lambda model: model.generate(IDS, input_ids=IDS, **SHORT),
        lambda model: model.generate(IDS, inputs=IDS, **SHORT),
        lambda model: model.generate(inputs_embeds=embeds(model)[0], **SHORT),
        lambda model: model.generate(inputs_embeds=embeds(model).tolist(), **SHORT),
        # What stands beside one.
        lambda model: model.generate(IDS, past_key_values=(), **SHORT),
        lambda model: model.generate(IDS, past_key_values=[], **SHORT),
        lambda model: model.generate(IDS, attention_mask=torch.ones(1, 3), **SHORT),
        lambda model: model.generate(IDS, attention_mask=torch.ones(5), **SHORT),
        lambda model: model.generate(IDS, attention_mask=[[1] * 5], **SHORT),
        # How long.
        lambda model: model.generate(IDS, max_length=5),
        lambda model: model.generate(IDS, max_length=0),
        lambda model: model.generate(IDS, assistant_model=model, prefill_chunk_size=0, **SHORT),
        lambda model: model.generate(IDS, max_new_tokens=0),
        lambda model: model.generate(IDS, max_new_tokens=-1),
        lambda model: model.generate(IDS, max_new_tokens="3"),
        lambda model: model.generate(IDS, max_length="9"),
        lambda model: model.generate(IDS, prefill_chunk_size=0, **SHORT),
        lambda model: model.generate(IDS, prefill_chunk_size=-1, **SHORT),
        lambda model: model.generate(IDS, prefill_chunk_size=-1, cache_implementation="static", **SHORT),
        lambda model: model.generate(IDS, prefill_chunk_size=2.5, **SHORT),
        lambda model: model.generate(IDS, prefill_chunk_size="2", **SHORT),
        lambda model: model.generate(IDS, prefill_chunk_size=True, **SHORT),
        lambda model: model.generate(IDS, prefill_chunk_size=2, use_cache=False, **SHORT),
        # How.
        lambda model: model.generate(IDS, num_beams="2", **SHORT),
        lambda model: model.generate(IDS, num_beams=2.5, **SHORT),
        lambda model: model.generate(IDS, generation_config={"max_new_tokens": 3}),
        lambda model: model.generate(IDS, generation_config="short"),
        lambda model: model.generate(IDS, temprature=3, **SHORT),
        lambda model: model.generate(tiny.ids(2, 5), assistant_model=model, **SHORT),
    ],
)
def test_what_the_resident_model_refuses(model: OffloadedModel, resident: Any, call: Call) -> None:
    with pytest.raises(Exception) as expected:
        call(resident)
    with pytest.raises(type(expected.value)) as error:
        call(model)
    assert str(error.value) == str(expected.value)
    assert torch.equal(model.generate(IDS, **SHORT), resident.generate(IDS, **SHORT))


@pytest.mark.parametrize("ids", [IDS + 1000, IDS - 1000])
def test_ids_that_nothing_is_known_of(model: OffloadedModel, resident: Any, ids: torch.Tensor) -> None:
    """The resident model's error, and which id it is."""
    for each in (resident, model):
        with pytest.raises(IndexError):
            each.generate(ids, **SHORT)


def test_a_model_that_assists_itself_has_two_caches(model: OffloadedModel, resident: Any) -> None:
    ids, arguments = tiny.ids(1, 40), {"max_new_tokens": 10, "do_sample": False}
    expected = resident.generate(ids, assistant_model=resident, **arguments)
    assert torch.equal(model.generate(ids, assistant_model=model, **arguments), expected)
    assert torch.equal(model.generate(ids, assistant_model=model.module, **arguments), expected)
    with pytest.raises(ContextError, match=r"up to 51, 1 at once and as many for the assistant, .* itself: 102 tokens"):
        model.generate(ids, assistant_model=model, max_new_tokens=11)


def test_what_cannot_fit_is_refused_however_it_is_told(model: OffloadedModel) -> None:
    for call in (
        lambda: model.generate(max_new_tokens=100),
        lambda: model.generate(IDS, GenerationConfig(max_new_tokens=96)),
        lambda: model.generate(inputs=None, input_ids=IDS, max_new_tokens=96),
        lambda: model.generate(input_ids=None, inputs_embeds=embeds(model), max_new_tokens=96),
    ):
        with pytest.raises(ContextError, match="make up to 101"):
            call()


def test_a_text_that_begins_with_nothing_is_recorded(model: OffloadedModel, tmp_path: Path) -> None:
    with model.record_trace(tmp_path / "t.safetensors"):
        model.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert Trace.open(tmp_path / "t.safetensors").num_tokens == 1 + 3
