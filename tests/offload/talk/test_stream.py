"""Text from tokens as they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.talk.stream import Detokenizer
from scripts.fuzz.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.lists(st.integers(0, 257), max_size=60) | st.text().map(lambda text: TOKENIZER(text)["input_ids"]))
def test_pieces_joined_are_the_text_of_all_tokens(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.feed([token]) for token in ids]
    assert "".join([*pieces, detokenizer.flush()]) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_is_shown_only_when_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.feed([token]) for token in TOKENIZER("aé")["input_ids"]] == ["a", "", "é"]


def test_special_tokens_are_no_text_unless_they_are_kept() -> None:
    ids = TOKENIZER("a<|im_start|>b<|im_end|>c")["input_ids"]
    assert Detokenizer(TOKENIZER).feed(ids) == "abc"
    assert Detokenizer(TOKENIZER, kept={256}).feed(ids) == "a<|im_start|>bc"
