"""One pass as several, by itself: what each chunk is given, what rotary embeddings are told, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from cache.errors import ContextError
from offload.assembly.cutting import read_in_chunks

IDS = torch.arange(8)[None]


class Passes:
    """Notes the passes, and what is said of the whole before and after them; a pass says its tokens' ids."""

    recurrent = True

    def __init__(self, fails: bool = False) -> None:
        self.given: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.told: list[int | None] = []
        self._fails = fails

    def read_up_to(self, position: int | None) -> None:
        self.told.append(position)

    def run(self, given: dict[str, Any], tokens: torch.Tensor, length: int) -> CausalLMOutputWithPast:
        if self._fails:
            raise ValueError("no")
        self.given.append(given)
        self.lengths.append(length)
        kept = given.get("logits_to_keep") or tokens.shape[1]
        states = tokens[..., None].float()
        return CausalLMOutputWithPast(logits=states[:, -kept:], past_key_values=CACHE, hidden_states=(states, -states))


CACHE: Any = SimpleNamespace(layers=[])


def read(passes: Passes, length: int = 0, longest: int = 3, **given: Any) -> Any:
    ids = given.setdefault("input_ids", IDS)
    return read_in_chunks(passes.run, given, ids, length, longest, passes, asked=False)  # type: ignore[arg-type]


def test_each_chunk_has_its_part_of_everything() -> None:
    passes = Passes()
    mask, positions = torch.ones(1, 12, dtype=torch.long), torch.arange(4, 12)[None]
    output = read(passes, length=4, attention_mask=mask, position_ids=positions)
    assert [given["input_ids"].tolist() for given in passes.given] == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7]]]
    assert [given["position_ids"].tolist() for given in passes.given] == [[[4, 5, 6]], [[7, 8, 9]], [[10, 11]]]
    assert [given["attention_mask"].shape[1] for given in passes.given] == [7, 10, 12]
    assert passes.lengths == [4, 7, 10]
    assert output.logits.flatten().tolist() == list(range(8))
    assert [layer.flatten().tolist() for layer in output.hidden_states] == [[*range(8)], [-n for n in range(8)]]


@pytest.mark.parametrize(("kept", "asked"), [(1, [1, 1, 1]), (4, [1, 2, 2]), (0, [3, 3, 2])])
def test_only_logits_that_are_kept_are_made(kept: int, asked: list[int]) -> None:
    """One of a chunk at least, since none means all."""
    passes = Passes()
    output = read(passes, logits_to_keep=kept)
    assert [given["logits_to_keep"] for given in passes.given] == asked
    assert output.logits.flatten().tolist() == list(range(8))[-kept:]


@pytest.mark.parametrize("fails", [False, True])
def test_chunks_know_the_last_position_until_they_are_read(fails: bool) -> None:
    passes = Passes(fails)
    for given in ({}, {"position_ids": torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]])}):  # two are padding
        try:
            read(passes, length=2, **given)
        except ValueError:
            assert fails
    assert passes.told == [9, None, 5, None]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"use_cache": False}, "every token is read with all before it"),
        ({"output_attentions": True}, "output_attentions has no form"),
        ({"attention_mask": {"full_attention": None}}, "its attention mask is made for one pass"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "its attention mask is made for one pass"),
        ({"position_ids": torch.zeros(1, 1)}, "its position_ids are not one for each token"),
        ({"token_type_ids": IDS}, "token_type_ids belongs to the whole of it"),
        ({"per_layer": {"a": 1}}, "per_layer belongs to the whole of it"),
        ({"input_ids": IDS.expand(4, 8)}, "not one token of each goes into a pass"),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 5] * 2), "input_ids": IDS.expand(2, 8)}, "read one by one"),
    ],
)
def test_what_cannot_be_cut(given: dict[str, Any], says: str) -> None:
    passes = Passes()
    with pytest.raises(ContextError, match=says):
        read(passes, **given)
    assert not passes.given and not passes.told
