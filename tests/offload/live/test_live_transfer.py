"""A disk that breaks or dawdles under a whole model: one reply fails and no more, or nothing changes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cache.errors import TransferError
from cache.types import ExpertKey
from offload.store.plain import CheckpointReader


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("transfer"), "qwen3_moe")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """What transformers says with all weights in memory: ids [2, 12 + 24]."""
    return tiny.resident(checkpoint).generate(tiny.ids(2, 12), max_new_tokens=24, min_new_tokens=24, do_sample=False)


def generate(model: Any) -> torch.Tensor:
    return model.generate(tiny.ids(2, 12), max_new_tokens=24, min_new_tokens=24, do_sample=False)


@pytest.mark.parametrize("cache", [1, 100_000, 10**9])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_broken_disk_stops_one_reply_and_no_more(
    checkpoint: Path, expected: torch.Tensor, device: str, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CheckpointReader.read
    reads = iter(range(10**9))

    def flaky(self: CheckpointReader, key: ExpertKey, slot: torch.Tensor, *part: int) -> int:
        if next(reads) in broken:
            slot.zero_()
            raise TransferError("injected")
        return read(self, key, slot, *part)

    monkeypatch.setattr(CheckpointReader, "read", flaky)
    broken = {3, 12, 14, 50, 51, 90}  # with room for all, in RAM or beyond, 24 experts are read and no more
    with tiny.open_model(checkpoint, device=device, expert_cache=cache, cpu_mem="8G") as model:
        failures = 0
        while True:
            try:
                tokens = generate(model)
            except TransferError as error:
                assert str(error) == "injected"
                failures += 1
                model.parts.runtime.settle()
                model.parts.runtime.manager.check_integrity()
            else:
                break
        assert failures >= 2
        assert torch.equal(tokens, expected) and torch.equal(generate(model), expected)
        model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_delays_change_nothing(
    checkpoint: Path, expected: torch.Tensor, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rng = CheckpointReader.read, random.Random(11)

    def slow(self: CheckpointReader, key: ExpertKey, slot: torch.Tensor, *part: int) -> int:
        time.sleep(rng.choice([0.0, 0.0, 0.001, 0.004]))
        return read(self, key, slot, *part)

    monkeypatch.setattr(CheckpointReader, "read", slow)
    with tiny.open_model(checkpoint, device=device, expert_cache=5 * 24576) as model:
        assert torch.equal(generate(model), expected)
        stats = model.stats.as_dict()
    assert (
        stats["misses"] > stats["bypasses"] > 0
        and stats["tiers"]["gpu" if device == "emulated" else "cpu"]["evictions"]
    )
