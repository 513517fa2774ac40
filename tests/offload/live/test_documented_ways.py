"""In each of the ways to use a model that transformers' guides show, ours gives what the resident one gives.

docs/python.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import documented
import pytest
import tiny
import tiny_chat
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer
from ways import CHAT, EXAMPLES, TEXT, Example, Setup

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of its own parts


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Setup, Setup]]:
    """The resident model, and ours with a fifth of its experts cached."""
    folder: Path = documented.save(tmp_path_factory.mktemp("ways"), [TEXT, *(part["content"] for part in CHAT)])
    resident, assistant, stranger = tiny.resident(folder), tiny.resident(folder), tiny_chat.tiny_model()
    with torch.no_grad():
        for parameter in assistant.lm_head.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tiny.open_model(folder, expert_cache=5 * tiny.SLOT, context=2048) as model:
        yield Setup(resident, tokenizer, assistant, stranger), Setup(model, tokenizer, assistant, stranger)


@pytest.mark.parametrize("way", EXAMPLES, ids=lambda way: way.__name__)
def test_it_gives_what_it_gives_on_the_resident_model(way: Example, setups: tuple[Setup, Setup]) -> None:
    results = []
    for given in setups:
        torch.manual_seed(0)
        results.append(tree_leaves(way(given)))
    expected, ours = results
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert tiny.same_bits(a, b) if isinstance(b, torch.Tensor) else a == b
