"""Memory that a kernel is given for one call is there until the call is over, however much it is."""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import SHAPE, answers
from tiny import open_model, same_bits, save

from offload.formats.cpu import native, room

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

SIZES = {**SHAPE, "intermediate_size": 64, "moe_intermediate_size": 64}
CALLS = {
    "token_sublayer": "token_sublayer",
    "nf4_experts": "pool_begin",
    "plain_experts": "pool_begin",
    "routing": "route",
}
"""By the module, the function that it calls with such memory."""


@pytest.mark.parametrize("experts", ["auto", "nf4"])
def test_it_is_held(experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "qwen3_moe", **SIZES)
    library, called = native.library(), set()
    given: list[weakref.ref[torch.Tensor]] = []
    of_begun: list[weakref.ref[torch.Tensor]] = []
    assert library is not None

    def remembered(nbytes: int, *, begun: bool = False) -> torch.Tensor:
        memory = room.room(nbytes, begun=begun)
        given.append(weakref.ref(memory))
        if begun:
            of_begun.append(given[-1])
        return memory

    def checked(name: str, function: Any) -> Any:
        def call(*args: Any) -> None:
            assert given[-1]() is not None
            called.add(name)
            function(*args)
            # What was begun goes on until the next layer's call, or until it is waited for.
            assert name == "token_sublayer" or not of_begun or of_begun[-1]() is not None

        return call

    with open_model(tmp_path, exact=False, dense="nf4", dtype="bf16", experts=experts) as model:
        wanted = answers(model)
        monkeypatch.setattr(room, "_MOST", 0)
        for module in CALLS:
            monkeypatch.setattr(importlib.import_module(f"offload.formats.cpu.{module}"), "room", remembered)
        for name in set(CALLS.values()):
            monkeypatch.setattr(library, name, checked(name, getattr(library, name)))
        found = answers(model)
        for layer in model.module.model.layers:
            layer.moe_block = None
        answers(model)
    assert called == set(CALLS.values())
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
