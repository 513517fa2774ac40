"""One token's large products on our kernels' threads, the rest on the calling one: who computes changes no bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from offload.formats import nf4
from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.nf4_experts import Nf4Rows

pytestmark = pytest.mark.skipif(not native.level(), reason="no kernel of ours runs on this CPU")

SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "tie_word_embeddings": False}
"""Large enough for routers to be a small part, and in whole blocks."""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2 and own_threads.count() == 2
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("own"), "qwen3_moe", torch.bfloat16, **SIZES)


def watched(model: Any) -> list[tuple[int, int]]:
    """(torch's threads, our kernels') in each forward pass from now on."""
    seen: list[tuple[int, int]] = []
    layer = model.module.get_submodule(model.parts.experts.layers[0].path)
    layer.register_forward_pre_hook(lambda *args: seen.append((torch.get_num_threads(), own_threads.count())))
    return seen


def test_only_few_tokens_where_all_large_products_are_ours(folder: Path) -> None:
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for options, few in (({"experts": "nf4", "dense": "nf4"}, 1), ({"experts": "nf4"}, 2), ({}, 2)):
        with tiny.open_model(folder, device="cpu", threads=2, exact=True, **options) as model:
            seen = watched(model)
            model.generate(tiny.ids(1, 5), **arguments)
            model.generate(tiny.ids(2, 5), **arguments)
            assert set(seen) == {(few, 2)}
            seen.clear()
            model.generate(tiny.ids(1, 40), **arguments)
            assert seen == [(2, 2), *[(few, 2)] * 3]


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_are_computed_beside_no_other_threads(
    tokens: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prompt, too: torch's threads would watch for work on the processors that ours are on."""
    seen: list[tuple[int, int]] = []
    compute = Nf4Rows.compute

    def watched_compute(self: Nf4Rows, *args: Any) -> None:
        seen.append((torch.get_num_threads(), own_threads.count()))
        compute(self, *args)

    monkeypatch.setattr(nf4, "_most_rows", lambda: sys.maxsize)  # with AMX fewer
    monkeypatch.setattr(Nf4Rows, "compute", watched_compute)
    with tiny.open_model(folder, device="cpu", threads=2, experts="nf4", dense="nf4") as model, torch.no_grad():
        model(tiny.ids(1, tokens))
    assert set(seen) == {(1, 2)}


@pytest.mark.parametrize(
    ("changes", "device"),
    [({"tie_word_embeddings": True}, "cpu"), ({"moe_intermediate_size": 48}, "cpu"), ({}, "emulated")],
)
def test_not_where_a_large_product_is_somebody_else_s(tmp_path: Path, changes: dict[str, Any], device: str) -> None:
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16, **{**SIZES, **changes})
    with tiny.open_model(tmp_path, device=device, threads=2, experts="nf4", dense="nf4") as model:
        seen = watched(model)
        model.generate(tiny.ids(1, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert set(seen) == {(2, 2)}


def test_each_thread_has_its_own_and_they_nest() -> None:
    def other() -> tuple[int, int]:
        torch.set_num_threads(2)
        return torch.get_num_threads(), own_threads.count()

    with own_threads.alone():
        with own_threads.alone():
            assert (torch.get_num_threads(), own_threads.count()) == (1, 2)
        assert (torch.get_num_threads(), own_threads.count()) == (1, 2)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(other).result() == (2, 2)


def test_the_bits_are_those_of_any_number_of_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for threads, longest in ((2, 2048), (2, 0), (1, 2048)):
        monkeypatch.setattr("offload.assembly.passes._LONG_CONTEXT", longest)
        with tiny.open_model(folder, device="cpu", threads=threads, experts="nf4", dense="nf4") as model:
            seen = watched(model)
            cache = model(tiny.ids(1, 6)).past_key_values
            outputs.append(torch.cat([model(tiny.ids(1, 1, seed=s), past_key_values=cache).logits for s in range(5)]))
            assert seen[-1] == (1 if longest else threads, threads)
    assert tiny.same_bits(outputs[0], outputs[1]) and tiny.same_bits(outputs[0], outputs[2])


def test_a_pass_that_fails_gives_them_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny.open_model(folder, device="cpu", threads=2, experts="nf4", dense="nf4") as model:
        cache = model(tiny.ids(1, 6)).past_key_values
        with monkeypatch.context() as patch:
            patch.setattr(model.parts.runtime, "run", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tiny.ids(1, 1), past_key_values=cache)
        assert torch.get_num_threads() == 2 and own_threads.count() == 2
