"""Training the mixture: resumed bit for bit, in several processes, and it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_mixture import SHAPE, tokens

from scripts.mixture.train import Settings, Step, train

SETTINGS = Settings(tokens=8 * 4 * 32, length=32, rows=4, rate=5e-3, seed=1)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def interrupt_after(steps: int) -> Any:
    def watch(said: Step) -> None:
        if said.number + 1 == steps:
            raise KeyboardInterrupt

    return watch


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(SHAPE, SETTINGS, tokens(), tmp_path / "whole.safetensors")
    broken = tmp_path / "broken.safetensors"
    for steps in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            train(SHAPE, SETTINGS, tokens(), broken, watch=interrupt_after(steps))
        with safe_open(broken, framework="pt") as file:
            assert file.metadata()["step"] == str(steps)
    resumed = train(SHAPE, SETTINGS, tokens(), broken)
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name]), name
    again = train(SHAPE, SETTINGS, tokens(), broken, watch=lambda said: pytest.fail("it was done"))
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(again).items())


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Up to the order of sums; the routers' balance is that of each process' own windows, and left out."""
    shape, exact = replace(SHAPE, balance=0.0), replace(SETTINGS, precise=True)
    one = weights(train(shape, exact, tokens(), tmp_path / "one.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        train(shape, exact, tokens(), tmp_path / "two.safetensors", workers=2, watch=interrupt_after(4))
    two = weights(train(shape, exact, tokens(), tmp_path / "two.safetensors", workers=2))
    moved = sum(float((one[name] - start).square().sum()) for name, start in weights(shape.build(1)).items())
    assert sum(float((one[name] - two[name]).square().sum()) for name in one) < 1e-4 * moved


def test_it_learns(tmp_path: Path) -> None:
    said: list[Step] = []
    settings = replace(SETTINGS, tokens=60 * 4 * 32)
    train(SHAPE, settings, tokens(), tmp_path / "run.safetensors", watch=said.append)
    assert len(said) == settings.steps == 60
    assert said[-1].next_token < said[0].next_token - 0.3
    lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3


def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(SHAPE, SETTINGS, tokens(), path)
    with pytest.raises(SystemExit, match="another rate"):
        train(SHAPE, replace(SETTINGS, rate=1e-3), tokens(), path)


def test_the_rate_rises_and_falls() -> None:
    settings = Settings(tokens=100 * 8192)
    rates = [settings.rate_at(step) for step in range(settings.steps)]
    assert rates[0] == settings.rate / 2
    assert max(rates) == rates[1] == settings.rate
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(settings.rate * settings.last_rate)
