"""However a reply is generated, it is what the resident model says: sampling, beams, caches, helpers, streamers."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
import tiny
import torch
from families import families
from family_runs import CACHES, Setup, cache_bytes, one_core, open_model, prompt
from transformers.generation.streamers import BaseStreamer

_one_core = pytest.fixture(scope="module", autouse=True)(one_core)


@pytest.fixture(scope="module", params=["qwen2_moe", "gpt_oss"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A resident model and the same one offloaded with half of its experts cached."""
    family, folder = families()[request.param], tmp_path_factory.mktemp(request.param)
    family.save(folder, torch.bfloat16)
    resident = family.resident(folder, torch.bfloat16)
    setup = Setup(torch.bfloat16, "cpu", CACHES[3])
    with open_model(folder, setup, cache_bytes(setup.cache, resident), context=512) as model:
        yield resident, model


def assert_same_generation(pair: tuple[Any, Any], **kwargs: Any) -> torch.Tensor:
    """Both models continue the prompt alike, logits included; returns what they said, ids [rows, prompt + 32]."""
    outputs = []
    for model in pair:
        torch.manual_seed(7)
        arguments = prompt(2) | {"max_new_tokens": 32, "min_new_tokens": 32} | kwargs
        outputs.append(model.generate(**arguments, output_logits=True, return_dict_in_generate=True))
    resident, offloaded = outputs
    assert torch.equal(resident.sequences, offloaded.sequences)
    assert len(resident.logits) == len(offloaded.logits)
    assert all(tiny.same_bits(a, b) for a, b in zip(resident.logits, offloaded.logits, strict=True))
    assert pair[1].stats.as_dict()["misses"] > 0
    sequences: torch.Tensor = offloaded.sequences
    return sequences


def one_sequence() -> dict[str, torch.Tensor]:
    """A prompt that repeats itself, so that looking back finds continuations."""
    ids = tiny.ids(1, 6, seed=2).repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_sampling_with_a_seed(pair: tuple[Any, Any]) -> None:
    sampled = assert_same_generation(pair, do_sample=True, temperature=1.5, top_p=0.9, top_k=0)
    assert not torch.equal(sampled, assert_same_generation(pair, do_sample=False))


def test_several_samples_of_each_prompt(pair: tuple[Any, Any]) -> None:
    sampled = assert_same_generation(pair, do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 6


def test_beam_search(pair: tuple[Any, Any]) -> None:
    beams = assert_same_generation(pair, num_beams=4, do_sample=False)
    assert not torch.equal(beams, assert_same_generation(pair, do_sample=False))


def test_static_cache(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, do_sample=False, cache_implementation="static")


def test_prompt_in_chunks(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, do_sample=False, prefill_chunk_size=3)


def test_prompt_lookup_decoding(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, **one_sequence(), do_sample=False, prompt_lookup_num_tokens=3)


def test_assisted_decoding(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, **one_sequence(), do_sample=False, assistant_model=pair[0])


class Collector(BaseStreamer):  # type: ignore[misc]
    """Passes every token on as it is generated; None ends them."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue[torch.Tensor | None] = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        self.tokens.put(value)

    def end(self) -> None:
        self.tokens.put(None)


def test_streamer_in_another_thread(pair: tuple[Any, Any]) -> None:
    inputs, streamer = one_sequence(), Collector()
    arguments = {**inputs, "max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    thread = Thread(target=pair[1].generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    heard = list(iter(streamer.tokens.get, None))
    thread.join()
    streamed = torch.cat([tokens.reshape(-1) for tokens in heard])
    assert len(heard) == 1 + 32
    assert torch.equal(streamed, pair[0].generate(**arguments)[0])
